#!/usr/bin/env python3
"""The recipes of CONTRIBUTING.md: each patch here applies to the present tree, touches as many files as the recipe says,
and compiles. recipes_test.py BUILD: the build folder, whose compile commands are used.

A patch that no longer applies is made again: apply it by hand, `git diff > tests/recipes/NAME.patch`, take it back.
"""
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
# By patch: how many files it may touch, and whose compilation shows that it is whole.
RECIPES = {"metric": (2, ["engine/metrics.cc", "engine/serving/recorder.cc"]),
           "rpc": (3, ["server/api/generation_service.cc"])}
PROTO = "dejavu/v1/generation.proto"


def run(command, **arguments):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **arguments)
    if done.returncode != 0:
        sys.exit(f"{shlex.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")


def compile_in(tree, build, source):
    """Checks `source` of `tree` with the flags that the build compiles it with."""
    for entry in json.loads((build / "compile_commands.json").read_text()):
        if pathlib.Path(entry["file"]) == ROOT / source:
            break
    else:
        sys.exit(f"{build}/compile_commands.json has no {source}")
    words = shlex.split(entry["command"])
    compiler = next(i for i, word in enumerate(words) if re.search(r"(\+\+|clang)", pathlib.Path(word).name))
    flags = [word for word in words[compiler + 1:words.index("-o")] if re.match(r"-[DIWfmps]|-std", word)]
    flags = [word.replace(f"-I{ROOT}", f"-I{tree}") for word in flags]
    run([words[compiler], f"-I{tree}/generated", *flags, "-isystem", build / "proto", "-fsyntax-only", tree / source])


def check(name, build, tree):
    files, sources = RECIPES[name]
    patch = ROOT / "tests/recipes" / f"{name}.patch"
    touched = re.findall(r"^\+\+\+ b/(.*)$", patch.read_text(), re.M)
    if len(touched) != files:
        sys.exit(f"{patch.name} touches {len(touched)} files, and the recipe says {files}: {touched}")
    run(["git", "apply", patch], cwd=tree)
    if f"proto/{PROTO}" in touched:
        (tree / "generated").mkdir()
        run(["protoc", "-I", tree / "proto", "--cpp_out", tree / "generated", PROTO])
    for source in sources:
        compile_in(tree, build, source)


def main(build):
    build = pathlib.Path(build).resolve()
    for name in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            tree = pathlib.Path(folder)
            for part in ("engine", "kernels", "proto", "server"):
                shutil.copytree(ROOT / part, tree / part)
            check(name, build, tree)
            print(f"{name}: {RECIPES[name][0]} files")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
