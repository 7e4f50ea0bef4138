#!/usr/bin/env python3
"""Lists what nvcc makes of every CUDA kernel: registers, shared memory and spills as ptxas counts them, how its PTX
reads global memory, the asynchronous copies before and after it waits for the launch before it, and the bytes that a
multiprocessor has asked for by then (kernels/cuda/rings.h). Then launches a layer of a decode step, where dejavu-bench
is built. Needs the CUDA toolkit, no GPU. Exits with 1 where a kernel spills, or where one that --wide names has no
16-byte load in an inner loop; with --check also where one that --weights names asks for less than 96 KB before the
wait, or a step at one row takes more than six launches a layer."""
import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import machine_code

ROOT = pathlib.Path(__file__).resolve().parents[2]
LOAD = re.compile(r"\bld\.(?:relaxed\.\w+\.|volatile\.)?global\.\S+|\bcp\.async\.\w+\.shared\.global\S*[^;]*")
LEAST_IN_FLIGHT = 96 << 10  # bytes of a multiprocessor
MOST_LAUNCHES = 6  # a layer, at one row
WIDE = re.compile(r"\.v4\.[busf]32|\.v2\.[busf]64|\.b128|cp\.async.*, 16\b|cp\.async\.bulk")


def find_nvcc():
    for path in (os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if path and pathlib.Path(path).exists():
            return path
    sys.exit("kernel_table: no nvcc: neither in CUDACXX, nor on the path, nor in /usr/local/cuda/bin")


def compile_module(architecture, folder):
    """The module's PTX, what ptxas -v says of it, and its machine code or None."""
    nvcc, ptx = find_nvcc(), folder / "module.ptx"
    # One -gencode for PTX alone: the virtual architecture that the build compiles this GPU's code from.
    subprocess.run([nvcc, "-ptx", "-O3", "-DNDEBUG", "-std=c++17", "--Werror=all-warnings", f"-I{ROOT}",
                    f"-gencode=arch=compute_{architecture},code=compute_{architecture}", "-o", ptx,
                    ROOT / "kernels/cuda/module/module.cu"], check=True)
    done = subprocess.run([nvcc, "-cubin", "-O3", f"-arch=sm_{architecture}", "-Xptxas=-v",
                           "-o", folder / "module.cubin", ptx], check=True, text=True, stderr=subprocess.PIPE)
    cuobjdump = machine_code.find_cuobjdump()
    code = machine_code.read_sass(cuobjdump, folder / "module.cubin") if cuobjdump else None
    return ptx.read_text(), done.stderr, code


def read_rings(folder):
    """{kernel: (bytes of a block before the wait, bytes after it, blocks of a multiprocessor)}"""
    source, program = folder / "rings.cc", folder / "rings"
    source.write_text("""#include <cstdio>
#include "kernels/cuda/rings.h"
int main() {
  using namespace dejavu::cuda;
#define PRINT(name, params) { const Ring r = RingOf(k##name); \\
  std::printf(#name " %d %d %d\\n", r.before_wait_bytes, r.after_wait_bytes, r.blocks); }
  DEJAVU_CUDA_KERNELS(PRINT)
}
""")
    subprocess.run([os.environ.get("CXX", "c++"), "-std=c++17", f"-I{ROOT}", "-o", program, source], check=True)
    lines = subprocess.run([program], check=True, text=True, capture_output=True).stdout.splitlines()
    return {name: tuple(map(int, rest)) for name, *rest in map(str.split, lines)}


def launches_a_layer(folder):
    """[(tier, rows, launches)] of a step of opt-6.7b, as the backend would make them; None without dejavu-bench."""
    for build in ("build/release", "build/gpu"):
        bench, report = ROOT / build / "bin/dejavu-bench", folder / "launches.json"
        if bench.exists():
            subprocess.run([bench, "launches", "--calculate", "--model", "synthetic:opt-6.7b", "--batch", "1,4,16",
                            "--tier", "dense,exact,balanced", "--json", report], check=True, stdout=subprocess.DEVNULL)
            steps = json.loads(report.read_text())["steps"]
            return [(step["tier"], step["batch"], step["launches_per_layer"]) for step in steps]
    return None


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


def print_table(rows):
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join([str(row[0]).ljust(widths[0]), *(str(v).rjust(w) for v, w in zip(row[1:], widths[1:]))]))


def list_kernels(options, folder):
    """Prints a line for each; returns what is wrong with them."""
    ptx, report, code = compile_module(options.arch, folder)
    rings, resources, instructions = read_rings(folder), read_ptxas(report), read_ptx(ptx)
    assert resources.keys() == instructions.keys(), (resources.keys() ^ instructions.keys())
    copies = {symbol: machine_code.copies(body) for symbol, body in (code or machine_code.read_ptx(ptx)).items()}

    rows = [("kernel", "threads", "registers", "shared", "stack", "spilled", "16-byte loads", "in inner loops",
             "of all", "mma", "copies before wait", "after", "KB before wait", "after")]
    complaints = []
    for symbol in sorted(resources, key=plain):
        registers, shared, stack, spilled = resources[symbol]
        threads, looped, wide, loads, mma = instructions[symbol]
        name, (before, after) = plain(symbol), copies[symbol]
        before_bytes, after_bytes, blocks = rings[name]
        rows.append((name, threads, registers, shared, stack, spilled, wide, looped, loads, mma, before, after,
                     before_bytes * blocks // 1024, after_bytes * blocks // 1024))
        if spilled:
            complaints.append(f"{name} spills {spilled} bytes")
        if re.search(options.wide, name) and not looped:
            complaints.append(f"{name} has no 16-byte load in an inner loop")
        if before_bytes and not before:
            complaints.append(f"{name} has no copy before the wait, but kernels/cuda/rings.h says {before_bytes} bytes")
        if options.check and re.search(options.weights, name) and before_bytes * blocks < LEAST_IN_FLIGHT:
            complaints.append(f"{name} asks for {before_bytes * blocks} bytes a multiprocessor before the wait; "
                              f"{LEAST_IN_FLIGHT} are the least")
    print_table(rows)
    where = "machine code" if code else "PTX, for there is no cuobjdump"
    print(f"\nCopies are those in the {where}, loops once; KB are a multiprocessor's.")
    return complaints


def list_launches(options, folder):
    launches, complaints = launches_a_layer(folder), []
    if launches is None:
        print("Launches a layer: dejavu-bench is not built here.")
        return complaints
    for tier, batch, count in launches:
        print(f"Launches a layer of a decode step, {tier}, {batch} rows: {count:g}")
        if options.check and batch == 1 and count > MOST_LAUNCHES:
            complaints.append(f"a step at one row, {tier}, takes {count:g} launches a layer, "
                              f"more than {MOST_LAUNCHES}")
    return complaints


def main():
    parser = argparse.ArgumentParser(prog="./run gpu-kernels", description=__doc__)
    parser.add_argument("--arch", default="90", help="compute capability without its dot (default: 90)")
    parser.add_argument("--wide", default="^(Linear|Sum|Attention|ReadSum)", metavar="REGEX",
                        help="kernels that must read 16 bytes at once in an inner loop (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="hold the kernels against what decoding at the memory's "
                        "speed needs")
    parser.add_argument("--weights", default="^(Linear|Sum)(F16|BF16|I8)", metavar="REGEX",
                        help="kernels that --check expects to read ahead (default: %(default)s)")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        try:
            complaints = list_kernels(options, pathlib.Path(folder)) + list_launches(options, pathlib.Path(folder))
        except subprocess.CalledProcessError as error:
            sys.exit(f"kernel_table: {error.cmd[0]} failed with {error.returncode}\n{error.stderr or ''}")
    for complaint in complaints:
        print(f"FAILED: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
