"""The soak: that it holds for some seconds, and that it would notice what it looks for."""
import json
import subprocess
import sys

import pytest

import soak
import soak_judge
from conftest import PATIENCE_S
from test_loadtest_report import browse

SETTLE_S = 300


def series(rss=lambda t: 100.0, descriptors=lambda t: 20, threads=lambda t: 9, seconds=1800, process="plain"):
    return [dict(t_s=t, process=process, rss_mib=rss(t), descriptors=descriptors(t), threads=threads(t))
            for t in range(0, seconds, 2)]


def reasons(samples, errors={}, books=()):
    return soak_judge.judge(samples, SETTLE_S, errors, books)[1]


def test_what_is_flat_holds():
    noisy = series(rss=lambda t: 100 + (t % 10) / 10, descriptors=lambda t: 20 + t % 30, threads=lambda t: 9 + t % 4)
    assert reasons(noisy) == []
    # What grows while it settles, and then no more.
    assert reasons(series(rss=lambda t: 100 + 50 * min(t, SETTLE_S) / SETTLE_S)) == []
    assert reasons(series(rss=lambda t: 100 - t / 100)) == []


@pytest.mark.parametrize("planted,words", [
    (dict(rss=lambda t: 100 + t / 400), "memory grew by"),                      # 15 MiB an hour
    (dict(rss=lambda t: 100 if t < 1500 else 103), "memory grew by"),           # a step near the end
    (dict(descriptors=lambda t: 20 + t % 30 + t // 300), "descriptors grew from"),
    (dict(threads=lambda t: 9 + t // 400), "threads grew from")])
def test_planted_growth_is_found_and_named(planted, words):
    found = reasons(series() + series(**planted, process="TLS and tokens"))
    assert len(found) == 1 and found[0].startswith(f"TLS and tokens: {words}")


def test_other_faults_are_named():
    assert reasons(series(), {"Score failed": 3}) == ["3 x Score failed"]
    assert reasons(series(), books=[("requests", 7, 7), ("blocks in use", 0, 2)]) == ["the books do not balance: blocks in use: 2, not 0"]


def test_too_few_samples_are_no_proof():
    assert "too few" in reasons(series(seconds=310))[0]
    hole = [sample for sample in series() if not 1500 <= sample["t_s"] < 1796]
    assert "hole" in reasons(hole)[0]


def run_soak(folder, *arguments):
    """(exit code, the result)."""
    done = subprocess.run([sys.executable, soak.__file__, *arguments, "--output", folder], capture_output=True, text=True,
                          timeout=4 * PATIENCE_S)
    assert (folder / "soak.json").exists(), done.stdout + done.stderr
    return done.returncode, json.loads((folder / "soak.json").read_text())


def test_a_short_soak_counts_everything(tmp_path):
    """Some seconds. Growth is judged by the tests above: a daemon has not settled by then."""
    code, result = run_soak(tmp_path, "0.3", "--settle-s", "0", "--pause-s", "0.05", "--reload-every-s", "4", "--restart-every-s", "5",
                            "--rolling-streams", "2", "--streams", "2")
    unsettled = ("memory grew", "descriptors grew", "threads grew", "too few", "hole")
    assert [reason for reason in result["reasons"] if not any(words in reason for words in unsettled)] == []
    assert (code == 1) == bool(result["reasons"])
    for done in result["done"].values():
        assert all(done[what] for what in ("GenerateStream", "Score", "Tokenize", "Generate", "cancelled", "bad requests", "slow readers",
                                           "broken connections"))
    assert result["reloads"] and result["restarts"] and result["rolling_streams"]
    assert len(result["books"]) == 16 and {sample["process"] for sample in result["samples"]} == {"plain", "TLS and tokens"}
    dom = browse(tmp_path / "soak.html", tmp_path)
    for shown in ("Resident memory", "Open descriptors", "Between two tokens", "Books", "TLS and tokens: blocks in use"):
        assert shown in dom
    assert dom.count("<path") >= 12  # two processes, five charts, percentiles twice


def test_a_daemon_that_dies_fails_the_soak(tmp_path):
    """The planted fault of a whole run: an engine that throws after some steps."""
    code, result = run_soak(tmp_path, "0.3", "--settle-s", "0", "--restart-every-s", "0", "--streams", "1", "--daemon-flag=--scheduler-fault",
                            "--daemon-flag=throw@200")
    assert code == 1
    assert any("failed" in reason or "ended" in reason for reason in result["reasons"])
