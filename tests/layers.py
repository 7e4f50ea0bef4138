#!/usr/bin/env python3
"""Fails where an include points up. layers.py LAYERS: the list of libraries that CMake has written (cmake/library.cmake).

A file may include what its own library has, and what the libraries have that it uses, directly or through others.
"""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.M)
SOURCES = {".h", ".cc", ".cu", ".cuh"}


def read_layers(text):
    """The libraries' uses by name, and whose a header or a folder is."""
    uses, owners = {}, {}
    for line in text.splitlines():
        name, rest = line.split(": ", 1)
        owned, used = rest.split("uses")
        uses[name] = used.split()
        for path in owned.split():
            owners.setdefault(path, name)  # of a program in a library's folder main.cc alone is its own
    return uses, owners


def reachable(name, uses):
    seen, todo = set(), [name]
    while todo:
        library = todo.pop()
        if library in seen:
            continue
        seen.add(library)
        todo += uses.get(library, [])
    return seen


def owner_of(path, owners):
    """The library of a file: its own, else that of the nearest folder that has one."""
    for candidate in [path, *path.parents]:
        if str(candidate) in owners:
            return owners[str(candidate)]
    return None


def main(layers):
    uses, owners = read_layers(pathlib.Path(layers).read_text())
    roots = {path.split("/")[0] for path in owners}
    problems, includes = [], 0
    for root in sorted(roots):
        for path in sorted(file for file in (ROOT / root).rglob("*") if file.suffix in SOURCES):
            relative = path.relative_to(ROOT)
            library = owner_of(relative, owners)
            allowed = reachable(library, uses)
            for target in INCLUDE.findall(path.read_text()):
                if target.split("/")[0] not in roots:
                    continue
                includes += 1
                to = owner_of(pathlib.PurePath(target), owners)
                if to not in allowed:
                    problems.append(f"{relative} ({library}) includes {target} ({to})")
    for problem in problems:
        print(problem)
    print(f"{len(uses)} libraries and programs, {includes} includes, {len(problems)} against the direction")
    if includes == 0:
        print("nothing was read")
    return 1 if problems or includes == 0 else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
