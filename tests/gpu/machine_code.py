"""The asynchronous copies of a kernel, before and after it waits for the launch before it: from its machine code, or
where there is no cuobjdump from its PTX. Standard library only."""
import collections
import os
import pathlib
import re
import shutil
import subprocess

# place: an address or a line; label: where a jump to it goes; target: the label of a jump
Instruction = collections.namedtuple("Instruction", "operation operands predicated label target")
SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
PTX = re.compile(r"\s*(@!?%\w+\s+)?([a-z][\w.:]*)([^;]*);")


def find_cuobjdump():
    """Needs nvdisasm beside it. The toolkit has both, and so have the packages nvidia-cuda-cuobjdump and
    nvidia-cuda-nvdisasm of PyPI."""
    for path in (os.environ.get("CUOBJDUMP"), shutil.which("cuobjdump"), "/usr/local/cuda/bin/cuobjdump"):
        if path and pathlib.Path(path).exists():
            return pathlib.Path(path)
    return None


def read_sass(cuobjdump, cubin):
    """{symbol: [Instruction]}"""
    folders = os.pathsep.join((str(cuobjdump.parent), os.environ.get("PATH", "")))
    text = subprocess.run([cuobjdump, "-sass", cubin], check=True, text=True, capture_output=True,
                          env={**os.environ, "PATH": folders}).stdout
    found = {}
    for part in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]:
        code = found[part.split(None, 1)[0]] = []
        for address, predicate, operation, operands in SASS.findall(part):
            target = re.search(r"0x([0-9a-f]+)\s*$", operands) if operation.startswith(("BRA", "CALL")) else None
            code.append(Instruction(operation, operands, bool(predicate) or bool(re.search(r"\bU?P\d", operands)),
                                    int(address, 16), int(target[1], 16) if target else None))
    return found


def read_ptx(text):
    """{symbol: [Instruction]}"""
    found = {}
    for match in re.finditer(r"^(?:\.visible |\.weak )?\.entry (\w+)\(.*?^\}", text, re.MULTILINE | re.DOTALL):
        code, label = [], None
        for line in match[0].splitlines():
            if at := re.match(r"(\$\w+):", line):
                label = at[1]
            elif instruction := PTX.match(line):
                predicate, operation, operands = instruction.groups()
                target = re.search(r"\$\w+", operands) if operation.startswith("bra") else None
                code.append(Instruction(operation, operands, bool(predicate), label, target[0] if target else None))
                label = None
        found[match[1]] = code
    return found


def is_wait(instruction):
    return instruction.operation.startswith(("ACQBULK", "griddepcontrol.wait"))


def is_copy(instruction):
    return instruction.operation.startswith(("LDGSTS", "cp.async.cg", "cp.async.ca", "UBLKCP", "cp.async.bulk.shared"))


def copies(code):
    """How many there are before and after the wait. Before: what is reached without passing it."""
    places = {instruction.label: number for number, instruction in enumerate(code) if instruction.label is not None}
    todo, seen = [0], set()
    while todo:
        number = todo.pop()
        if number in seen or number >= len(code) or is_wait(code[number]):
            continue
        seen.add(number)
        instruction = code[number]
        ends = instruction.operation.split(".")[0] in ("EXIT", "RET", "ret", "exit", "BRA", "bra")
        if not ends or instruction.predicated:
            todo.append(number + 1)
        if instruction.target in places:
            todo.append(places[instruction.target])
    all_copies = {number for number, instruction in enumerate(code) if is_copy(instruction)}
    return len(all_copies & seen), len(all_copies - seen)
