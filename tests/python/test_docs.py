"""The documentation does what it says: links lead somewhere, blocks marked `sh local` run, and flags, settings, metrics and
commands that pages name exist.
"""
import contextlib
import functools
import os
import pathlib
import re
import signal
import subprocess
import sys
import urllib.parse

import pytest
import yaml

import kubectl
from conftest import BIN, PATIENCE_S, ROOT
from documents import commands, page, pages
from manifests import dejavud
from monitoring import documented_metrics, family

PROGRAMS = ("dejavud", "dejavu-cli", "dejavu-loadtest", "dejavu-eval", "dejavu-calibrate", "dejavu-convert", "dejavu-sim")
KUBERNETES_KEYS = {"limits.cpu", "limits.memory"}  # these look like settings
# What a page's commands must say on standard error, besides ending well.
SAID = {"docs/operations/security.md": "the token is not known here"}


def named(pages):
    return pytest.mark.parametrize("each", pages, ids=lambda page: page.name)


@named(pages())
def test_every_link_leads_somewhere(each):
    by_path = {page.path: page for page in pages()}
    for link in each.links():
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        file, _, anchor = urllib.parse.unquote(link).partition("#")
        path = pathlib.Path(os.path.normpath(each.path.parent / file)) if file else each.path
        assert path.is_relative_to(ROOT) and path.exists(), link
        if path in by_path:
            assert not anchor or anchor in by_path[path].anchors, f"{link}: there are {sorted(by_path[path].anchors)}"
        else:
            assert not anchor or re.fullmatch(r"L\d+(-L\d+)?", anchor), link


# --- blocks that run


@pytest.fixture
def checkout(tmp_path):
    """The repository, with these programs as build/release/bin: what blocks write stays here."""
    folder = tmp_path / "checkout"
    (folder / "build/release").mkdir(parents=True)
    (folder / "build/release/bin").symlink_to(BIN)
    (folder / "build/venv").symlink_to(ROOT / "build/venv")
    for entry in ROOT.iterdir():
        if entry.name not in ("build", ".git"):
            (folder / entry.name).symlink_to(entry)
    return folder


def follow(script, folder, tmp_path):
    """Runs it in one bash, as a reader would; what it leaves running is killed. Returns (exit code, all it said)."""
    tools, work = tmp_path / "tools", tmp_path / "work"
    tools.mkdir()
    work.mkdir()
    (tools / "kubectl").symlink_to(kubectl.find())
    environment = {**os.environ, "PATH": f"{tools}:{BIN}:{os.environ['PATH']}", "WORK": str(work), "TMPDIR": str(tmp_path)}
    with open(tmp_path / "said", "w+") as said:  # a pipe would wait for what is left running
        shell = subprocess.Popen(["bash", "-c", "set -eu\n" + script], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                                 stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = shell.wait(timeout=3 * PATIENCE_S)
        except subprocess.TimeoutExpired:
            code = "none in time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
        said.seek(0)
        return code, said.read()


@named([page for page in pages() if page.local_blocks()])
def test_blocks_can_be_followed(each, checkout, tmp_path):
    """All blocks of a page marked `local`, in one shell, in their order."""
    code, said = follow("".join(block.text for block in each.local_blocks()), checkout, tmp_path)
    logs = "".join(path.read_text(errors="replace") for path in tmp_path.rglob("log") if path.is_file())
    assert code == 0, said + logs
    assert SAID.get(each.name, "") in said


def test_the_important_pages_have_blocks_that_run():
    assert page("README.md").local_blocks()
    assert sum(len(each.local_blocks()) for each in pages() if each.name.startswith("docs/operations/")) >= 8


def test_blocks_that_run_build_and_install_nothing():
    for each in pages():
        for block in each.local_blocks():
            run = [words for words in commands(block) if words[0].endswith("/run")]
            assert all(words[1] == "help" for words in run), f"{each.name}:{block.line}: make it ```sh, without local"


def test_manifests_that_pages_apply_exist():
    named = {path for each in pages() for path in re.findall(r"-k (deploy/[\w/-]+)", each.text)}
    assert named
    for path in named:
        assert (ROOT / path / "kustomization.yaml").exists(), path


# --- what pages name


def test_commands_of_run_exist():
    listed = subprocess.run([ROOT / "run", "help"], capture_output=True, text=True, check=True, timeout=PATIENCE_S).stdout
    known = set(re.findall(r"^\./run ([\w-]+)", listed, re.M)) | {"help"}
    for each in pages():
        for command in re.findall(r"(?<![\w/.])\./run ([a-z][\w-]*)", each.text):
            assert command in known, f"{each.name}: ./run {command}"
    readme = page("README.md")
    assert any(words[0] == "./run" for words in commands(readme.blocks[0])), "README begins with how to try it"


@functools.cache
def helped(program, *subcommands):
    """Flags and subcommands that its --help lists."""
    text = subprocess.run([BIN / program, *subcommands, "--help"], capture_output=True, text=True, check=True,
                          timeout=PATIENCE_S).stdout
    listed = re.search(r"^Subcommands:\n((?:  .*\n?)*)", text, re.M)
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)), set(re.findall(r"^  ([a-z][\w-]*)", listed[1] if listed else "", re.M))


def start_of(program, words):
    """Where it is called in a command, `mpirun -n 2 dejavud` too, or None. What follows a flag is the flag's value."""
    for i, word in enumerate(words):
        if (word == program or word.endswith(f"/bin/{program}")) and not (i and re.match("-.", words[i - 1].replace("--", "-", 1))):
            return i
    return None


def unknown_flags(words):
    """Of a command, such as [dejavu-cli, generate, --seed, 7]."""
    program, *rest = words
    path = [program]
    known, subcommands = helped(*path)
    unknown = []
    for word in rest:
        if word in subcommands:
            path.append(word)
            more, subcommands = helped(*path)
            known = known | more
        elif flag := re.match(r"\[?(--[a-z][\w-]*)", word):
            unknown.append(flag[1])
    return [flag for flag in unknown if flag not in known | {"--help"}]


@pytest.mark.parametrize("program", PROGRAMS)
def test_flags_exist(program):
    """In blocks and in inline code that begins with the program's name."""
    checked = 0
    for each in pages():
        found = [words for block in each.blocks for words in commands(block)]
        found += [code.split() for code in re.findall(r"`([^`\n]+)`", each.prose)]
        for words in found:
            at = start_of(program, words)
            if at is not None:
                checked += 1
                assert unknown_flags([program, *words[at + 1:]]) == [], f"{each.name}: {' '.join(words)}"
    assert checked


@pytest.fixture(scope="module")
def settings():
    """All keys, from --print-config."""
    result = dejavud("--print-config", DEJAVUD_DEVICE="cpu")
    tree = yaml.safe_load(result.stdout)
    sections = {name: set(keys) for name, keys in tree.items() if isinstance(keys, dict)}
    return sections, {name for name in tree if name not in sections}


@named(pages())
def test_settings_exist(each, settings):
    sections, _ = settings
    variables = {"DEJAVUD_CONFIG"} | {f"DEJAVUD_{section}_{key}".upper() for section in sections for key in sections[section]}
    variables |= {f"DEJAVUD_{key}".upper() for key in settings[1]}
    for section, key in re.findall(r"`([a-z]+)\.([a-z_]+)[`:]", each.prose):
        if section in sections and f"{section}.{key}" not in KUBERNETES_KEYS and key not in ("md", "cc", "h", "py", "yaml"):
            prefix = key.endswith("_")  # `metrics.slo_*`
            assert key in sections[section] or prefix and any(k.startswith(key) for k in sections[section]), f"{section}.{key}"
    for variable in re.findall(r"\bDEJAVUD_[A-Z_]+\b", each.text):
        assert variable in variables, variable


@named(pages())
def test_metrics_exist(each):
    metrics = documented_metrics()
    of_cmake = "".join((ROOT / path).read_text() for path in ("CMakeLists.txt", "cmake/library.cmake", "tests/CMakeLists.txt"))
    for name in re.findall(r"`(dejavu_[a-z_]+)`", each.prose):
        assert family(name, metrics) or re.search(rf"\b{name}\b", of_cmake), name


# --- form


def test_the_first_pages_are_short():
    assert len(page("README.md").text.splitlines()) <= 150
    assert len(page("ARCHITECTURE.md").prose.split()) <= 1300


def test_the_configuration_reference_is_what_dejavud_says():
    result = subprocess.run([sys.executable, ROOT / "docs/make_configuration_reference.py", BIN / "dejavud", "--check"],
                            capture_output=True, text=True, timeout=PATIENCE_S)
    assert result.returncode == 0, result.stderr
