"""dejavud and its peers side by side, on the same checkpoint, prompt and threads; `./run compare` starts it.

One system computes at a time. Cell by cell, the memory's bandwidth is probed before and after; a ratio is formed only of two
sides that met the same. The lines of the table are measured in the order of their use, in rounds, until the time is up. What
was measured is kept: another start goes on there. Weights are random: dense work is compared, never text.
"""
import argparse
import contextlib
import datetime
import json
import os
import pathlib
import signal
import sys
import time

import report
import systems
from samples import Cell, Line, Samples, compare, unreadable_ms
from systems import Failed, TookTooLong

OURS = "dejavud"
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
# Most useful first: where the time does not suffice, the last ones are missing. The first ones are what others are set against.
LINES = [Line("shape", OURS, "bf16"), Line("shape", OURS, "int8"), Line("shape", "transformers", "bf16"),
         Line("shape", "ctranslate2", "int8"), Line("shape", OURS, "int8", "balanced"), Line("shape", "ctranslate2", "bf16"),
         Line("shape", "openvino", "int8"), Line("shape", "openvino", "bf16"), Line("shape", OURS, "bf16", "balanced"),
         Line("embedded", OURS, "fp16"), Line("embedded", "transformers", "bf16"), Line("shape", OURS, "int8", "exact"),
         Line("shape", OURS, "bf16", "exact"), Line("shape", "ctranslate2", "fp32"), Line("shape", "transformers", "fp32"),
         Line("embedded", "transformers", "fp32")]
SHOWN = [OURS, "transformers", "openvino", "ctranslate2"]  # the order of the table
ROW_S, ROW_SHARE = 150, 0.1  # what a line gets in a round, loading too: so long, or that share of the time if it is more
REPEATS = 2                  # of a pair that met different bandwidths, in each round
LEAST_S = 5                  # no measurement is begun with less time left


def say(text):
    print(text, file=sys.stderr, flush=True)


def cells(line):
    """Batch 16 comes last: it may take a peer so long that the process has to be stopped."""
    decode = [Cell("decode", 1), Cell("decode", 4), Cell("decode", 16)]
    if line.model == "embedded":
        return decode[:1]
    return [*decode[:2], Cell("prefill", 1), decode[2]] if line.tier == "dense" else decode


def counterpart(line):
    """Ours of the same width, or of the widest."""
    ours = [each for each in LINES if (each.model, each.system, each.tier) == (line.model, OURS, "dense")]
    same = [each for each in ours if WIDTH[each.dtype] == WIDTH[line.dtype]]
    return same[0] if same else max(ours, key=lambda each: WIDTH[each.dtype])


class TimeIsUp(Exception):
    pass


class Comparison:
    """`open_session(line, timeout_s)` and `bandwidth(fresh)` are systems.py's, or a test's. `weight_bytes(line)`: what a dense
    step reads. `show(line)` is called when a line may have new figures, `save()` after each measurement."""

    def __init__(self, lines, samples, rounds, budget_s, open_session, bandwidth, weight_bytes, show, save,
                 clock=time.monotonic):
        self.lines, self.samples, self.rounds = list(lines), samples, rounds
        self.open_session, self.bandwidth, self.weight_bytes = open_session, bandwidth, weight_bytes
        self.show, self.save, self.clock = show, save, clock
        self.row_budget_s, self.until = max(ROW_S, ROW_SHARE * budget_s), clock() + budget_s
        self.row_until = self.until
        self.reasons, self.too_slow = {}, set()  # by (line, cell); the cell is None where the line is missing

    # --- what is known

    def result(self, line, cell):
        ours = self.samples.of(counterpart(line), cell)
        return compare(ours if line == counterpart(line) else self.samples.of(line, cell), ours)

    def notes(self):
        """What peers say of themselves, and why something is missing."""
        said = {f"{label(line)}: {text}": None for line in LINES for each in self.samples.of(line) for text in each["notes"]}
        reasons = [f"{label(line)}: {what(cell)}{text}" for (line, cell), text in self.reasons.items()
                   if not self.samples.of(line, cell)]
        missing = [f"{label(line)}: {', '.join(map(name, untried))}" for line in self.lines if (untried := [
            cell for cell in cells(line) if not self.samples.of(line, cell) and (line, cell) not in self.reasons])]
        return list(said) + reasons + ([f"Not measured in the time: {'; '.join(missing)}"] if missing else [])

    def expected_s(self, line, cell):
        """Of a measurement: what it took before, or at least what the prompt of a single row says."""
        before = self.samples.of(line, cell)
        if before:
            return before[-1]["cost_s"]
        single = [each["first_ms"] for each in self.samples.of(line, Cell("decode", 1)) if "first_ms" in each]
        if not single or cell == Cell("decode", 1):
            return LEAST_S
        rows = cell.batch if cell.phase == "decode" else systems.PREFILL_TOKENS / systems.PROMPT_TOKENS
        return max(LEAST_S, 1e-3 * single[-1] * rows)

    def tries_left(self, line, cell, turn):
        return max(0, REPEATS * turn - len(self.samples.of(line, cell, 0))) if self.result(line, cell).words else 0

    # --- measuring

    def check_time(self):
        if self.until - self.clock() < LEAST_S:
            raise TimeIsUp

    def measure(self, session, line, cell, turn):
        """Whether there is a new sample."""
        self.check_time()
        if not self.fits(line, cell):
            return False
        row_s, before, start = self.row_s(), self.bandwidth(fresh=False), self.clock()
        try:
            measured = session.measure(cell, max(LEAST_S, row_s))
        except Failed as error:
            self.reasons[line, cell] = str(error)
            return False
        except TookTooLong:
            self.check_time()
            self.too_slow.add((line, cell))
            self.reasons[line, cell] = f"stopped after {row_s:.0f} s"
            raise
        cost_s, met = self.clock() - start, [before, self.bandwidth(fresh=True)]
        least_ms = unreadable_ms(self.weight_bytes(line), met) if line.tier == "dense" and cell.phase == "decode" else 0.0
        if measured["ms"] <= least_ms:
            self.reasons[line, cell] = f"{measured['ms']:g} ms is less than reading the weights takes"
            return False
        self.samples.add(line, cell, turn, {
            **measured, "version": session.version, "bandwidth": met, "cost_s": cost_s,
            "notes": [*session.notes, *measured["notes"]], "date": datetime.datetime.now().isoformat(timespec="seconds")})
        self.save()
        return True

    def row_s(self):
        return min(self.row_until, self.until) - self.clock()

    def fits(self, line, cell):
        """Whether a measurement can end in what is left of the row's time."""
        expected_s = self.expected_s(line, cell)
        if expected_s > self.row_budget_s:
            self.reasons[line, cell] = f"it would take {expected_s:.0f} s and more"
        return expected_s <= self.row_s() and (line, cell) not in self.too_slow

    @contextlib.contextmanager
    def session(self, line):
        self.check_time()
        session, row_s = None, max(LEAST_S, self.row_s())
        try:
            session = self.open_session(line, row_s)
            yield session
        except TookTooLong:
            if session is None:
                self.reasons[line, None] = f"not ready after {row_s:.0f} s"
            raise
        finally:
            if session is not None:
                session.close()

    def visit(self, line, turn):
        """Measures what is missing of a line in this round."""
        missing = [cell for cell in cells(line) if not self.samples.of(line, cell, turn) and self.fits(line, cell)]
        if missing:
            say(f"round {turn} of {self.rounds}: {label(line)} {line.tier}; {(self.until - self.clock()) / 60:.1f} min left")
            with self.session(line) as session:
                for cell in missing:
                    self.measure(session, line, cell, turn)

    def again(self, line, turn):
        """Measures pairs again, side by side, whose sides met different bandwidths."""
        ours = counterpart(line)
        apart = [cell for cell in cells(line) if self.tries_left(line, cell, turn)]
        if not apart:
            return
        say(f"again: {label(line)} {line.tier}, which met another bandwidth; {(self.until - self.clock()) / 60:.1f} min left")
        with self.session(line) as session, self.session(ours) as our_session:
            for cell in apart:
                while self.tries_left(line, cell, turn) and self.measure(session, line, cell, 0):
                    if self.result(line, cell).words:  # still none of ours that met the same
                        self.measure(our_session, ours, cell, 0)

    def run(self):
        """Until everything is measured or the time is up, which False says."""
        try:
            for turn in range(1, self.rounds + 1):
                for work in (self.visit, self.again):
                    for line in list(self.lines):
                        self.attempt(work, line, turn)
        except TimeIsUp:
            return False
        return True

    def attempt(self, work, line, turn):
        self.row_until, known = self.clock() + self.row_budget_s, len(self.samples.records)
        try:
            work(line, turn)
        except Failed as error:
            self.reasons[line, None] = str(error)
            self.lines.remove(line)
        except TookTooLong:
            self.check_time()
        finally:
            if len(self.samples.records) > known or (work == self.visit and turn == 1):
                self.show(line)


def name(cell):
    return "prefill" if cell.phase == "prefill" else f"batch {cell.batch}"


def what(cell):
    return f"{name(cell)} is left out: " if cell else "left out: "


def label(line):
    return f"{report.NAMES[line.system]} {line.dtype}" + (", embedded model" if line.model == "embedded" else "")


class Program:
    """The command: its arguments, the systems that run here, and what is shown and written."""

    def __init__(self, arguments):
        self.arguments, self.tokens = arguments, 16 if arguments.quick else arguments.tokens
        self.processor, self.flags = systems.processor()
        self.machine = systems.Machine(arguments.bin, arguments.work, arguments.threads)
        self.version = systems.tree()
        context = {"model": arguments.model, "threads": arguments.threads, "tokens": self.tokens, "quick": arguments.quick,
                   "tree": self.version, "program": systems.digest(self.machine.bench), "peers": systems.digest(systems.PEER),
                   "requirements": systems.digest(systems.REQUIREMENTS), "processor": self.processor, "flags": self.flags}
        self.samples = Samples(arguments.work / "samples", context, arguments.fresh)
        self.checkpoints = {"shape": self.machine.write_checkpoint(arguments.model), "embedded": systems.EMBEDDED}

    def peer_work(self, line):
        return self.arguments.work / "peers" / (self.checkpoints[line.model].name)

    def open_session(self, line, timeout_s):
        checkpoint = self.checkpoints[line.model]
        if line.system == OURS:
            synthetic = line.model == "shape" and line.tier != "dense"
            return systems.Bench(self.machine, self.arguments.model if synthetic else checkpoint, line, self.tokens,
                                 self.version)
        return systems.Peer(self.machine, line, checkpoint, self.peer_work(line), self.tokens, timeout_s)

    def weight_bytes(self, line):
        """The checkpoint's files hold two bytes for each weight."""
        files = self.checkpoints[line.model].glob("*.safetensors")
        return sum(file.stat().st_size for file in files) // 2 * WIDTH[line.dtype]

    def prepare(self, line):
        """Why a peer cannot run here; None where it can."""
        try:
            systems.prepare_peer(self.machine, line, self.checkpoints[line.model], self.peer_work(line))
        except Failed as error:
            return str(error)

    def results(self, line):
        return {cell: self.comparison.result(line, cell) for cell in cells(line)}

    def row(self, line):
        records = self.samples.of(line)
        version = records[-1]["version"] if records and line.system != OURS else ""
        return report.row(line, version, self.results(line))

    def table(self):
        lines = [line for line in sorted(LINES, key=lambda each: (each.model != "shape", SHOWN.index(each.system)))
                 if self.samples.of(line)]
        return "\n".join([report.heading(systems.PREFILL_TOKENS), *map(self.row, lines)])

    def opening(self):
        """What holds for the whole table."""
        settings = {"--quick": self.arguments.quick, "--rounds": self.arguments.rounds != 2 and self.arguments.rounds,
                    "--tokens": self.arguments.tokens != 32 and self.arguments.tokens,
                    "--threads": self.arguments.threads != 2 and self.arguments.threads,
                    "--model": self.arguments.model != MODEL and self.arguments.model}
        command = " ".join(["./run compare"] + [f"{key} {value}" if value is not True else key
                                                for key, value in settings.items() if value])
        days = sorted({record["date"][:10] for record in self.samples.records})
        return (f"`{command}`, {' to '.join(days[::max(1, len(days) - 1)])}, dejavud {self.version}, on {self.processor} "
                f"({' '.join(self.flags)}), {self.arguments.threads} threads. Weights are random, in the shape of "
                f"{self.arguments.model.split(':')[1]}. The figures are ms per decode step after a prompt of "
                f"{systems.PROMPT_TOKENS} tokens, and ms of a prefill; medians of {self.rounds()} rounds. `x` is the time "
                "against our dense tier at the same width of weights, of pairs that met the same memory bandwidth. `GB/s` is "
                "the least and the most of the bandwidth that the row's measurements met.")

    def rounds(self):
        return 1 if self.arguments.quick else self.arguments.rounds

    def save(self):
        if self.arguments.json is None:
            return
        rows = [{**line._asdict(), **cell._asdict(), **result._asdict(), "samples": self.samples.of(line, cell)}
                for line in LINES for cell, result in self.results(line).items() if result.ms is not None]
        document = {**vars(self.arguments), "processor": self.processor, "flags": self.flags, "tree": self.version,
                    "notes": self.comparison.notes(), "rows": rows}
        aside = self.arguments.json.with_name(self.arguments.json.name + ".tmp")
        aside.write_text(json.dumps(document, indent=1, default=str) + "\n")
        os.replace(aside, self.arguments.json)

    def run(self):
        """Whether the time was enough."""
        refused = {line: why for line in LINES if line.system != OURS and (why := self.prepare(line)) is not None}
        able = [line for line in LINES if line not in refused]
        self.comparison = Comparison(able, self.samples, self.rounds(), 60 * self.arguments.minutes, self.open_session,
                                     self.machine.bandwidth, self.weight_bytes, self.print_row, self.save)
        self.comparison.reasons.update({(line, None): why for line, why in refused.items()})
        print(report.heading(systems.PREFILL_TOKENS), flush=True)
        done = self.comparison.run()
        self.save()
        text = report.whole(self.opening(), self.table(), self.comparison.notes()) if self.samples.records else ""
        print(f"\n{text}")
        if self.arguments.write_docs is not None:
            report.write(self.arguments.write_docs, text)
        return done

    def print_row(self, line):
        if self.samples.of(line):
            print(self.row(line), flush=True)


MODEL = "synthetic:opt-1.3b"


def arguments():
    parser = argparse.ArgumentParser(prog="./run compare", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=25, help="that it may measure (default: 25); another start goes on")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured with the same settings")
    parser.add_argument("--write-docs", type=pathlib.Path, nargs="?", const=systems.ROOT / "docs/benchmarks/comparison.md",
                        metavar="FILE", help="also write the table into docs/benchmarks/comparison.md, or another page")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file, as they come")
    parser.add_argument("--quick", action="store_true", help="one round of 16 tokens: whether it works, not how fast")
    parser.add_argument("--rounds", type=int, default=2, help="in which everything is measured once (default: 2)")
    parser.add_argument("--tokens", type=int, default=32, help="that each request generates (default: 32)")
    parser.add_argument("--threads", type=int, default=2, help="of everybody (default: 2)")
    parser.add_argument("--model", default=MODEL, help="whose shape the checkpoint has (default: %(default)s)")
    parser.add_argument("--bin", type=pathlib.Path, default=systems.ROOT / "build/release/bin", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=pathlib.Path, default=systems.ROOT / "build/compare", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.model.startswith("synthetic:"):
        parser.error(f"--model {options.model}: a synthetic model is wanted, such as synthetic:opt-1.3b")
    for key, least in (("threads", 1), ("rounds", 1), ("tokens", 8)):
        if getattr(options, key) < least:
            parser.error(f"--{key} {getattr(options, key)}: at least {least}")
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes:g}: more than 0")
    if options.json is not None and not options.json.resolve().parent.is_dir():
        parser.error(f"--json {options.json}: no such directory")
    if options.write_docs is not None:
        try:
            report.parts(options.write_docs)
        except (OSError, ValueError) as error:
            parser.error(f"--write-docs: {error}")
    options.work.mkdir(parents=True, exist_ok=True)
    return options


def main():
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if not Program(arguments()).run():
            say("The time was up before everything was measured. The same command goes on where this one stopped.")
    except KeyboardInterrupt:
        say("\nStopped. What was measured is kept: the same command goes on there; --fresh begins anew.")
        sys.exit(130)


if __name__ == "__main__":
    main()
