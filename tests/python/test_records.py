"""What the daemon says of its calls on standard error: the access log and the engine's line."""
import contextlib
import os
import re
import signal
import subprocess
import time

import grpc
import pytest

from conftest import BIN, MODEL, PATIENCE_S, PROCESSES
from log_lines import TRACE_ID, TRACEPARENT, line_of, lines_of, poll

pytestmark = pytest.mark.skipif(PROCESSES > 1, reason="the log of mpirun's processes is mpirun's")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_access_line_says_what_the_client_saw(start, api, log_format):
    daemon = start("--log-format", log_format)
    request = daemon.request([2, 100, 200], 20, request_id="first")
    metadata = [("x-tenant", "acme"), ("traceparent", TRACEPARENT)]
    finish = list(daemon.stub.GenerateStream(request, timeout=PATIENCE_S, metadata=metadata))[-1].finish
    line = line_of(daemon, "first")
    assert (line["level"], line["method"], line["code"], line["finish_reason"]) == ("info", "GenerateStream", "OK", "length")
    assert (line["tenant"], line["trace_id"]) == ("acme", TRACE_ID)
    assert (line["tier"], line["priority"]) == ("exact", "normal")
    assert (int(line["prompt_tokens"]), int(line["generated_tokens"])) == (3, 20)
    assert line["peer"].startswith("ipv4:127.0.0.1:")
    for key in ("queue_ms", "ttft_ms", "mean_itl_ms", "total_ms"):
        assert float(line[key]) == pytest.approx(getattr(finish.timings, key), abs=0.0006)
    assert float(line["density"]) == pytest.approx(finish.sparsity.mlp_density, abs=0.00006)
    assert isinstance(line["prompt_tokens"], int if log_format == "json" else str)
    # What a replay needs besides.
    assert int(line["max_new_tokens"]) == 20 and int(line["seed"]) >= 0 and float(line["arrival_s"]) > 1.7e9

    # Several samples: sums, and the unary method.
    request.request_id = "samples"
    request.sampling.samples = 3
    request.sampling.temperature = 1.0
    reply = daemon.stub.Generate(request, timeout=PATIENCE_S)
    line = line_of(daemon, "samples")
    generated = [reply.finish, *(sample.finish for sample in reply.more_samples)]
    assert (line["method"], int(line["samples"])) == ("Generate", 3)
    assert int(line["prompt_tokens"]) == 9 and int(line["generated_tokens"]) == 60
    assert int(line["cached_tokens"]) == sum(f.cached_prompt_tokens for f in generated)

    # A request that names no id has the drawn one; a call that makes no tokens has none.
    reply = daemon.stub.Generate(daemon.request([2], 1), timeout=PATIENCE_S)
    assert line_of(daemon, reply.prompt.request_id)["generated_tokens"] in (1, "1")
    daemon.stub.Tokenize(api.pb.TokenizeRequest(text="It was"), timeout=PATIENCE_S)
    line = poll(lambda: [l for l in lines_of(daemon) if l.get("method") == "Tokenize"], daemon.log)[0]
    assert line["finish_reason"] == "none" and "request_id" not in line and "prompt_tokens" not in line

    # Its other lines are of the same form, and probes are not worth one.
    assert any("serving" in l.get("message", "") for l in lines_of(daemon))
    assert not any(l.get("method") in ("Check", "Watch") for l in lines_of(daemon))


def expect_line_of_a_cancelled_stream(daemon):
    stream = daemon.stub.GenerateStream(daemon.request([2, 100], 500, request_id="left"), timeout=PATIENCE_S)
    next(chunk for chunk in stream if chunk.token_ids)
    stream.cancel()
    line = line_of(daemon, "left")
    assert (line["code"], line["finish_reason"]) == ("CANCELLED", "cancelled")
    assert int(line["generated_tokens"]) >= 1  # the engine's count, though it let go after the call was over


def expect_line_of_an_aborted_stream(daemon, api):
    stream = daemon.stub.GenerateStream(daemon.request([2, 100], 500), timeout=PATIENCE_S)
    aborted = next(stream).prompt.request_id
    assert daemon.stub.Abort(api.pb.AbortRequest(request_id=aborted), timeout=PATIENCE_S).found
    with pytest.raises(grpc.RpcError):
        list(stream)
    assert line_of(daemon, aborted)["code"] == "CANCELLED"


def expect_lines_of_late_streams(daemon):
    """Those that run and those that wait."""
    streams = [daemon.stub.GenerateStream(daemon.request([2, i], 500, request_id=f"late-{i}"), timeout=0.5) for i in range(6)]
    for i, stream in enumerate(streams):
        with contextlib.suppress(grpc.RpcError):
            list(stream)
        assert stream.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        line = line_of(daemon, f"late-{i}")
        # The client's clock may run out first: then all that the server hears is that it has gone.
        ends = {("DEADLINE_EXCEEDED", "deadline"), ("CANCELLED", "cancelled"), ("CANCELLED", "deadline")}
        assert (line["code"], line["finish_reason"]) in ends


def expect_lines_of_stops(daemon, api):
    """A stop token and a stop string."""
    request = daemon.request([2, 100, 200], 20)
    ids = daemon.stub.Generate(request, timeout=PATIENCE_S).token_ids
    request.request_id = "stop-token"
    request.stopping.stop_token_ids.append(ids[5])
    daemon.stub.Generate(request, timeout=PATIENCE_S)
    assert line_of(daemon, "stop-token")["finish_reason"] == "stop_token"
    request = api.pb.GenerateRequest(text="It was a dark night, and", request_id="free")
    request.stopping.max_new_tokens = 40
    text = daemon.stub.Generate(request, timeout=PATIENCE_S).text
    request.request_id = "stop-string"
    request.stopping.stop_strings.append(text[10:17])
    daemon.stub.Generate(request, timeout=PATIENCE_S)
    assert line_of(daemon, "stop-string")["finish_reason"] == "stop_string"


def expect_line_of_a_score(daemon, api):
    score = api.pb.ScoreRequest(request_id="score")
    score.token_ids.ids.extend([2, 100, 200])
    daemon.stub.Score(score, timeout=PATIENCE_S)
    line = line_of(daemon, "score")
    assert (line["method"], line["finish_reason"], int(line["prompt_tokens"])) == ("Score", "length", 3)


def expect_lines_of_refusals(daemon):
    """Before and at admission."""
    with pytest.raises(grpc.RpcError):
        daemon.stub.Generate(daemon.request([2, 9999], 1, request_id="wrong"), timeout=PATIENCE_S)
    line = line_of(daemon, "wrong")
    assert (line["code"], line["finish_reason"]) == ("INVALID_ARGUMENT", "none") and "prompt_tokens" not in line
    with pytest.raises(grpc.RpcError):
        daemon.channel.unary_unary("/dejavu.v1.GenerationService/Nothing")(b"", timeout=PATIENCE_S)
    line = poll(lambda: [l for l in lines_of(daemon) if l.get("code") == "UNIMPLEMENTED"], daemon.log)[0]
    assert line["method"] == "unknown"


def test_every_end_has_its_line(start, api):
    # No stream of 500 tokens ends by itself here: its steps take 10 ms.
    daemon = start("--scheduler-max-batch", "2", "--scheduler-deadline-slack", "0", "--scheduler-fault", "slow@10")
    expect_line_of_a_cancelled_stream(daemon)
    expect_line_of_an_aborted_stream(daemon, api)
    expect_lines_of_late_streams(daemon)
    expect_lines_of_stops(daemon, api)
    expect_line_of_a_score(daemon, api)
    expect_lines_of_refusals(daemon)
    daemon.stop()
    ids = [l["request_id"] for l in lines_of(daemon) if l.get("event") == "request" and "request_id" in l]
    assert len(ids) == len(set(ids)), "a call has two lines"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_hostile_strings_stay_within_their_line(start, api, log_format):
    daemon = start("--log-format", log_format)
    poll(lambda: any("serving" in l.get("message", "") for l in lines_of(daemon)), daemon.log)
    before = len(lines_of(daemon))
    written = lambda count: poll(lambda: len(lines_of(daemon)) >= before + count, daemon.log)
    hostile = 'a"b\\c\nfake line\r\x1b[31m\x00\x7f\u0085\u2028\u202e{"level":"error"}'
    with pytest.raises(grpc.RpcError) as raised:
        daemon.stub.Generate(daemon.request([2], 1, request_id=hostile), timeout=PATIENCE_S)
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    written(1)
    tenant = 'x" code=OK level="error" {"a":1}'
    with pytest.raises(grpc.RpcError):
        daemon.stub.Generate(daemon.request([2], 1, request_id="t"), timeout=PATIENCE_S, metadata=[("x-tenant", tenant)])
    written(2)
    with pytest.raises(grpc.RpcError):
        daemon.stub.Generate(daemon.request([2], 1, request_id="y" * 100_000), timeout=PATIENCE_S)
    lines = poll(lambda: len(found := lines_of(daemon)) >= before + 3 and found, daemon.log)[before:]
    assert len(lines) == 3 and all(l["event"] == "request" and l["code"] == "INVALID_ARGUMENT" for l in lines)
    if log_format == "json":
        assert lines[0]["request_id"] == hostile
    assert lines[1]["tenant"] == tenant
    assert len(lines[2]["request_id"]) == 256
    raw = daemon.log_path.read_bytes()
    assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]|\xc2\x85|\xe2\x80[\xa8\xae]", raw)


def test_prompt_text_is_written_only_where_asked_for(start, api):
    request = api.pb.GenerateRequest(text="Das Geheimnis: \u00e4\u00f6\u00fc \n and more of it", request_id="r")
    request.stopping.max_new_tokens = 3
    silent = start("--log-level", "trace")
    text = silent.stub.Generate(request, timeout=PATIENCE_S).text
    line_of(silent, "r")
    silent.stop()
    assert "Geheimnis" not in silent.log() and text.strip() not in silent.log()

    telling = start("--log-prompt-chars", "17", "--log-format", "json")
    telling.stub.Generate(request, timeout=PATIENCE_S)
    assert line_of(telling, "r")["prompt"] == "Das Geheimnis: \u00e4\u00f6"


def test_access_lines_can_be_turned_off(start):
    daemon = start("--no-log-access")
    daemon.stub.Generate(daemon.request([2], 3), timeout=PATIENCE_S)
    daemon.stop()
    assert not any(line.get("event") == "request" for line in lines_of(daemon))
    assert "drained" in daemon.log()  # the last lines are there


def test_the_engine_speaks_while_it_works_and_is_silent_else(start):
    daemon = start("--log-engine-every-s", "0.2", "--log-format", "json")

    def engine_lines():
        return [line for line in lines_of(daemon) if line.get("event") == "engine"]

    request = daemon.request([2, *range(100, 150)], 100, request_id="r")
    request.sparsity.tier = 4
    seen = {"running": lambda v: v == 1, "generated_tokens_per_s": lambda v: v > 0, "kv_use": lambda v: 0 < v <= 1,
            "prefix_hits": lambda v: 0 < v <= 1, "density": lambda v: 0 < v < 1}

    def has_seen_all():
        lines = engine_lines()
        return all(any(key in line and right(line[key]) for line in lines) for key, right in seen.items())

    poll(lambda: daemon.stub.Generate(request, timeout=PATIENCE_S) and has_seen_all(), daemon.log)

    # Idle: soon nothing comes any more, for ten times as long as lines are apart.
    daemon.expect_idle()

    def stays_silent():
        count = len(engine_lines())
        time.sleep(2)
        return len(engine_lines()) == count

    poll(stays_silent, daemon.log)


def daemon_with_stderr(api, tmp_path, stderr, *flags, close=False):
    """A daemon whose standard error is that descriptor, or is closed."""
    port_file = tmp_path / "port"
    command = [str(BIN / "dejavud"), "--model", str(MODEL), "--listen", "127.0.0.1:0", "--port-file", str(port_file),
               "--metrics-listen", "", *flags]
    if close:
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    process = subprocess.Popen(command, stderr=stderr, stdout=subprocess.DEVNULL)
    poll(port_file.exists, lambda: process.poll())
    stub = api.rpc.GenerationServiceStub(grpc.insecure_channel(f"127.0.0.1:{port_file.read_text().strip()}"))
    poll(lambda: stub.GetServerInfo(api.pb.GetServerInfoRequest(), timeout=PATIENCE_S).state == api.pb.SERVER_STATE_SERVING,
         lambda: process.poll())
    return process, stub


def some_request(api):
    request = api.pb.GenerateRequest()
    request.token_ids.ids.extend([2, 100])
    request.stopping.max_new_tokens = 2
    return request


@pytest.mark.parametrize("kind", ["gone", "full", "closed"])
def test_a_log_that_nobody_reads_stops_nothing(api, tmp_path, kind):
    reader, writer = os.pipe()
    process, stub = daemon_with_stderr(api, tmp_path, writer, "--log-level", "trace", "--log-refused-per-s", "0",
                                       close=kind == "closed")
    try:
        os.close(writer)
        if kind == "gone":
            os.close(reader)
        # More lines than a pipe (64 KiB) and the queue (1 MiB) hold: refusals are cheap, and a line is 400 bytes with
        # such an id.
        wrong = some_request(api)
        wrong.request_id = "z" * 200
        wrong.token_ids.ids[1] = 10**6
        calls = [stub.Generate.future(wrong, timeout=PATIENCE_S) for _ in range(4000)]
        assert {call.code() for call in calls} == {grpc.StatusCode.INVALID_ARGUMENT}
        for _ in range(20):
            assert len(stub.Generate(some_request(api), timeout=PATIENCE_S).token_ids) == 2
        if kind == "full":
            # Who reads again hears how much there is missing.
            text = b""
            while b"log lines were dropped" not in text:
                text = text[-100:] + os.read(reader, 1 << 16)
                if not text.endswith(b"\n"):
                    continue
                stub.GetServerInfo(api.pb.GetServerInfoRequest(), timeout=PATIENCE_S)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=PATIENCE_S) == 0
        if kind != "gone":
            os.close(reader)


def test_a_full_pipe_does_not_hold_up_the_exit(api, tmp_path):
    reader, writer = os.pipe()
    process, stub = daemon_with_stderr(api, tmp_path, writer, "--log-refused-per-s", "0")
    os.close(writer)
    wrong = some_request(api)
    wrong.request_id = "z" * 200
    wrong.token_ids.ids[1] = 10**6
    for call in [stub.Generate.future(wrong, timeout=PATIENCE_S) for _ in range(500)]:
        call.code()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    os.close(reader)
