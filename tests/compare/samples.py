"""What was measured: kept on disk as it comes, and set side by side only where both sides met the same memory bandwidth."""
import hashlib
import json
import statistics
import sys
from typing import NamedTuple

MOST_APART = 0.15  # between the highest and the lowest bandwidth that two sides met


class Line(NamedTuple):
    """A line of the table. `model`: "shape" or "embedded"."""
    model: str
    system: str
    dtype: str
    tier: str = "dense"


class Cell(NamedTuple):
    phase: str  # "decode" or "prefill"
    batch: int


class Result(NamedTuple):
    """A cell as it is printed. None: not known. `words` stand in the place of a ratio that must not be formed."""
    ms: float
    ratio: float
    words: str
    bandwidth: tuple  # the lowest and the highest in GB/s that the samples behind `ms` met


class Samples:
    """A file of a line for each measurement, appended as it ends. The file's name holds `context`: what was measured under
    another one (another tree, other peers, another processor) lies in another file and is never seen."""

    def __init__(self, folder, context, fresh=False):
        text = json.dumps(context, sort_keys=True)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        self.records = []
        if fresh:
            self.path.unlink(missing_ok=True)
        if not self.path.exists():
            self.path.write_text(json.dumps({"context": context}) + "\n")
        else:
            self._read()

    def _read(self):
        text = self.path.read_text()
        whole, _, torn = text.rpartition("\n")
        if torn:  # whoever wrote it was killed
            print(f"{self.path}: the last line is not whole; its measurement is made again", file=sys.stderr)
            self.path.write_text(whole + "\n")
        self.records = [json.loads(line) for line in whole.splitlines()[1:]]

    def add(self, line, cell, turn, measured):
        record = {**line._asdict(), **cell._asdict(), "round": turn, **measured}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.records.append(record)

    def of(self, line, cell=None, turn=None):
        wanted = {**line._asdict(), **(cell._asdict() if cell else {}), **({} if turn is None else {"round": turn})}
        return [record for record in self.records if all(record[key] == value for key, value in wanted.items())]


def alike(*records):
    """Whether the bandwidths before and after all of them are the same, give or take."""
    met = [gb_per_s for record in records for gb_per_s in record["bandwidth"]]
    return max(met) <= (1 + MOST_APART) * min(met)


def met(records):
    all_of_them = [gb_per_s for record in records for gb_per_s in record["bandwidth"]]
    return (min(all_of_them), max(all_of_them)) if all_of_them else None


def span(bandwidth):
    low, high = (f"{gb_per_s:.0f}" for gb_per_s in bandwidth)
    return low if low == high else f"{low} to {high}"


def compare(theirs, ours):
    """The result of one side's samples against the other's, which may be the same. A ratio is the median over pairs that met
    the same bandwidth, and the time that is shown is that of the samples in such pairs."""
    if not theirs:
        return Result(None, None, "", None)
    if theirs is ours:
        return Result(statistics.median(each["ms"] for each in ours), 1.0, "", met(ours))
    pairs = [(mine, [its["ms"] for its in ours if alike(mine, its)]) for mine in theirs]
    pairs = [(mine, its) for mine, its in pairs if its]
    if pairs:
        return Result(statistics.median(mine["ms"] for mine, _ in pairs),
                      statistics.median(mine["ms"] / statistics.median(its) for mine, its in pairs), "",
                      met(mine for mine, _ in pairs))
    words = ""
    if ours:
        words = f"no ratio: at {span(met(theirs))} GB/s, ours at {span(met(ours))}"
    return Result(statistics.median(each["ms"] for each in theirs), None, words, met(theirs))


def unreadable_ms(weight_bytes, bandwidth):
    """Below this time nobody has read that many bytes: twice as fast as the memory was. 0 where caches may hold them."""
    return 1000 * weight_bytes / (2e9 * max(bandwidth)) if weight_bytes > 1 << 29 else 0.0
