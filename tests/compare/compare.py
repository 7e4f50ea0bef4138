"""dejavud and its peers side by side, on the same checkpoint, prompt and threads; `./run compare` starts it.

Everything runs in processes of its own, one at a time, in rounds, so that what neighbours do to the machine meets all.
Figures are medians over all rounds. Weights are random: dense work is compared, never text.
"""
import argparse
import datetime
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
PEERS = [("transformers", "bf16"), ("transformers", "fp32"), ("openvino", "bf16"), ("openvino", "int8"),
         ("ctranslate2", "bf16"), ("ctranslate2", "int8"), ("ctranslate2", "fp32")]
NAMES = {"transformers": "Transformers", "openvino": "OpenVINO", "ctranslate2": "CTranslate2"}
OURS = "dejavud"
SAMPLE_S = 20  # what takes a peer longer is measured less often
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}


def say(text):
    print(text, file=sys.stderr, flush=True)


class Table:
    """Samples in ms by (system, version, dtype, tier, synthetic, phase, batch)."""

    def __init__(self):
        self.samples, self.notes = {}, []

    def add(self, key, samples):
        self.samples.setdefault(key, []).extend(samples)

    def note(self, text):
        if text not in self.notes:
            self.notes.append(text)

    def rows(self):
        keys = ("system", "version", "dtype", "tier", "synthetic", "phase", "batch")
        return [dict(zip(keys, key), ms=statistics.median(samples), ms_least=min(samples), ms_most=max(samples),
                     samples=len(samples)) for key, samples in self.samples.items()]


class Comparison:
    def __init__(self, arguments):
        self.bench, self.threads, self.work = arguments.bin / "dejavu-bench", arguments.threads, arguments.work
        self.rounds, self.repeats, self.tokens = (1, 2, 16) if arguments.quick else (arguments.rounds, 2, arguments.tokens)
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads),
                            "OMP_PROC_BIND": "true", "OMP_PLACES": "cores", "HF_HUB_OFFLINE": "1",
                            "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
        self.version = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True,
                                      text=True).stdout.strip() or "?"

    def run(self, command, **options):
        cpus = sorted(os.sched_getaffinity(0))[:self.threads]
        return subprocess.run([str(part) for part in command], env=self.environment, text=True,
                              preexec_fn=lambda: os.sched_setaffinity(0, cpus), **options)

    def write_checkpoint(self, model):
        """The checkpoint that everybody reads. Written once: its name is the last thing that it gets."""
        target = self.work / model.replace(":", "-")
        if not target.exists():
            aside = target.with_suffix(".tmp")
            shutil.rmtree(aside, ignore_errors=True)
            self.run([self.bench, "checkpoint", "--model", model, "--dtype", "bf16", "--out", aside], check=True)
            aside.rename(target)
        return target

    def peer(self, action, system, dtype, checkpoint, work, *settings):
        command = [sys.executable, ROOT / "tests/compare/peer.py", action, system, dtype, checkpoint, work, *settings]
        done = self.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if done.returncode == 0:
            return done.stdout, None
        return None, (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]

    def prepare(self, peers, checkpoint, work, table):
        """Those of the peers that can run here."""
        work.mkdir(parents=True, exist_ok=True)
        versions = (ROOT / "tests/compare/requirements.txt").read_text()
        able = []
        for system, dtype in peers:
            stamp = work / f"{system}-{dtype}.ready"
            if not stamp.exists() or stamp.read_text() != versions:
                say(f"preparing {NAMES[system]} {dtype}")
                _, error = self.peer("prepare", system, dtype, checkpoint, work)
                if error is not None:
                    table.note(f"{NAMES[system]} {dtype}: left out: {error}")
                    continue
                stamp.write_text(versions)
            able.append((system, dtype))
        return able

    def measure_peer(self, system, dtype, checkpoint, work, batches, prefill, table):
        vocabulary = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
        settings = {"threads": self.threads, "batches": batches, "prompt": 64, "tokens": self.tokens, "prefill": prefill,
                    "repeats": self.repeats, "vocabulary": vocabulary, "sample_s": SAMPLE_S}
        out, error = self.peer("measure", system, dtype, checkpoint, work, json.dumps(settings))
        if error is not None:
            table.note(f"{NAMES[system]} {dtype}: left out: {error}")
            return
        result = json.loads(out.splitlines()[-1])
        for note in result["notes"]:
            table.note(f"{NAMES[system]} {dtype}: {note}")
        for batch, samples in result["decode"].items():
            table.add((NAMES[system], result["version"], dtype, "dense", False, "decode", int(batch)), samples)
        if prefill:
            table.add((NAMES[system], result["version"], dtype, "dense", False, "prefill", 1), result["prefill"])

    def bench_rows(self, *arguments):
        report = self.work / "bench.json"
        self.run([self.bench, *arguments, "--threads", self.threads, "--repeats", self.repeats, "--json", report],
                 check=True, stdout=subprocess.DEVNULL)
        return json.loads(report.read_text())["rows"]

    def measure_ours(self, model, dtype, tiers, batches, prefill, table):
        """Some steps around the middle of the peers' tokens; sampling counts, since their figures hold it too."""
        steps = min(self.tokens - 1, 16)
        for row in self.bench_rows("decode", "--model", model, "--dtype", dtype, "--tier", ",".join(tiers), "--batch",
                                   ",".join(map(str, batches)), "--context", 64 + (self.tokens - steps) // 2,
                                   "--steps", steps):
            if row["tier"] in tiers:
                samples = [ms + row["breakdown_ms"]["sampling"] for ms in row["samples_ms"]]
                table.add((OURS, self.version, row["dtype"], row["tier"], row["synthetic"], "decode", row["batch"]), samples)
        if prefill:
            for row in self.bench_rows("prefill", "--model", model, "--dtype", dtype, "--tokens", prefill):
                table.add((OURS, self.version, row["dtype"], "dense", False, "prefill", 1), row["samples_ms"])

    def compare(self, model, table, save):
        """`save` is called after each measurement: what was measured survives an interruption."""
        batches, checkpoint = [1, 4, 16], self.write_checkpoint(model)
        work = self.work / "peers"
        able = self.prepare(PEERS, checkpoint, work, table)
        for turn in range(self.rounds):
            for dtype in ("bf16", "int8"):
                say(f"round {turn + 1} of {self.rounds}: {OURS} {dtype}")
                self.measure_ours(checkpoint, dtype, ["dense"], batches, 512, table)
                self.measure_ours(model, dtype, ["exact", "balanced"], batches, 0, table)
                save()
            for system, dtype in able:
                say(f"round {turn + 1} of {self.rounds}: {NAMES[system]} {dtype}")
                self.measure_peer(system, dtype, checkpoint, work, batches, 512, table)
                save()

    def compare_embedded(self, model, table, save):
        peers = [("transformers", "fp32"), ("transformers", "bf16")]
        able = self.prepare(peers, model, self.work / "embedded", table)
        for turn in range(self.rounds):
            say(f"round {turn + 1} of {self.rounds}: embedded model")
            self.measure_ours(model, "stored", ["dense"], [1], 0, table)
            for system, dtype in able:
                self.measure_peer(system, dtype, model, self.work / "embedded", [1], 0, table)
            save()


def show(rows, title):
    """One line for each system, dtype and tier: ms, and how many times the time of our dense tier at the same width."""
    columns = [("decode", 1), ("decode", 4), ("decode", 16), ("prefill", 1)]
    columns = [c for c in columns if any((r["phase"], r["batch"]) == c for r in rows)]
    lines = {}
    for row in rows:
        lines.setdefault((row["system"], row["version"], row["dtype"], row["tier"], row["synthetic"]), {})[
            row["phase"], row["batch"]] = row["ms"]
    ours = {WIDTH[key[2]]: values for key, values in lines.items() if key[0] == OURS and key[3] == "dense"}
    heads = {"decode": "batch {}", "prefill": "prefill 512"}
    print(f"\n{title}\n\n| system | weights | tier | " + " | ".join(f"{heads[p].format(b)}, ms | x ours" for p, b in columns) + " |")
    print("|---" * (3 + 2 * len(columns)) + "|")
    for (system, version, dtype, tier, synthetic), values in lines.items():
        against = ours.get(WIDTH[dtype]) or ours[max(ours)]
        cells = []
        for column in columns:
            ms = values.get(column)
            cells.append(f"{ms:.2f} | {ms / against[column]:.2f}" if ms is not None else " | ")
        label = f"{tier.upper()}{' (synthetic)' if synthetic else ''}"
        print(f"| {system} {version} | {dtype} | {label} | " + " | ".join(cells) + " |")


def processor():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown processor"


def main():
    parser = argparse.ArgumentParser(prog="./run compare", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="one round of 16 tokens: whether it works, not how fast")
    parser.add_argument("--rounds", type=int, default=3, help="of two measurements each (default: 3)")
    parser.add_argument("--tokens", type=int, default=64, help="that each request generates (default: 64)")
    parser.add_argument("--threads", type=int, default=2, help="of everybody (default: 2)")
    parser.add_argument("--model", default="synthetic:opt-1.3b", help="whose shape the checkpoint has (default: %(default)s)")
    parser.add_argument("--bin", type=pathlib.Path, default=ROOT / "build/release/bin", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "build/compare", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.model.startswith("synthetic:"):
        parser.error(f"--model {arguments.model}: a synthetic model is wanted, such as synthetic:opt-1.3b")
    if arguments.threads < 1:
        parser.error(f"--threads {arguments.threads}: at least 1")
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: at least 1")
    if arguments.tokens < 2:
        parser.error(f"--tokens {arguments.tokens}: at least 2")
    if arguments.json is not None and not arguments.json.resolve().parent.is_dir():
        parser.error(f"--json {arguments.json}: no such directory")
    arguments.work.mkdir(parents=True, exist_ok=True)
    comparison, table, embedded = Comparison(arguments), Table(), Table()
    date = datetime.date.today().isoformat()

    def save():
        if arguments.json is not None:
            document = {"processor": processor(), "threads": arguments.threads, "date": date, "model": arguments.model,
                        "quick": arguments.quick, "notes": table.notes + embedded.notes, "rows": table.rows(),
                        "embedded": embedded.rows()}
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")

    comparison.compare_embedded(ROOT / "deploy/models/opt-8m-books", embedded, save)
    comparison.compare(arguments.model, table, save)

    print(f"{processor()}, {arguments.threads} threads, {date}. ms per decode step after a prompt of 64 tokens, {comparison.tokens} greedy tokens; ms of a prefill."
          f" Medians of {comparison.rounds * comparison.repeats}.")
    show(table.rows(), f"Random weights in the shape of {arguments.model.split(':')[1]}: dense work is compared. Tiers marked synthetic"
               " read what the generated density profile activates.")
    show(embedded.rows(), "The embedded model, opt-8m-books")
    for note in table.notes + embedded.notes:
        print(f"- {note}")


if __name__ == "__main__":
    main()
