#!/usr/bin/env python3
"""Writes configuration-reference.md beside it, from what DEJAVUD says of its options: --help and --print-config are made from
the one table of them. With --check it writes nothing, and fails where the page is not up to date.

  make_configuration_reference.py DEJAVUD [--check]
"""
import collections
import os
import pathlib
import re
import subprocess
import sys

PAGE = pathlib.Path(__file__).resolve().with_name("configuration-reference.md")
HEAD = """\
# Configuration reference

Every key of `dejavud`, with its flag and its environment variable. `dejavud --help` and
[config/dejavud.yaml](../config/dejavud.yaml) say the same. A flag wins over the environment, which wins over the YAML file, which
wins over the default. The file is named by `--config FILE` or `DEJAVUD_CONFIG`. The part of a key before its dot is a section of the
file, so `kv.block_tokens` is written

```yaml
kv:
  block_tokens: 16
```

This page is written by `./run docs` from the daemon's own table of options. Do not edit it.
"""

# names: key, flags and variable.
Option = collections.namedtuple("Option", "key group names values default meaning")


def said(dejavud, flag):
    """What it writes when nothing but the defaults is in effect."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DEJAVUD_")}
    return subprocess.run([dejavud, flag], env=environment, capture_output=True, text=True, check=True, timeout=60).stdout


def printed(text):
    """Key to (help with limits, default) of --print-config: a comment, then `key: value`, keys of a section indented."""
    keys, section, comment = {}, "", ""
    for line in text.splitlines():
        if match := re.fullmatch(r" *# (.*)", line):
            comment = match[1]
        elif match := re.fullmatch(r"(\w+):", line):
            section = match[1] + "."
        elif match := re.fullmatch(r"( *)(\w+): (.*)", line):
            keys[(section if match[1] else "") + match[2]] = comment, match[3]
    del keys["version"]  # the file's own, no option
    return keys


def options(dejavud):
    """All of them, in the order of --help."""
    keys = {f"DEJAVUD_{key.replace('.', '_').upper()}": (key, *rest) for key, rest in printed(said(dejavud, "--print-config")).items()}
    found, group = [], ""
    entry = re.compile(r"^(\S[\w ]*):$|^  (--\S+?)(?:, (--no-\S+)| (.*))?\n      (.*) \[(DEJAVUD_\w+)\]$", re.M)
    for heading, flag, negation, placeholder, help_text, variable in entry.findall(said(dejavud, "--help")):
        if heading:
            group = heading
            continue
        key, comment, default = keys.pop(variable)
        # The comment is the meaning and, in brackets, the limits; --help adds the default to them, or text that has none.
        if default.startswith('"'):
            meaning = help_text.removesuffix(f" (default {default[1:-1]})")
        else:
            meaning = help_text[:help_text.rindex(" (")]
        assert comment.startswith(meaning), f"{comment}, {help_text}"
        limits = comment.removeprefix(meaning).strip(" ()")
        names = (key, flag, negation, variable) if negation else (key, flag, variable)
        found.append(Option(key, group, names, limits or placeholder, default, meaning))
    assert not keys, f"--help lacks {sorted(keys)}"
    return found


def row(option):
    names = "<br>".join(f"`{name}`" for name in option.names)
    default = "empty" if option.default == '""' else f"`{option.default.strip(chr(34))}`"
    return f"| {names} | {option.values} | {default} | {option.meaning} |\n"


def page(found):
    text, group = HEAD, ""
    for option in found:
        if option.group != group:
            group = option.group
            text += f"\n## {group}\n\n| Key, flag, variable | Values | Default | Meaning |\n|---|---|---|---|\n"
        text += row(option)
    return text


def main(dejavud, *rest):
    text = page(options(dejavud))
    if rest == ("--check",):
        if not PAGE.exists() or PAGE.read_text() != text:
            sys.exit(f"{PAGE.name} is not what dejavud says: ./run docs writes it")
    else:
        PAGE.write_text(text)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[2:] not in ([], ["--check"]):
        sys.exit(__doc__)
    main(*sys.argv[1:])
