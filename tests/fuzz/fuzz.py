#!/usr/bin/env python3
"""Runs libFuzzer's programs, which `./run build fuzz fuzzers` has made in build/fuzz/bin, and says what they found.

fuzz.py list
fuzz.py NAME|all MINUTES    from what build/fuzz/corpus/NAME has gathered, tests/fuzz/corpus and the target's own seeds
fuzz.py corpus NAME|all     writes a small corpus that reaches what the gathered one does into tests/fuzz/corpus
"""
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/fuzz"
INPUTS = ROOT / "tests/fuzz"
# An input that takes longer, or more memory, is a finding.
LIMITS = ["-timeout=10", "-rss_limit_mb=2048", "-malloc_limit_mb=512"]
CORPUS_INPUTS, CORPUS_BYTES = 32, 1 << 10  # of one target in tests/fuzz/corpus, and of one of them
# Debian's libraries are not instrumented, so that a container may be made there and used here.
SANITIZERS = {"ASAN_OPTIONS": "detect_container_overflow=0:detect_stack_use_after_return=1:quarantine_size_mb=32",
              "UBSAN_OPTIONS": "print_stacktrace=1"}


def names():
    return sorted(path.name.removeprefix("fuzz_") for path in (BUILD / "bin").glob("fuzz_*"))


def program(name, *arguments):
    return [str(BUILD / "bin" / f"fuzz_{name}"), *map(str, arguments)]


def start(name):
    """What a run begins with: folders of inputs, the first of which gathers new ones; and flags."""
    own = BUILD / "seeds" / name
    shutil.rmtree(own, ignore_errors=True)
    subprocess.run(program(name, f"--write-seeds={own}"), check=True)
    gathered, crashes = BUILD / "corpus" / name, BUILD / "crashes" / name
    gathered.mkdir(parents=True, exist_ok=True)
    crashes.mkdir(parents=True, exist_ok=True)
    folders = [gathered, own / "seeds"]
    folders += [folder for folder in (INPUTS / "corpus" / name, INPUTS / "crashes" / name) if folder.is_dir()]
    return folders, [*LIMITS, f"-max_len={(own / 'max_len').read_text()}", f"-dict={own / 'words.dict'}"]


def environment(scratch):
    return os.environ | SANITIZERS | {"TMPDIR": scratch}


def scratch_folder():
    """In memory, where there is such a place: targets write files for every input."""
    memory = pathlib.Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="dejavu_fuzz.", dir=memory if os.access(memory, os.W_OK) else None)


def run(name, minutes):
    """One row of the table, and whether the target held."""
    folders, flags = start(name)
    crashes = BUILD / "crashes" / name
    log = BUILD / "logs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    began = time.time()
    with scratch_folder() as scratch, open(log, "w") as output:
        code = subprocess.run(program(name, *flags, f"-max_total_time={round(minutes * 60)}", "-print_final_stats=1",
                                      f"-artifact_prefix={crashes}/", *folders),
                              stdout=output, stderr=subprocess.STDOUT, env=environment(scratch)).returncode
    text = log.read_text(errors="replace")
    # "#4321  NEW cov: 812 ft: 2109 corp: 201/31Kb ..."
    counters = re.findall(r"^#\d+\s+\w+\s+cov: (\d+) ft: (\d+) corp: (\d+)", text, re.M)
    stats = dict(re.findall(r"^stat::(\w+):\s+(\d+)", text, re.M))
    edges = re.search(r"\((\d+) inline 8-bit counters\)|\((\d+) guards\)", text)
    cov, ft, corpus = counters[-1] if counters else ("0", "0", "0")
    row = {"target": name, "minutes": f"{(time.time() - began) / 60:.1f}", "executions": stats.get("number_of_executed_units", "?"),
           "per second": stats.get("average_exec_per_sec", "?"), "cov": cov,
           "of": next((group for group in edges.groups() if group), "?") if edges else "?", "ft": ft, "inputs": corpus,
           "peak MiB": stats.get("peak_rss_mb", "?"), "held": "yes" if code == 0 else "NO"}
    if code != 0:
        # libFuzzer names what it has kept in its log.
        found = re.findall(r"Test unit written to (\S+)", text)
        print("\n".join(text.splitlines()[-60:]))
        print(f"\n{name} did not hold; the whole log is {log}. Once the cause is mended, keep the input as a test:")
        for path in found:
            print(f"  mkdir -p {INPUTS}/crashes/{name} && cp {path} {INPUTS}/crashes/{name}/SAY_WHAT_IT_DOES")
    return row, code == 0


def show(rows):
    keys = list(rows[0])
    print("| " + " | ".join(keys) + " |\n|" + "---|" * len(keys))
    for row in rows:
        print("| " + " | ".join(row[key] for key in keys) + " |")


def keep_corpus(name):
    """libFuzzer's merge takes the inputs that add something; of these some of each size."""
    folders, flags = start(name)
    kept = INPUTS / "corpus" / name
    with scratch_folder() as scratch, tempfile.TemporaryDirectory() as merged:
        subprocess.run(program(name, *flags, "-merge=1", merged, *folders), check=True, env=environment(scratch),
                       stderr=subprocess.DEVNULL)
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        seeds = {path.read_bytes() for path in folders[1].iterdir()}
        found = sorted((path for path in pathlib.Path(merged).iterdir() if path.read_bytes() not in seeds),
                       key=lambda path: (path.stat().st_size, path.name))
        found = [path for path in found if path.stat().st_size <= CORPUS_BYTES]
        for i in range(min(CORPUS_INPUTS, len(found))):
            path = found[i * len(found) // min(CORPUS_INPUTS, len(found))]
            shutil.copy(path, kept / path.name[:12])
    print(f"{kept}: {len(list(kept.iterdir()))} inputs")


def chosen(name):
    if name != "all" and name not in names():
        sys.exit(f"fuzz: no target {name}; there are: {' '.join(names())}")
    return names() if name == "all" else [name]


def main():
    arguments = sys.argv[1:]
    if arguments == ["list"]:
        print("\n".join(names()))
    elif len(arguments) == 2 and arguments[0] == "corpus":
        for name in chosen(arguments[1]):
            keep_corpus(name)
    elif len(arguments) == 2 and re.fullmatch(r"\d+(\.\d+)?", arguments[1]):
        results = [run(name, float(arguments[1])) for name in chosen(arguments[0])]
        show([row for row, _ in results])
        sys.exit(0 if all(held for _, held in results) else 1)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
