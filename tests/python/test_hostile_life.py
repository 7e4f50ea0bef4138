"""Groups 13 and 14: signals and limits at any moment of a daemon's life, and faults inside it. Faults of the GPU, of ranks and of the
tokenizer need hooks that there are not; tests/gpu and test_sharding.py have what there is."""
import os
import signal
import socket
import subprocess
import threading
import urllib.request

import grpc
import pytest

import groups
from conftest import BIN, MODEL, PATIENCE_S, Daemon, run_daemon
from groups import PROMPT
from hardening import healthy
from test_hostile_files import TINY, Tensors, folder_with
from test_hostile_files import start as start_that_fails

Code = grpc.StatusCode
BRAKED = ("--scheduler-fault", "slow@5", "--scheduler-deadline-slack", "0")


def outcome(stream):
    """Tokens and code of a stream that is read to its end."""
    tokens = 0
    try:
        for chunk in stream:
            tokens += len(chunk.token_ids)
        return tokens, "OK"
    except grpc.RpcError as error:
        return tokens, error.code().name


@pytest.mark.parametrize("moment", ("idle", "waiting", "prefill", "streaming", "draining"))
def test_group_13_sigterm_at_any_moment(start, moment):
    """What runs ends complete, at a second signal or not; the exit says which."""
    daemon = start(*BRAKED, "--scheduler-max-batch", "2", "--drain-timeout-s", str(PATIENCE_S))
    prompt, count = ([2] + [5] * 400, 1) if moment == "prefill" else (PROMPT, 5 if moment == "waiting" else 2)
    streams = [daemon.stub.GenerateStream(daemon.request(prompt, 60), timeout=PATIENCE_S) for _ in range(0 if moment == "idle" else count)]
    firsts = [next(stream) for stream in streams[:2]] if moment in ("streaming", "draining") else []
    if streams:
        groups.until(lambda: daemon.load().running_requests + daemon.load().waiting_requests == len(streams), daemon.load)
    daemon.terminate()
    ends = [outcome(stream) for stream in streams] if moment != "draining" else []
    if moment == "draining":
        daemon.terminate()  # at once, then
        ends = [outcome(stream) for stream in streams]
        assert all(code in ("OK", "UNAVAILABLE", "CANCELLED") for _, code in ends), ends
    else:
        first = sum(len(chunk.token_ids) for chunk in firsts)
        assert [code for _, code in ends] == ["OK"] * len(streams) and sum(tokens for tokens, _ in ends) + first == 60 * len(streams)
    code = daemon.wait()
    assert code == (0 if all(end[1] == "OK" for end in ends) else 4), daemon.log()
    print(f"group 13: SIGTERM while {moment}")


def test_group_13_signals_by_the_hundred(start):
    daemon = start(*BRAKED)
    watched = groups.Watched(daemon)
    stream = daemon.stub.GenerateStream(daemon.request(PROMPT, 100), timeout=PATIENCE_S)
    first = len(next(stream).token_ids)
    for _ in range(100):
        for number in (signal.SIGHUP, signal.SIGPIPE, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, signal.SIGCHLD, signal.SIGALRM):
            daemon.signal(number)
    daemon.signal(signal.SIGSTOP)
    daemon.signal(signal.SIGCONT)
    tokens, code = outcome(stream)
    assert (first + tokens, code) == (100, "OK")
    print("group 13: 702 signals")
    watched.expect_sound()


@pytest.mark.parametrize("prefix, name", ((["prlimit", "--nofile=64:64"], "64 files"), (["prlimit", "--nofile=256:256"], "256 files"), (["prlimit", "--core=0:0"], "no core"),
                                          (["prlimit", "--stack=256000:256000"], "little stack"), (["prlimit", "--fsize=0:0"], "files of no bytes")))
def test_group_13_limits_of_the_process(api, tmp_path, prefix, name):
    """It serves, or says at the start that it cannot: it never ends by a signal."""
    if name == "files of no bytes":  # what it writes at the start it cannot
        done = run_daemon("--port-file", tmp_path / "port", wrap=prefix)
        assert done.returncode == 1 and str(tmp_path / "port") in done.stderr, done
        return
    daemon = Daemon(api, tmp_path, prefix=prefix)
    try:
        assert len(daemon.stub.Generate(daemon.request(PROMPT, 4), timeout=PATIENCE_S).token_ids) == 4
        peers = []
        for _ in range(100):
            try:
                peers.append(socket.create_connection(("127.0.0.1", int(daemon.address.split(":")[1])), timeout=5))
            except OSError:
                break
        assert len(daemon.stub.Generate(daemon.request(PROMPT, 4), timeout=PATIENCE_S).token_ids) == 4
        for peer in peers:
            peer.close()
        groups.until(lambda: healthy(daemon.address, 5), daemon.log)
        daemon.expect_idle()
    finally:
        daemon.stop()
    assert daemon.process.returncode == 0, daemon.log()
    print(f"group 13: {name}")


def test_group_13_a_log_that_has_gone(api, tmp_path):
    """The reader of its standard error goes away in the middle of the work."""
    reader, writer = os.pipe()
    port, metrics = tmp_path / "port", tmp_path / "metrics_port"
    process = subprocess.Popen([BIN / "dejavud", "--model", MODEL, "--listen", "127.0.0.1:0", "--port-file", port, "--metrics-listen", "127.0.0.1:0",
                                "--metrics-port-file", metrics], stderr=writer, stdout=writer)
    os.close(writer)
    try:
        groups.until(port.exists, lambda: "no port")
        address = f"127.0.0.1:{int(port.read_text())}"
        groups.until(lambda: healthy(address), lambda: "not healthy")
        os.close(reader)
        with grpc.insecure_channel(address) as channel:
            stub = api.rpc.GenerationServiceStub(channel)
            for n in range(50):
                request = api.pb.GenerateRequest()
                request.token_ids.ids.extend(PROMPT)
                request.stopping.max_new_tokens = 2 if n % 2 else 0  # every other one is refused: lines, too
                try:
                    assert len(stub.Generate(request, timeout=PATIENCE_S).token_ids) == 2 and n % 2
                except grpc.RpcError as error:
                    assert error.code() == Code.INVALID_ARGUMENT and not n % 2
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
    print("group 13: a log that has gone")


@pytest.mark.parametrize("fault, flags", (("throw@440", ()), ("hang@440", ("--scheduler-watchdog-s", "1"))))
def test_group_14_a_step_that_fails_is_told_to_all(start, fault, flags):
    """Streams get an error, health says so before the end, and the exit code is 3."""
    daemon = start("--scheduler-fault", fault, *flags)
    streams = [daemon.stub.GenerateStream(daemon.request(PROMPT, 500), timeout=PATIENCE_S) for _ in range(4)]
    ends = [outcome(stream) for stream in streams]
    assert all(code in ("INTERNAL", "UNAVAILABLE") for _, code in ends), ends
    assert daemon.wait() == 3, daemon.log()
    assert not healthy(daemon.address, 1)
    print(f"group 14: {fault}")


def with_weights(at, change):
    """TINY with other bytes of data in its file; `change(header, bytearray)`."""
    tensors = Tensors(TINY / "model.safetensors")
    content = bytearray(tensors.data)
    change(tensors.header, content)
    return folder_with(at, TINY, model__safetensors=tensors.pack(tensors.header, data=bytes(content)))


def test_group_14_weights_that_are_not_finite_stop_the_start(tmp_path):
    for n, (dtype, pattern) in enumerate((("NaN", b"\xff\x7f"), ("infinity", b"\x00\x7c"))):
        def spoil(header, content):
            entry = header["model.decoder.layers.0.fc1.weight"]
            assert entry["dtype"] in ("F16", "F32", "BF16")
            size = 4 if entry["dtype"] == "F32" else 2
            value = {4: {b"\xff\x7f": b"\x00\x00\xc0\x7f", b"\x00\x7c": b"\x00\x00\x80\x7f"}[pattern], 2: pattern}[size]
            content[entry["data_offsets"][0]:entry["data_offsets"][0] + size] = value
        code, said = start_that_fails("--model", with_weights(tmp_path / str(n), spoil))
        assert code == 1 and "not finite" in said, (dtype, said)
    print("group 14: 2 inputs of weights")


def test_group_14_overflow_in_the_model_is_data_loss_for_those_who_meet_it(start, tmp_path):
    """Finite weights whose products are not: of one token's embedding. The others go on."""
    def spoil(header, content):
        entry = next(value for key, value in header.items() if key.endswith("embed_tokens.weight"))
        row = 2 * entry["shape"][1] if entry["dtype"] != "F32" else 4 * entry["shape"][1]
        begin = entry["data_offsets"][0] + 9 * row
        content[begin:begin + row] = ({"F16": b"\xff\x7b", "BF16": b"\x7f\x7f", "F32": b"\xff\xff\x7f\x7f"}[entry["dtype"]] *
                                      entry["shape"][1])
    daemon = start(model=with_weights(tmp_path / "overflow", spoil))
    good = list(daemon.stub.Generate(daemon.request([2, 5], 8), timeout=PATIENCE_S).token_ids)
    codes = set()
    for _ in range(5):
        codes.add(outcome(daemon.stub.GenerateStream(daemon.request([2, 9], 4), timeout=PATIENCE_S))[1])
        assert list(daemon.stub.Generate(daemon.request([2, 5], 8), timeout=PATIENCE_S).token_ids) == good
    assert codes <= {"OK", "DATA_LOSS"}, codes
    daemon.expect_idle()
    assert healthy(daemon.address)
    print("group 14: 5 inputs of a row that overflows")


def test_group_14_blocks_run_out(start):
    """Memory for two of sixteen: the others wait, nobody fails."""
    daemon = start("--kv-memory-mib", "5", "--kv-prefix-cache=false")
    watched = groups.Watched(daemon)
    calls = [daemon.stub.Generate.future(daemon.request([2, 5 + i], 60), timeout=PATIENCE_S) for i in range(16)]
    assert [len(call.result().token_ids) for call in calls] == [60] * 16
    print("group 14: 16 requests for few blocks")
    watched.expect_sound({"OK": 16})


def test_group_14_scrapes(daemon):
    """A scraper that never reads, one that sends a byte at a time, and a thousand scrapes, beside a stream."""
    watched = groups.Watched(daemon)
    host, port = daemon.metrics_address.split(":")
    stuck = [socket.create_connection((host, int(port)), timeout=5) for _ in range(20)]
    for n, peer in enumerate(stuck):
        peer.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n" + (b"\r\n" * 50 if n % 2 else b"X-Slow: "))
    done, failures = [0], []

    def scrape():
        for _ in range(250):
            try:
                with urllib.request.urlopen(f"http://{daemon.metrics_address}/metrics", timeout=PATIENCE_S) as page:
                    assert b"dejavu_requests_total" in page.read()
                done[0] += 1
            except Exception as error:  # whatever it is, a scraper has seen it
                failures.append(error)

    threads = [threading.Thread(target=scrape) for _ in range(4)]
    for thread in threads:
        thread.start()
    tokens, code = outcome(daemon.stub.GenerateStream(daemon.request(PROMPT, 200), timeout=PATIENCE_S))
    for thread in threads:
        thread.join()
    for peer in stuck:
        peer.close()
    assert (tokens, code) == (200, "OK")
    assert not failures, failures[0]
    print("group 14: 1020 scrapes")
    watched.expect_sound({"OK": 1})
