#!/usr/bin/env python3
"""Lists what nvcc makes of every CUDA kernel: registers, shared memory and spills as ptxas counts them, and how its PTX
reads global memory. Needs the CUDA toolkit, no GPU. Exits with 1 where a kernel spills, or where one that --wide names
has no 16-byte load in an inner loop."""
import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
LOAD = re.compile(r"\bld\.(?:relaxed\.\w+\.|volatile\.)?global\.\S+|\bcp\.async\.\w+\.shared\.global\S*[^;]*")
WIDE = re.compile(r"\.v4\.[busf]32|\.v2\.[busf]64|\.b128|cp\.async.*, 16\b|cp\.async\.bulk")


def find_nvcc():
    for path in (os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if path and pathlib.Path(path).exists():
            return path
    sys.exit("kernel_table: no nvcc: neither in CUDACXX, nor on the path, nor in /usr/local/cuda/bin")


def compile_module(architecture, folder):
    """The module's PTX, and what ptxas -v says of it."""
    nvcc, ptx = find_nvcc(), folder / "module.ptx"
    # One -gencode for PTX alone: the virtual architecture that the build compiles this GPU's code from.
    subprocess.run([nvcc, "-ptx", "-O3", "-DNDEBUG", "-std=c++17", "--Werror=all-warnings", f"-I{ROOT}",
                    f"-gencode=arch=compute_{architecture},code=compute_{architecture}", "-o", ptx,
                    ROOT / "kernels/cuda/module/module.cu"], check=True)
    done = subprocess.run([nvcc, "-cubin", "-O3", f"-arch=sm_{architecture}", "-Xptxas=-v",
                           "-o", folder / "module.cubin", ptx], check=True, text=True, stderr=subprocess.PIPE)
    return ptx.read_text(), done.stderr


def plain(symbol):
    """The last name in a mangled one: _ZN6dejavu4cuda6SampleENS0_12SampleParamsE is Sample."""
    rest = re.sub(r"^_Z+N?", "", symbol)
    name = symbol
    while match := re.match(r"\d+", rest):
        end = match.end() + int(match[0])
        name, rest = rest[match.end():end], rest[end:]
    return name


def read_ptxas(text):
    """{symbol: (registers, static shared bytes, stack bytes, bytes spilled)} of the kernels."""
    found, symbol = {}, None
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            symbol = match[1]
        elif symbol and (match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill\D+(\d+) bytes spill", line)):
            stack, spilled = int(match[1]), int(match[2]) + int(match[3])
        elif symbol and (match := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            found[symbol] = (int(match[1]), int(shared[1]) if shared else 0, stack, spilled)
            symbol = None
    return found


def inner_loops(lines):
    """Line ranges that a branch backwards encloses, and that enclose no other."""
    labels, found = {}, []
    for number, line in enumerate(lines):
        if match := re.match(r"(\$\w+):", line):
            labels[match[1]] = number
        elif (match := re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", line)) and match[1] in labels:
            found.append(range(labels[match[1]], number))
    return [r for r in found if not any(r.start < o.start and o.stop < r.stop for o in found)]


def read_ptx(text):
    """{symbol: (threads, 16-byte loads in inner loops, 16-byte loads, all loads of global memory, mma)}."""
    found = {}
    for match in re.finditer(r"^(?:\.visible |\.weak )?\.entry (\w+)\(.*?^\}", text, re.MULTILINE | re.DOTALL):
        lines = match[0].splitlines()
        inside = inner_loops(lines)
        loads = [number for number, line in enumerate(lines) if LOAD.search(line)]
        wide = [number for number in loads if WIDE.search(lines[number])]
        looped = [number for number in wide if any(number in r for r in inside)]
        threads = re.search(r"^\.maxntid (\d+)", match[0], re.MULTILINE)
        found[match[1]] = (int(threads[1]) if threads else 0, len(looped), len(wide), len(loads),
                           sum("mma.sync" in line for line in lines))
    return found


def main():
    parser = argparse.ArgumentParser(prog="./run gpu-kernels", description=__doc__)
    parser.add_argument("--arch", default="90", help="compute capability without its dot (default: 90)")
    parser.add_argument("--wide", default="^(Linear|Sum|Attention|ReadSum)", metavar="REGEX",
                        help="kernels that must read 16 bytes at once in an inner loop (default: %(default)s)")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        try:
            ptx, report = compile_module(options.arch, pathlib.Path(folder))
        except subprocess.CalledProcessError as error:
            sys.exit(f"kernel_table: nvcc failed with {error.returncode}\n{error.stderr or ''}")
    resources, instructions = read_ptxas(report), read_ptx(ptx)
    assert resources.keys() == instructions.keys(), (resources.keys() ^ instructions.keys())

    rows = [("kernel", "threads", "registers", "shared", "stack", "spilled",
             "16-byte loads", "in inner loops", "of all", "mma")]
    complaints = []
    for symbol in sorted(resources, key=plain):
        registers, shared, stack, spilled = resources[symbol]
        threads, looped, wide, loads, mma = instructions[symbol]
        name = plain(symbol)
        rows.append((name, threads, registers, shared, stack, spilled, wide, looped, loads, mma))
        if spilled:
            complaints.append(f"{name} spills {spilled} bytes")
        if re.search(options.wide, name) and not looped:
            complaints.append(f"{name} has no 16-byte load in an inner loop")
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join([str(row[0]).ljust(widths[0]), *(str(v).rjust(w) for v, w in zip(row[1:], widths[1:]))]))
    for complaint in complaints:
        print(f"FAILED: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
