#!/usr/bin/env python3
"""Measures dejavud on this machine's GPU. All parts, or those that are named:
  bandwidth  what the GPU reads of its memory
  decode     ms of a decode step by model, batch, context and tier, and the GPU's gaps between steps
  prefill    how fast prompts go through
  serve      the daemon end to end: what it adds to a token
The report holds what was found by then after every part, also when it is interrupted."""
import argparse
import datetime
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import machine

PARTS = ("bandwidth", "decode", "prefill", "serve")
# hidden size, layers
SHAPES = {"synthetic:opt-6.7b": (4096, 32), "synthetic:opt-13b": (5120, 40), "synthetic:opt-30b": (7168, 48),
          "synthetic:opt-66b": (9216, 64)}
SIZE = {"bf16": 2, "fp16": 2, "int8": 1, "stored": 2}
VOCABULARY, CONTEXT, MOST_STEPS = 50272, 2048, 128
BESIDES = 4 << 30  # bytes: the probe, activations, CUDA itself, graphs


def bytes_of(model, dtype, batch, window):
    """Of weights, predictor, and keys and values, about."""
    hidden, layers = SHAPES[model]
    weights = (12 * hidden * layers + VOCABULARY + CONTEXT) * hidden * SIZE[dtype]
    return int(1.03 * weights) + 2 * 2 * batch * window * layers * hidden


class Clocks:
    """What nvidia-smi saw once a second while a program ran."""

    def __enter__(self):
        self.file = tempfile.TemporaryFile("w+")
        try:
            self.process = subprocess.Popen(
                ["nvidia-smi", f"--query-gpu={','.join(machine.STATE)}", "--format=csv,noheader,nounits", "--id=0",
                 "--loop-ms=1000"], stdout=self.file, stderr=subprocess.DEVNULL)
        except OSError:
            self.process = None
        return self

    def __exit__(self, *_):
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    def summary(self):
        self.file.seek(0)
        columns = {field: [] for field in machine.STATE}
        for line in self.file:
            for field, value in zip(machine.STATE, line.split(",")):
                try:
                    columns[field].append(float(value))
                except ValueError:
                    pass  # such as [N/A]
        return {field: {"least": min(values), "median": statistics.median(values), "most": max(values)}
                for field, values in columns.items() if values}


class Bench:
    def __init__(self, options):
        self.options = options
        self.report = {
            "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": machine.commit(),
            "command": sys.argv[1:],
            "gpu": machine.query(machine.FACTS),
            "at_rest": machine.query(machine.STATE),
            "left_out": [],
            "failed": [],
        }
        for name in ("commit", "gpu"):
            print(f"{name}: {self.report[name]}")

    def write(self):
        if self.options.json:
            beside = self.options.json.with_name(self.options.json.name + ".new")
            beside.write_text(json.dumps(self.report, indent=1) + "\n")
            beside.rename(self.options.json)

    def run(self, part, *arguments):
        """dejavu-bench; what it wrote, or None where it failed."""
        arguments = [part, "--device", "cuda", *map(str, arguments)]
        print(f"\n== dejavu-bench {' '.join(arguments)}", flush=True)
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            figures = pathlib.Path(folder) / "figures.json"
            with Clocks() as clocks:
                code = subprocess.run([machine.BIN / "dejavu-bench", *arguments, "--json", figures]).returncode
            if code != 0:
                self.report["failed"].append({"command": arguments, "exit_code": code})
                self.write()
                return None
            found = {"command": arguments, "seconds": round(time.monotonic() - start, 1), "clocks": clocks.summary(),
                     **json.loads(figures.read_text())}
        self.report.setdefault(part, []).append(found)
        self.write()
        return found

    def leave_out(self, what):
        print(f"left out: {what}")
        self.report["left_out"].append(what)

    def memory(self):
        return int(self.report["gpu"].get("memory.total", "0").split()[0]) << 20

    def bandwidth(self):
        self.run("bandwidth", "--repeats", 5 if self.options.quick else 15, "--buffer-mib", 4096)

    def decode(self):
        o = self.options
        window = min(max(o.context) + MOST_STEPS, CONTEXT)
        for model in o.model:
            room = self.memory() - BESIDES
            fit = [b for b in o.batch if model not in SHAPES or bytes_of(model, o.dtype, b, window) <= room]
            for batch in sorted(set(o.batch) - set(fit)):
                self.leave_out(f"{model}, batch {batch}, context {max(o.context)}: more than the GPU's memory")
            if fit:
                self.run("decode", "--model", model, "--dtype", o.dtype, "--batch", ",".join(map(str, fit)),
                         "--context", ",".join(map(str, o.context)), "--repeats", o.repeats)

    def prefill(self):
        for model in self.options.model[:1] if self.options.quick else self.options.model:
            if model in SHAPES and bytes_of(model, self.options.dtype, 1, 1024) > self.memory() - BESIDES:
                self.leave_out(f"prefill of {model}: more than the GPU's memory")
                continue
            self.run("prefill", "--model", model, "--dtype", self.options.dtype, "--tokens", "16,128,512,1024",
                     "--repeats", self.options.repeats)

    def serve(self):
        self.run("serve", "--model", self.options.model[0], "--dtype", self.options.dtype, "--repeats",
                 self.options.repeats)


def numbers(text):
    return [int(word) for word in text.split(",")]


def main():
    parser = argparse.ArgumentParser(prog="gpu-bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART")
    parser.add_argument("--quick", action="store_true", help="what fits into ten minutes: opt-6.7b and opt-30b, "
                        "batches 1, 4 and 16, context 512, three repeats")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="the report")
    parser.add_argument("--model", action="append", help="only this one; may be repeated")
    parser.add_argument("--dtype", default="stored", choices=SIZE, help="type of the matrices (default: %(default)s)")
    parser.add_argument("--batch", type=numbers, metavar="N,...", help="default: 1,2,4,8,16")
    parser.add_argument("--context", type=numbers, metavar="N,...", help="default: 128,512,1920")
    parser.add_argument("--repeats", type=int, help="default: 7")
    options = parser.parse_args()
    options.model = options.model or (["synthetic:opt-6.7b", "synthetic:opt-30b"] if options.quick else list(SHAPES))
    options.batch = options.batch or ([1, 4, 16] if options.quick else [1, 2, 4, 8, 16])
    options.context = options.context or ([512] if options.quick else [128, 512, 1920])
    options.repeats = options.repeats or (3 if options.quick else 7)

    machine.check_files()
    # Says what is missing where there is no GPU.
    if subprocess.run([machine.BIN / "dejavu-bench", "bandwidth", "--device", "cuda", "--repeats", "1",
                       "--buffer-mib", "4"], stdout=subprocess.DEVNULL).returncode != 0:
        return 1
    bench = Bench(options)
    for part in options.parts or PARTS:
        getattr(bench, part)()
    bench.write()
    for failure in bench.report["failed"]:
        print(f"FAILED: dejavu-bench {' '.join(failure['command'])}", file=sys.stderr)
    return 1 if bench.report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
