"""deploy/Dockerfile: what its images hold, and that it is what their programs need."""
import os
import pathlib
import re
import subprocess

import pytest

from conftest import BIN, PATIENCE_S, ROOT
from manifests import DEPLOY

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def stages():
    """Name of each stage to its instructions, as (word, rest), continued lines joined."""
    result = {}
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M).replace("\\\n", " ")
    for word, rest in re.findall(r"^([A-Z]+) +(.*)$", text, re.M):
        if word == "FROM":
            base, _, name = rest.split()
            result[name] = [("FROM", base)]
        elif result:
            result[name].append((word, rest))
    return result


def chain(name):
    """The stage's instructions after those of the stages that it stands on."""
    instructions = stages()[name]
    base = re.sub(r"\$\{MULTI_HOST_ON\}", "cuda", instructions[0][1])
    return (chain(base) if base in stages() else []) + instructions


@pytest.mark.parametrize("target", ["cpu", "cuda", "multi-host", "proxy", "gateway", "fetch"])
def test_images_run_without_root(target):
    users = [rest for word, rest in chain(target) if word == "USER"]
    assert users[-1] == "65532:65532"
    assert f"--uid {users[-1].split(':')[0]} " in DOCKERFILE
    assert [word for word, _ in chain(target)].count("ENTRYPOINT") == 1
    assert chain(target)[0] == ("FROM", "${BASE}")


def test_the_last_stage_is_the_default():
    assert list(stages())[-1] == "cpu"


def test_what_is_copied_exists_and_is_in_the_context():
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    kept = [line[1:] for line in ignore if line.startswith("!")]
    assert "*" in ignore and all((ROOT / path).exists() for path in kept)
    copied = set()
    for instructions in stages().values():
        for word, rest in instructions:
            if word != "COPY":
                continue
            *sources, _ = rest.split()
            if sources[0].startswith("--from="):
                assert sources[0].removeprefix("--from=") in stages(), rest
                continue
            for path in sources:
                assert any(pathlib.PurePath(path).is_relative_to(each) for each in kept), path
            copied |= set(sources)
    # What the build reads is there.
    cmake = (ROOT / "CMakeLists.txt").read_text()
    read = re.findall(r"FOLDER ([\w/]+)", cmake) + re.findall(r"dejavu_embed\(\w+ (\S+)", cmake)
    read += re.findall(r"^(?:include|add_subdirectory)\((\w+/[\w./]+)\)", cmake, re.M)
    read += re.findall(r"\$\{CMAKE_SOURCE_DIR\}/([\w./-]+)", cmake)
    assert {"cmake", "config", "deploy", "engine", "kernels", "loadtest", "proto", "server"} == {path.split("/")[0] for path in read}
    for path in read:
        assert any(pathlib.PurePath(path).is_relative_to(each) for each in copied), path


def test_the_runtime_packages_are_those_that_the_programs_load():
    """Of this build's programs: no library is missing in the image and none is there for nothing."""
    run_line, = (rest for word, rest in stages()["runtime"] if word == "RUN")
    listed = set(re.search(r"--no-install-recommends\s+(.*?)&&", run_line)[1].split())
    files = set()
    others = ("libc.", "libm.", "libgcc_s.", "ld-")  # every image has these
    for program in ("dejavud", "dejavu-cli", "dejavu-convert"):
        # The direct ones; what these load is their packages' affair.
        headers = subprocess.run(["objdump", "-p", BIN / program], capture_output=True, text=True, check=True).stdout
        loaded = subprocess.run(["ldd", BIN / program], capture_output=True, text=True, check=True).stdout
        files |= {os.path.realpath(re.search(rf"{re.escape(name)} => (/\S+)", loaded)[1])
                  for name in re.findall(r"NEEDED +(\S+)", headers) if not name.startswith(others)}
    # By their ends: Debian's packages know some as /lib/..., which is /usr/lib/... on a machine.
    loaded = {"/".join(path.split("/")[-2:]) for path in files}
    for package in sorted(listed):
        content = subprocess.run(["dpkg-query", "-L", package], capture_output=True, text=True, check=True, timeout=PATIENCE_S)
        held = {"/".join(path.split("/")[-2:]) for path in content.stdout.splitlines()}
        assert held & loaded, f"{package} is there for nothing"
        loaded -= held
    assert not loaded, "no package is there for these"


def test_the_image_holds_only_what_runs():
    assert [rest for word, rest in stages()["runtime"] if word == "COPY"] == [
        "--from=build /src/build/image/bin/dejavud /src/build/image/bin/dejavu-cli /src/build/image/bin/dejavu-convert /usr/local/bin/",
        "--from=model /models /usr/share/dejavu/models"]
    for target in ("cuda", "multi-host"):
        module, = (rest for word, rest in stages()[target] if word == "COPY" and "--from=build" in rest)
        assert module.endswith(".so /usr/local/lib/dejavu/"), "where dejavud looks for modules"
