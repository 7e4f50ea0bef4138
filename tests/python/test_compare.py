"""`./run compare` without its peers: what is kept, which ratios are formed, how the time is spent, what is written."""
import itertools
import json
import subprocess
import sys

import pytest

from conftest import BIN, PATIENCE_S, ROOT

sys.path.insert(0, str(ROOT / "tests/compare"))
import compare
import peer
import report
import samples
import systems
from compare import LINES, OURS, Comparison, cells, counterpart
from samples import Cell, Line, Samples
from systems import Failed, TookTooLong

BF16, INT8 = Line("shape", OURS, "bf16"), Line("shape", OURS, "int8")
TORCH = Line("shape", "transformers", "bf16")
ONE = Cell("decode", 1)


def sample(ms, *bandwidth):
    return {"ms": ms, "bandwidth": list(bandwidth)}


# --- which ratios are formed


@pytest.mark.parametrize("theirs,ours,comparable", [
    ((50, 50), (50, 50), True), ((50, 50), (57.4, 57.4), True), ((50, 50), (57.6, 57.6), False),
    ((57.6, 57.6), (50, 50), False), ((50, 57), (57, 50), True), ((50, 60), (55, 55), False), ((55, 55), (60, 50), False)])
def test_a_ratio_wants_the_same_bandwidth_before_and_after_both_sides(theirs, ours, comparable):
    result = samples.compare([sample(120, *theirs)], [sample(60, *ours)])
    assert result.ms == 120
    assert (result.ratio, result.words == "") == ((2.0, True) if comparable else (None, False))
    if not comparable:
        assert all(f"{gb_per_s:.0f}" in result.words for gb_per_s in (*theirs, *ours))


def test_what_met_another_bandwidth_moves_neither_time_nor_ratio():
    ours = [sample(60, 50, 50), sample(600, 5, 5)]
    assert samples.compare([sample(120, 50, 51), sample(999, 20, 20)], ours) == samples.Result(120, 2.0, "", (50, 51))
    assert samples.compare(ours, ours).ratio == 1.0
    assert samples.compare([], ours) == samples.Result(None, None, "", None)
    assert samples.compare(ours, []).ratio is None and samples.compare(ours, []).words == ""


def test_everything_has_a_counterpart():
    assert counterpart(TORCH) == BF16 and counterpart(Line("shape", "transformers", "fp32")) == BF16
    assert counterpart(Line("shape", OURS, "int8", "balanced")) == INT8 and counterpart(INT8) == INT8
    assert counterpart(Line("embedded", "transformers", "fp32")) == Line("embedded", OURS, "fp16")


# --- what is kept


def test_samples_are_kept_and_not_mixed(tmp_path):
    kept = Samples(tmp_path, {"tree": "a"})
    kept.add(BF16, ONE, 1, sample(60, 50, 50))
    assert Samples(tmp_path, {"tree": "a"}).records == kept.records != []
    assert Samples(tmp_path, {"tree": "b"}).records == []
    assert Samples(tmp_path, {"tree": "b"}, fresh=True).records == []
    assert Samples(tmp_path, {"tree": "a"}).of(BF16, ONE, 1) == kept.records
    assert Samples(tmp_path, {"tree": "a"}).of(BF16, ONE, 2) == Samples(tmp_path, {"tree": "a"}).of(INT8) == []
    assert Samples(tmp_path, {"tree": "a"}, fresh=True).records == Samples(tmp_path, {"tree": "a"}).records == []


def test_a_torn_line_costs_one_measurement(tmp_path, capsys):
    kept = Samples(tmp_path, {})
    kept.add(BF16, ONE, 1, sample(60, 50, 50))
    with kept.path.open("a") as file:
        file.write('{"model": "sha')
    again = Samples(tmp_path, {})
    assert again.records == kept.records and "not whole" in capsys.readouterr().err
    again.add(BF16, ONE, 2, sample(61, 50, 50))
    assert len(Samples(tmp_path, {}).records) == 2 and capsys.readouterr().err == ""


# --- how the time is spent


class Bank:
    """All systems, over a clock of their own. `seconds` and `gb_per_s` may be set by line; `stop_at`: Ctrl-C there."""

    def __init__(self, folder, seconds=lambda line, cell: 10, gb_per_s=lambda bank: 50.0, stop_at=None, fails=()):
        self.folder, self.seconds, self.gb_per_s, self.stop_at, self.fails = folder, seconds, gb_per_s, stop_at, fails
        self.now, self.measured, self.events, self.tried, self.open = 0.0, [], [], [], 0

    def bandwidth(self, fresh):
        self.now += 1
        return self.gb_per_s(self)

    def open_session(self, line, timeout_s):
        self.tried.append(line)
        if line in self.fails:
            raise Failed("it is not there")
        self.open += 1
        self.events.append(("open", line))
        bank = self

        class Session:
            version, notes = "1.0", ["said so"]

            def measure(self, cell, timeout_s):
                if len(bank.measured) == bank.stop_at:
                    raise KeyboardInterrupt
                seconds = bank.seconds(line, cell)
                bank.now += min(seconds, timeout_s)
                if seconds > timeout_s:
                    raise TookTooLong
                bank.measured.append((line, cell))
                ms = 100.0 if line.system == OURS else 250.0
                return {"ms": ms, "samples_ms": [ms], "first_ms": 5 * ms, "notes": []}

            def close(self):
                bank.open -= 1

        return Session()

    def comparison(self, lines=LINES, rounds=2, minutes=1e6, weight_bytes=0):
        return Comparison(lines, Samples(self.folder, {}), rounds, 60 * minutes, self.open_session, self.bandwidth,
                          lambda line: weight_bytes, lambda line: self.events.append(("show", line)), lambda: None,
                          clock=lambda: self.now)


def test_everything_is_measured_once_a_round_and_shown_as_it_comes(tmp_path):
    bank = Bank(tmp_path)
    run = bank.comparison(rounds=2)
    assert run.run() and bank.open == 0
    assert bank.measured == [(line, cell) for _ in range(2) for line in LINES for cell in cells(line)]
    assert bank.events == [(what, line) for _ in range(2) for line in LINES for what in ("open", "show")]
    assert run.result(TORCH, ONE)[:3] == (250.0, 2.5, "") and run.result(BF16, ONE).ratio == 1.0
    assert "Transformers bf16: said so" in run.notes()


@pytest.mark.parametrize("stop_at", [0, 1, 5, 60])
def test_another_start_goes_on_where_this_one_stopped(tmp_path, stop_at):
    first, second, third = Bank(tmp_path, stop_at=stop_at), Bank(tmp_path), Bank(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        first.comparison().run()
    assert first.open == 0 and second.comparison().run() and third.comparison().run()
    assert first.measured + second.measured == [(line, cell) for _ in range(2) for line in LINES for cell in cells(line)]
    assert third.measured == [] and [line for what, line in third.events if what == "show"] == LINES


@pytest.mark.parametrize("minutes", [1, 5, 12])
def test_the_time_is_kept_and_what_is_least_useful_is_missing(tmp_path, minutes):
    bank = Bank(tmp_path, seconds=lambda line, cell: 7 if line.system == OURS else 13)
    run = bank.comparison(minutes=minutes)
    assert not run.run()
    assert bank.now <= 60 * minutes + 15 and bank.open == 0
    order = iter([(line, cell) for _ in range(2) for line in LINES for cell in cells(line)])
    assert bank.measured and all(each in order for each in bank.measured)
    missing = [line for line in LINES if not run.samples.of(line)]
    assert missing == LINES[len(LINES) - len(missing):]
    assert bool(missing) == any(note.startswith("Not measured in the time: ") for note in run.notes())


def test_a_slow_row_takes_no_other_row_s_time(tmp_path):
    bank = Bank(tmp_path, seconds=lambda line, cell: 1e9 if line == TORCH and cell.batch > 1 else 5)
    run = bank.comparison(minutes=25, rounds=1)
    assert run.run() and bank.now < 60 * 25
    assert {line for line, _ in bank.measured} == set(LINES)
    assert any(note.startswith("Transformers bf16: batch 4 is left out: stopped after") for note in run.notes())


@pytest.mark.parametrize("minutes", [25, 250])  # a row has a tenth of it
def test_a_prompt_that_cannot_end_in_time_is_not_begun(tmp_path, minutes):
    bank = Bank(tmp_path)
    run = bank.comparison([BF16, TORCH], rounds=1, minutes=minutes)
    run.samples.add(TORCH, ONE, 1, {**sample(250, 50, 50), "first_ms": 400 * minutes, "cost_s": 6, "notes": [], "version": "1"})
    run.run()
    assert (TORCH, Cell("decode", 16)) not in bank.measured
    assert f"Transformers bf16: batch 16 is left out: it would take {6.4 * minutes:.0f} s and more" in run.notes()


def test_who_cannot_run_is_named_and_nobody_else_is_missing(tmp_path):
    bank = Bank(tmp_path, fails=[TORCH])
    run = bank.comparison()
    assert run.run() and {line for line, _ in bank.measured} == set(LINES) - {TORCH}
    assert run.notes().count("Transformers bf16: left out: it is not there") == 1 == bank.tried.count(TORCH)


@pytest.mark.parametrize("odd", [[BF16], [BF16, TORCH]])
def test_a_pair_that_met_different_bandwidths_is_measured_again(tmp_path, odd):
    """The last of `odd` meets half of the bandwidth where it is measured first."""
    bank = Bank(tmp_path, gb_per_s=lambda bank: 25.0 if bank.tried == odd else 50.0)
    run = bank.comparison([BF16, TORCH], rounds=1)
    assert run.run() and bank.open == 0
    for cell in cells(TORCH):
        assert len(run.samples.of(TORCH, cell)) == 2 and len(run.samples.of(BF16, cell)) == (2 if odd == [BF16] else 1)
        assert run.result(TORCH, cell)[:3] == (250.0, 2.5, "")


def test_who_is_not_ready_in_time_is_named(tmp_path, monkeypatch):
    bank = Bank(tmp_path)

    def open_session(line, timeout_s, usual=bank.open_session):
        if line == TORCH:
            bank.now += timeout_s
            raise TookTooLong
        return usual(line, timeout_s)

    monkeypatch.setattr(bank, "open_session", open_session)
    run = bank.comparison(minutes=25, rounds=1)
    assert run.run() and {line for line, _ in bank.measured} == set(LINES) - {TORCH}
    assert "Transformers bf16: left out: not ready after 150 s" in run.notes()


def test_a_bandwidth_that_never_settles_ends_in_words(tmp_path):
    swing = itertools.cycle([20.0, 60.0])
    bank = Bank(tmp_path, gb_per_s=lambda bank: next(swing))
    run = bank.comparison([BF16, TORCH], rounds=2)
    assert run.run()
    for cell in cells(TORCH):
        assert len(run.samples.of(TORCH, cell)) == 2 + 2 * compare.REPEATS
        assert run.result(TORCH, cell).ratio is None and run.result(TORCH, cell).words.startswith("no ratio: at 20 to 60 GB/s")


def test_a_time_in_which_nobody_can_read_the_weights_is_refused(tmp_path):
    run = Bank(tmp_path).comparison([BF16, TORCH], rounds=1, weight_bytes=200e9)  # at 50 GB/s 4 s
    assert run.run()
    assert not run.samples.of(BF16, ONE) and run.samples.of(BF16, Cell("prefill", 1))
    assert "Transformers bf16: batch 1 is left out: 250 ms is less than reading the weights takes" in run.notes()


# --- peers


class Steps:
    """A peer whose first token takes 1 s, every other one 0.1 s, by a clock of its own."""

    def __init__(self, backwards=False, tokens=None):
        self.now, self.backwards, self.tokens = 0.0, backwards, tokens

    def perf_counter(self):
        return self.now

    def generate(self, prompt, batch, tokens, on_step):
        self.now += 1.0
        for token in range(self.tokens or tokens):
            if on_step():
                return
            self.now += -0.1 if self.backwards and token == 3 else 0.1


@pytest.fixture
def timed(monkeypatch):
    def call(function, steps, *arguments):
        monkeypatch.setattr(peer, "time", steps)
        return function(steps, [1], *arguments)

    return call


def test_steps_are_timed_by_themselves(timed):
    assert timed(peer.times_ms, Steps(), 1, 5, 100) == pytest.approx([1000, 100, 100, 100, 100])
    assert len(timed(peer.times_ms, Steps(), 1, 64, 1.95)) == 11  # what came until 2 s had passed
    assert len(timed(peer.times_ms, Steps(), 1, 64, 0)) == 1 + peer.WARM_STEPS + peer.FEWEST_STEPS
    with pytest.raises(RuntimeError, match="100, -100, 100"):
        timed(peer.times_ms, Steps(backwards=True), 1, 8, 100)


def test_a_decode_is_its_steps_and_a_prefill_the_first_token(timed):
    decoded = timed(peer.decode, Steps(), 4, 16, 100)
    assert decoded["ms"] == pytest.approx(100) and decoded["first_ms"] == pytest.approx(1000) and decoded["notes"] == []
    assert timed(peer.decode, Steps(), 4, 16, 0)["notes"] == ["batch 4: 5 of 16 tokens in 0 s"]
    with pytest.raises(RuntimeError, match="stopped after 2 of 16"):
        timed(peer.decode, Steps(tokens=2), 4, 16, 100)
    assert timed(peer.prefill, Steps(), 2, 100)["samples_ms"] == pytest.approx([1000, 1000])
    slow = timed(peer.prefill, Steps(), 2, 0.5)
    assert slow["samples_ms"] == [1000] and "without a warm-up" in slow["notes"][0]


PEER = """
import json, sys, time
print(json.dumps({"version": "1", "notes": []}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["batch"] == 4: print(json.dumps({"error": "no such batch"}), flush=True)
    elif request["batch"] == 16: time.sleep(1000)
    elif request["phase"] == "prefill": sys.exit("out of luck")
    else: print(json.dumps({"ms": 7, "tokens": request["tokens"]}), flush=True)
"""


@pytest.fixture
def session(tmp_path, monkeypatch):
    script = tmp_path / "peer.py"
    script.write_text(PEER)
    monkeypatch.setattr(systems, "PEER", script)
    session = systems.Peer(systems.Machine(BIN, tmp_path, 2), TORCH, tmp_path, tmp_path, 32, PATIENCE_S)
    yield session
    session.close()


def test_a_peer_answers_refuses_and_dies(session):
    assert session.measure(ONE, PATIENCE_S) == {"ms": 7, "tokens": 32}
    with pytest.raises(Failed, match="no such batch"):
        session.measure(Cell("decode", 4), PATIENCE_S)
    for _ in range(2):
        with pytest.raises(Failed, match="out of luck"):
            session.measure(Cell("prefill", 1), PATIENCE_S)


def test_a_peer_that_takes_too_long_is_stopped(session):
    with pytest.raises(TookTooLong):
        session.measure(Cell("decode", 16), 0.1)
    assert session.process.returncode is not None


def test_ours_and_the_bandwidth_are_what_dejavu_bench_says(tmp_path):
    machine = systems.Machine(BIN, tmp_path, 2)
    checkpoint = machine.write_checkpoint("synthetic:opt-tiny")
    assert machine.write_checkpoint("synthetic:opt-tiny") == checkpoint
    ours = systems.Bench(machine, checkpoint, BF16, 8, "a")
    for cell in (ONE, Cell("prefill", 1)):
        measured = ours.measure(cell, PATIENCE_S)
        assert 0 < min(measured["samples_ms"]) <= measured["ms"] <= max(measured["samples_ms"])
    balanced = systems.Bench(machine, "synthetic:opt-tiny", Line("shape", OURS, "int8", "balanced"), 8, "a")
    assert balanced.measure(Cell("decode", 4), PATIENCE_S)["ms"] > 0
    with pytest.raises(Failed, match="nowhere"):
        systems.Bench(machine, tmp_path / "nowhere", BF16, 8, "a").measure(ONE, PATIENCE_S)
    with pytest.raises(TookTooLong):
        ours.measure(ONE, 0.001)
    first = machine.bandwidth(fresh=True)
    assert machine.bandwidth(fresh=False) == first > 0


# --- what is written


def test_rows_say_what_is_known():
    results = {ONE: samples.Result(71.54, 1.0, "", (52.1, 55)), Cell("decode", 16): samples.Result(344, None, "no ratio", (60, 61)),
               Cell("decode", 4): samples.Result(None, None, "", None)}
    assert report.row(TORCH, "5.5.4", results) == "| Transformers 5.5.4 | bf16 | DENSE | 71.5 | 1.00 |  |  | 344 | no ratio |  |  | 52 to 61 |"
    assert report.row(Line("shape", OURS, "int8", "exact"), "", {}).startswith("| dejavud | int8 | EXACT (synthetic) | ")
    assert report.row(Line("embedded", OURS, "fp16"), "", {}).startswith("| dejavud, embedded model | fp16 | DENSE | ")
    columns = {line.count("|") for line in [*report.heading(512).splitlines(), report.row(TORCH, "", results)]}
    assert len(columns) == 1


def test_a_page_gets_the_table_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.write(page, "| new |")
        assert page.read_text() == f"before\n{report.BEGIN}\n| new |\n{report.END}\nafter\n"
    for text in ("", report.BEGIN, f"{report.END}{report.BEGIN}", f"{report.BEGIN}{report.END}" * 2):
        page.write_text(text)
        with pytest.raises(ValueError, match="page.md: wants the lines"):
            report.write(page, "new")
        assert page.read_text() == text
    report.parts(ROOT / "docs/benchmarks/comparison.md")


# --- the command


BENCH = """#!/bin/sh
command=$1
echo "$1" >>"{log}"
shift
while [ $# -gt 1 ]; do
  case $1 in
    --json) json=$2 ;;
    --out) out=$2 ;;
    --tier) tier=$2 ;;
  esac
  shift 2
done
if [ $command = checkpoint ]; then
  mkdir "$out" && echo '{{"vocab_size": 9}}' >"$out/config.json"
else
  row="{{\\"ms\\": 9, \\"ms_per_step\\": 3, \\"samples_ms\\": [3], \\"tier\\": \\"$tier\\", \\"breakdown_ms\\": {{\\"sampling\\": 0.5}}}}"
  echo "{{\\"read_gb_per_s\\": 50, \\"rows\\": [$row]}}" >"$json"
fi
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs it over a dejavu-bench that says the same of everything: (what it printed, the measurements that were made)."""
    bench, log = tmp_path / "dejavu-bench", tmp_path / "log"
    bench.write_text(BENCH.format(log=log))
    bench.chmod(0o755)

    def run(*arguments, code=0):
        log.write_text("")
        done = subprocess.run([sys.executable, compare.__file__, "--work", tmp_path / "work", "--bin", tmp_path, *arguments],
                              capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == code, done.stderr
        calls = log.read_text().split()
        return done.stdout + done.stderr, calls.count("decode") + calls.count("prefill")

    return run


def test_the_command_measures_goes_on_and_begins_anew(tmp_path, command):
    page, figures = tmp_path / "page.md", tmp_path / "figures.json"
    page.write_text(f"{report.BEGIN}{report.END}")
    ours = sum(len(cells(line)) for line in LINES if line.system == OURS)
    text, measured = command("--quick", "--write-docs", page, "--json", figures)
    assert measured == ours
    assert "| dejavud | int8 | BALANCED (synthetic) | 3.50 | 1.00 | 3.50 | 1.00 |" in text
    assert "Transformers bf16: left out: ModuleNotFoundError" in text  # torch is not in the tests' environment
    written = page.read_text()
    assert "`./run compare --quick`" in written and systems.processor()[0].split()[0] in written
    assert written.splitlines()[-1] == report.END and report.heading(512) in written
    rows = json.loads(figures.read_text())["rows"]
    assert len(rows) == ours and all(row["bandwidth"] == [50, 50] and len(row["samples"]) == 1 for row in rows)

    text, measured = command("--quick")
    assert measured == 0 and "| dejavud | int8 | BALANCED (synthetic) | 3.50 | 1.00 |" in text
    assert command("--quick", "--fresh")[1] == ours
    assert command("--rounds", "1", "--tokens", "9")[1] == ours  # of other settings nothing is known


def test_the_command_refuses_what_it_could_not_end(tmp_path, command):
    (tmp_path / "page.md").write_text("no markers")
    for arguments in (["--write-docs", tmp_path / "page.md"], ["--write-docs", tmp_path / "nowhere.md"], ["--minutes", "0"],
                      ["--json", tmp_path / "nowhere/figures.json"], ["--model", "opt"], ["--rounds", "0"], ["--tokens", "2"]):
        text, measured = command(*map(str, arguments), code=2)
        assert arguments[0] in text and measured == 0
