#!/usr/bin/env python3
"""Measures dejavud on this machine's GPU. All parts, or those that are named:
  bandwidth  what the GPU reads of its memory
  decode     ms of a decode step by model, batch, context and tier, and the GPU's gaps between steps
  launches   what a decode step launches: bytes, us alone and in the chain, share of what the GPU reads
  peer       a decode step of Transformers of the same shape, where torch and transformers are installed (--peer-python)
  prefill    how fast prompts go through
  serve      the daemon end to end: what it adds to a token
The report holds what was found by then after every part, also when it is interrupted."""
import argparse
import datetime
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import machine
import peer

PARTS = ("bandwidth", "decode", "launches", "peer", "prefill", "serve")
# hidden size, layers
SHAPES = {"synthetic:opt-6.7b": (4096, 32), "synthetic:opt-13b": (5120, 40), "synthetic:opt-30b": (7168, 48),
          "synthetic:opt-66b": (9216, 64)}
SIZE = {"bf16": 2, "fp16": 2, "int8": 1, "stored": 2}
VOCABULARY, CONTEXT, MOST_STEPS = 50272, 2048, 128
# Of the parts launches and peer.
STEP_BATCHES, STEP_CONTEXT, STEP_TIERS = (1, 4, 16), 512, ("dense", "exact", "balanced")
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

    def fitting(self, part, model, dtype, batches, window):
        """Those batches for which the GPU has the memory."""
        room = self.memory() - BESIDES
        fit = [b for b in batches if model not in SHAPES or bytes_of(model, dtype, b, window) <= room]
        for batch in sorted(set(batches) - set(fit)):
            self.leave_out(f"{part} of {model}, batch {batch}, context {window}: more than the GPU's memory")
        return fit

    def decode(self):
        o = self.options
        window = min(max(o.context) + MOST_STEPS, CONTEXT)
        for model in o.model:
            if fit := self.fitting("decode", model, o.dtype, o.batch, window):
                self.run("decode", "--model", model, "--dtype", o.dtype, "--batch", ",".join(map(str, fit)),
                         "--context", ",".join(map(str, o.context)), "--repeats", o.repeats)

    def launches(self):
        o = self.options
        for model in o.model:
            if fit := self.fitting("launches", model, o.dtype, STEP_BATCHES, STEP_CONTEXT):
                tiers = STEP_TIERS if model.startswith("synthetic:") else STEP_TIERS[:2]  # others may have no predictor
                self.run("launches", "--model", model, "--dtype", o.dtype, "--batch", ",".join(map(str, fit)),
                         "--context", STEP_CONTEXT, "--tier", ",".join(tiers), "--repeats", o.repeats)

    def peer(self):
        for model in self.options.model:
            if model not in SHAPES:
                self.leave_out(f"peer of {model}: its shape is not known here")
            elif fit := self.fitting("peer", model, "bf16", STEP_BATCHES, STEP_CONTEXT):
                if not self.run_peer(model, fit):
                    break
        print_beside(self.report)

    def run_peer(self, model, batches):
        """False where there is no peer here."""
        hidden, layers = SHAPES[model]
        python = self.options.peer_python or shutil.which("python3")
        with tempfile.TemporaryDirectory() as folder:
            figures = pathlib.Path(folder) / "figures.json"
            command = [python, machine.HERE / "peer.py", "--hidden", hidden, "--layers", layers, "--vocabulary",
                       VOCABULARY, "--batch", ",".join(map(str, batches)), "--context", STEP_CONTEXT, "--json", figures]
            print(f"\n== Transformers, {model}", flush=True)
            code = subprocess.run([*map(str, command)]).returncode
            if code == peer.ABSENT:
                self.leave_out("peer: Transformers is not here")
                return False
            if code != 0:
                self.report["failed"].append({"command": ["peer", model], "exit_code": code})
            else:
                self.report.setdefault("peer", []).append({"model": model, **json.loads(figures.read_text())})
        self.write()
        return True

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


def print_beside(report):
    """Our steps beside the peer's, as far as both were measured; ratios to its recorded step."""
    ours = {(step["model"], step["batch"], step["tier"]): step["us"] / 1000
            for part in report.get("launches", ()) for step in part["steps"]}
    rows = [(part["model"], row, [ours.get((part["model"], row["batch"], tier)) for tier in STEP_TIERS])
            for part in report.get("peer", ()) for row in part["rows"]]
    if not rows:
        return
    print(f"\nms of a decode step, context {STEP_CONTEXT}; in brackets: how much faster than Transformers recorded")
    print("".join(text.rjust(18) for text in ("model", "batch", *STEP_TIERS, "eager", "recorded")))
    for model, row, times in rows:
        cells = [f"{ms:.2f} ({row['recorded_ms'] / ms:.2f} x)" if ms else "-" for ms in times]
        print("".join(text.rjust(18) for text in (model.removeprefix("synthetic:"), str(row["batch"]), *cells,
                                                  f"{row['eager_ms']:.2f}", f"{row['recorded_ms']:.2f}")))


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
    parser.add_argument("--peer-python", metavar="PATH", help="a Python that has torch and transformers (default: "
                        "python3)")
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
        print(f"FAILED: {' '.join(failure['command'])}", file=sys.stderr)
    return 1 if bench.report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
