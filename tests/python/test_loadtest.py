"""dejavu-loadtest measures what it says: from the scheduled time, exactly, and not where it could not keep its own schedule.

A machine under load may make a run INVALID (exit code 4): accepted wherever what is looked at does not depend on it.
"""
import json
import math
import signal
import subprocess
import time

import pytest

from conftest import BIN, MODEL, PATIENCE_S

LOADTEST = BIN / "dejavu-loadtest"
STALL_S = 0.5
METRICS = ("ttft", "tpot", "itl", "e2el")


def start_run(server, folder, *flags):
    return subprocess.Popen([LOADTEST, "run", "--server", server, "--json", folder / "result.json", "--jsonl",
                             folder / "requests.jsonl", *map(str, flags)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish_run(process, folder, codes=(0, 4)):
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode in codes, (process.returncode, out, err)
    result = json.loads((folder / "result.json").read_text())
    documents = result if isinstance(result, list) else [result]
    if process.returncode in (0, 4):
        assert all(document["valid"] for document in documents) == (process.returncode == 0)
    lines = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    return result, lines, out


def run(server, folder, *flags, codes=(0, 4)):
    return finish_run(start_run(server, folder, "--quiet", *flags), folder, codes)


def refused(*flags):
    done = subprocess.run([LOADTEST, "run", *map(str, flags)], capture_output=True, text=True, timeout=PATIENCE_S)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def echo(tmp_path_factory):
    port_file = tmp_path_factory.mktemp("echo") / "port"
    process = subprocess.Popen([LOADTEST, "echo", "--listen", "127.0.0.1:0", "--port-file", port_file])
    deadline = time.monotonic() + PATIENCE_S
    while not port_file.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    yield f"127.0.0.1:{int(port_file.read_text())}"
    process.terminate()
    assert process.wait(timeout=PATIENCE_S) == 0


def percentile(values, percent):
    """As numpy's, which is what vLLM's benchmark uses."""
    values = sorted(values)
    at = percent / 100 * (len(values) - 1)
    low = math.floor(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (at - low) * (values[high] - values[low])


def run_over_a_stall(daemon, folder, *flags):
    """The daemon stands still for STALL_S in the middle of the run."""
    process = start_run(daemon.address, folder, "--output-tokens", 2, "--prompt-tokens", 4, *flags)
    # The first line of progress: a second has passed.
    assert "run" in process.stderr.readline()
    daemon.signal(signal.SIGSTOP)
    time.sleep(STALL_S)
    daemon.signal(signal.SIGCONT)
    return finish_run(process, folder)


def test_a_stall_shows_in_an_open_loop_and_hides_in_a_closed_one(start, tmp_path):
    daemon = start()
    opened, open_lines, out = run_over_a_stall(daemon, tmp_path, "--rate", 100, "--arrivals", "constant", "--duration", 4)
    assert opened["loop"] == "open" and "open loop" in out
    # 50 requests were due while nobody answered: an eighth of all. The first waited for the whole of it.
    assert opened["num_prompts"] == len(open_lines) == 400
    assert opened["p99_ttft_ms"] > 800 * STALL_S and opened["max_ttft_ms"] > 900 * STALL_S
    assert sum(line["e2el_ms"] > 100 for line in open_lines) >= 38
    # The timeline shows when: at about a second, a tenth in which requests were sent and none was answered.
    assert opened["timeline_interval_s"] == 0.1
    quiet = [t for t in opened["timeline"] if t["sent"] > 0 and t["completed"] == 0]
    assert len(quiet) >= 3 and max(t["p99_ttft_ms"] or 0 for t in quiet) > 750 * STALL_S

    # One after another: a single one was held up, and those that others would have sent meanwhile were never sent.
    closed, closed_lines, out = run_over_a_stall(daemon, tmp_path, "--concurrency", 1, "--duration", 4)
    assert closed["loop"] == "closed" and "closed loop" in out and closed["request_rate"] == "inf"
    assert 1 <= sum(line["e2el_ms"] > 900 * STALL_S for line in closed_lines) <= 2
    assert closed["p95_e2el_ms"] < opened["p95_e2el_ms"]
    assert closed["lag_ms"] is None and all(line["lag_ms"] == 0 for line in closed_lines)


def test_percentiles_are_the_exact_ones_of_the_requests(daemon, tmp_path):
    result, lines, _ = run(daemon.address, tmp_path, "--rate", 30, "--duration", 3, "--prompt-tokens", "uniform:2:16",
                           "--output-tokens", "uniform:1:12", "--tier", "dense=1,exact=1,balanced=2", "--goodput", "ttft:1000")
    ok = [line for line in lines if line["code"] == "OK"]
    assert len(lines) == result["num_prompts"] > 60 and len(ok) == result["completed"]
    values = {"ttft": [l["ttft_ms"] for l in ok], "e2el": [l["e2el_ms"] for l in ok],
              "tpot": [l["tpot_ms"] for l in ok if l["tpot_ms"] is not None], "itl": [gap for l in ok for gap in l["itl_ms"]]}
    for name, of_metric in values.items():
        assert result[f"mean_{name}_ms"] == pytest.approx(sum(of_metric) / len(of_metric), rel=1e-6)
        for percent in ("50", "90", "95", "99", "99.9"):
            assert result[f"p{percent}_{name}_ms"] == pytest.approx(percentile(of_metric, float(percent)), rel=1e-6), name
        assert result[f"median_{name}_ms"] == result[f"p50_{name}_ms"] and result[f"max_{name}_ms"] == pytest.approx(max(of_metric), rel=1e-6)
        low, high = result["intervals"][name]["p99"]
        assert low <= high <= result[f"max_{name}_ms"]
        # Its histogram holds the same values in buckets 1 % wide.
        histogram = result["histograms"][name]
        assert sum(count for _, count in histogram) == len(of_metric)
        below = 0
        for upper, count in histogram:
            below += count
            # Edges are written with five digits.
            at_most = lambda edge: sum(v <= edge for v in of_metric)
            assert at_most(upper * 0.9999) <= below <= at_most(upper * 1.0001), (name, upper)
    for line in ok:
        # Latency counts from the schedule, and the parts of a line fit together.
        assert line["ttft_ms"] == pytest.approx(1e3 * (line["first_token_s"] - line["scheduled_s"]), abs=1e-3)
        assert line["lag_ms"] == pytest.approx(1e3 * (line["sent_s"] - line["scheduled_s"]), abs=1e-3)
        assert len(line["itl_ms"]) == line["tokens"] - 1
        assert 0 < line["density"] <= 1 if line["tokens"] > 1 else line["density"] is None
    assert result["lag_ms"]["p99"] == pytest.approx(percentile([l["lag_ms"] for l in lines], 99), rel=1e-6)
    assert result["total_output_tokens"] == sum(l["tokens"] for l in ok)
    assert result["output_throughput"] == pytest.approx(result["total_output_tokens"] / result["duration"])
    assert set(result["by_tier"]) == {"dense", "exact", "balanced"} == {l["tier"] for l in lines}
    for tier, of_tier in result["by_tier"].items():
        assert of_tier["completed"] == sum(l["tier"] == tier for l in ok)
        assert of_tier["p99_ttft_ms"] == pytest.approx(percentile([l["ttft_ms"] for l in ok if l["tier"] == tier], 99))
    assert result["goodput_share"] == pytest.approx(sum(l["good"] for l in lines) / len(lines))
    assert [l["good"] for l in lines] == [l["code"] == "OK" and l["ttft_ms"] <= 1000 for l in lines]
    assert sum(t["sent"] for t in result["timeline"]) == len(lines) and result["timeline"][-1]["running"] == 0
    assert sum(t["tokens"] for t in result["timeline"]) == sum(l["tokens"] for l in lines)


def test_what_is_answered_is_no_more_than_what_was_offered(echo, tmp_path):
    # Two requests, at 0 and 0.5 s, and then nothing until 1 s: the second half of it counts.
    result, _, _ = run(echo, tmp_path, "--rate", 2, "--arrivals", "constant", "--duration", 1)
    assert result["offered_rate"] == 2 and result["duration"] >= 1
    assert result["request_goodput"] <= result["request_throughput"] <= 2


def test_the_schedule_is_the_seeds_and_not_the_servers(echo, tmp_path):
    flags = ("--rate", 100, "--requests", 50, "--arrivals", "gamma", "--burstiness", 0.5)
    times = []
    for seed in (3, 3, 4):
        _, lines, _ = run(echo, tmp_path, *flags, "--seed", seed)
        times.append(sorted(line["scheduled_s"] for line in lines))
    assert times[0] == pytest.approx(times[1], abs=1e-6) and times[0] != pytest.approx(times[2], abs=1e-3)


def test_a_send_that_was_dropped_makes_the_run_invalid(echo, tmp_path):
    result, lines, out = run(echo, tmp_path, "--rate", 5000, "--requests", 500, "--max-in-flight", 1, codes=(4,))
    assert result["dropped"] > 0 and not result["valid"]
    assert result["dropped"] + len(lines) == 500 and result["goodput_share"] < 1
    assert any("dropped" in reason for reason in result["invalid_because"])
    assert out.startswith("INVALID")


def test_sends_that_were_late_make_the_run_invalid(echo, tmp_path):
    # All at once: each is later than the one before.
    trace = tmp_path / "trace.csv"
    trace.write_text("offset_s,prompt_tokens,max_new_tokens\n" + "0,512,1\n" * 2000)
    result, lines, out = run(echo, tmp_path, "--replay", trace, codes=(4,))
    assert result["lag_ms"]["p99"] > 1 and result["dropped"] + len(lines) == 2000
    assert any("late" in reason for reason in result["invalid_because"]) and out.startswith("INVALID")


def test_what_misbehaves_does_so_and_is_counted_apart(daemon, tmp_path):
    result, lines, _ = run(daemon.address, tmp_path, "--concurrency", 4, "--requests", 80, "--output-tokens", 12,
                           "--cancel-share", 0.2, "--cancel-after-tokens", 2, "--slow-reader-share", 0.15, "--slow-reader-ms", 5,
                           "--bad-share", 0.2, "--warmup-requests", 10)
    of_kind = {kind: [l for l in lines if l["kind"] == kind] for kind in ("normal", "cancelled", "slow_reader", "bad")}
    misbehaved = result["misbehaved"]
    assert result["num_prompts"] == len(lines) == 80 and result["warmup"]["requests"] == 10
    assert misbehaved["cancelled"] == len(of_kind["cancelled"]) > 0 and misbehaved["bad"] == len(of_kind["bad"]) > 0
    assert misbehaved["slow_readers"] == len(of_kind["slow_reader"]) > 0
    assert misbehaved["bad_refused"] == misbehaved["bad"] == result["by_code"]["INVALID_ARGUMENT"]
    assert {l["code"] for l in of_kind["bad"]} == {"INVALID_ARGUMENT"}
    assert {l["code"] for l in of_kind["slow_reader"]} == {"OK"} and all(l["tokens"] == 12 for l in of_kind["slow_reader"])
    # A stream may end before its cancellation arrives.
    assert {l["code"] for l in of_kind["cancelled"]} <= {"CANCELLED", "OK"}
    assert any(l["code"] == "CANCELLED" and l["tokens"] < 12 for l in of_kind["cancelled"])
    assert result["completed"] == len(of_kind["normal"]) and result["failed"] == 0 and result["goodput_share"] == 1
    daemon.expect_idle()


def test_a_server_that_does_not_answer_and_one_that_is_late(start, tmp_path):
    daemon = start()
    daemon.signal(signal.SIGSTOP)
    # Nobody answers GetServerInfo either.
    code, err = refused("--server", daemon.address, "--rate", 10, "--wait-s", 0.5)
    daemon.signal(signal.SIGCONT)
    assert code == 3 and daemon.address in err
    result, lines, _ = run(daemon.address, tmp_path, "--rate", 100, "--requests", 30, "--output-tokens", 400, "--timeout-s", 0.02,
                           codes=(4,))
    # A server whose clock runs out first resets a stream whose client's has not.
    assert set(result["by_code"]) <= {"DEADLINE_EXCEEDED", "CANCELLED"} and result["failed"] == 30
    assert result["p50_ttft_ms"] is None and "no request was answered" in result["invalid_because"]


def test_a_daemons_log_can_be_replayed(start, tmp_path):
    # One place, and one to wait: at least one of three is refused. All three were load.
    daemon = start("--log-format", "json", "--scheduler-max-batch", "1", "--scheduler-max-waiting-requests", "1")
    _, first, _ = run(daemon.address, tmp_path, "--rate", 1000, "--requests", 3, "--arrivals", "constant", "--prompt-tokens", 5,
                      "--output-tokens", 300, "--tier", "dense", "--tenant", "acme", "--urgency", "interactive")
    assert {line["code"] for line in first} == {"OK", "RESOURCE_EXHAUSTED"}
    daemon.expect_idle()
    daemon.terminate()  # all that it has to say is in its log then
    assert daemon.wait() == 0
    logged = [json.loads(line) for line in daemon.log().splitlines() if '"method":"GenerateStream"' in line]
    assert len(logged) == 3
    log = tmp_path / "load.log"
    log.write_text(daemon.log())

    replaying = start("--log-format", "json")
    result, again, _ = run(replaying.address, tmp_path, "--replay", log, "--replay-speed", 0.5)
    assert result["arrivals"]["kind"] == "replay" and result["num_prompts"] == 3
    assert [(l["prompt_tokens"], l["tokens"], l["tier"]) for l in again] == [(5, 300, "dense")] * 3
    arrivals = sorted(line["arrival_s"] for line in logged)
    due = sorted(line["scheduled_s"] for line in again)
    assert due == pytest.approx([2 * (arrival - arrivals[0]) for arrival in arrivals], abs=1e-5)
    replaying.terminate()
    assert replaying.wait() == 0
    sent_again = [json.loads(line) for line in replaying.log().splitlines() if '"method":"GenerateStream"' in line]
    for key in ("seed", "max_new_tokens", "prompt_tokens", "tier", "tenant", "priority"):
        assert sorted(l[key] for l in logged) == sorted(l[key] for l in sent_again), key


def test_prompts_of_a_corpus(daemon, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("It was a dark night, and the wind went over the hills as it had gone for a thousand years. " * 50)
    result, lines, _ = run(daemon.address, tmp_path, "--concurrency", 2, "--requests", 20, "--corpus", corpus,
                           "--prompt-tokens", 40, "--output-tokens", 2)
    assert result["completed"] == 20
    assert all(20 <= line["prompt_tokens"] <= 60 for line in lines), [line["prompt_tokens"] for line in lines]


def test_a_ramp_ends_where_a_rate_is_not_held(daemon, tmp_path):
    results, lines, _ = run(daemon.address, tmp_path, "--ramp", "5:20:4", "--duration", 0.5, "--arrivals", "constant",
                            "--output-tokens", 2, "--goodput", "ttft:0.001")
    # An objective that nobody meets: the first step is the last.
    assert len(results) == 1 and results[0]["ramp"] == {"from": 5, "to": 20, "steps": 4, "step": 0}
    assert results[0]["goodput_share"] == 0 and results[0]["falls_short"]
    assert len(lines) == results[0]["num_prompts"]


def test_an_interrupted_run_says_so_and_reports_what_it_has(echo, tmp_path):
    process = start_run(echo, tmp_path, "--rate", 100, "--duration", 600)
    assert "run" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    result, lines, out = finish_run(process, tmp_path, codes=(130,))
    assert not result["valid"] and "it was interrupted" in result["invalid_because"] and out.startswith("INVALID")
    assert result["num_prompts"] == len(lines) > 0


@pytest.mark.parametrize("flags, reason", [
    ([], "--rate"),
    (["--rate", 5, "--concurrency", 2], "exactly one"),
    (["--rate", 5, "--duration", 1, "--requests", 2], "exclude"),
    (["--rate", 5, "--burstiness", 2], "--burstiness"),
    (["--rate", 0], "--rate"),
    (["--rate", 5, "--arrivals", "even"], "even"),
    (["--ramp", "5:1:2"], "FROM:TO:STEPS"),
    (["--replay", "/nowhere"], "/nowhere"),
    (["--rate", 5, "--goodput", "ttft"], "ttft:MS"),
    (["--rate", 5, "--metadata", "x"], "KEY=VALUE"),
    (["--rate", 5, "--tier", "best"], "best"),
    (["--rate", 5, "--prompt-tokens", "500", "--output-tokens", "500"], "512"),
    (["--rate", 5, "--corpus", "/nowhere"], "/nowhere"),
])
def test_nonsense_is_refused(daemon, flags, reason):
    code, err = refused("--server", daemon.address, *flags)
    assert code == 2 and reason in err, err


def test_what_cannot_be_written_or_reached_is_said_before_anything_is_measured(daemon):
    for flag in ("--json", "--html", "--jsonl"):
        code, err = refused("--server", daemon.address, "--rate", 5, "--requests", 1, flag, "/nowhere/file")
        assert code == 1 and "/nowhere/file" in err
    code, err = refused("--server", "127.0.0.1:1", "--rate", 5, "--wait-s", 0)
    assert code == 3 and "127.0.0.1:1" in err
    code, err = refused("--server", daemon.address, "--model", "other", "--rate", 5)
    assert code == 1 and "other" in err
