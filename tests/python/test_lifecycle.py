"""The daemon's life: loading, serving, draining, dying, and refusing to start."""
import contextlib
import json
import os
import pathlib
import re
import resource
import signal
import socket
import struct
import subprocess
import threading
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2

from conftest import BIN, MODEL, PARITY, PATIENCE_S, PROCESSES

Status = health_pb2.HealthCheckResponse


def run_daemon(*args, environment=None):
    return subprocess.run([BIN / "dejavud", "--metrics-listen", "", *args], capture_output=True, text=True, timeout=PATIENCE_S,
                          env={**os.environ, **(environment or {})})


@pytest.fixture
def slow_model(tmp_path):
    """A valid checkpoint of zeros, a sparse file of gigabytes: loading it takes a while and no disk."""
    folder = tmp_path / "slow"
    folder.mkdir()
    hidden, ffn, layers, vocab = 4096, 16384, 10, 1024
    config = dict(model_type="opt", hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=32, ffn_dim=ffn,
                  vocab_size=vocab, max_position_embeddings=64, word_embed_proj_dim=hidden, activation_function="relu")
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"embed_tokens.weight": [vocab, hidden], "embed_positions.weight": [66, hidden],
              "final_layer_norm.weight": [hidden], "final_layer_norm.bias": [hidden]}
    for l in range(layers):
        at = f"layers.{l}."
        for p in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{at}self_attn.{p}.weight": [hidden, hidden], f"{at}self_attn.{p}.bias": [hidden]}
        for n in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{at}{n}.weight": [hidden], f"{at}{n}.bias": [hidden]}
        shapes |= {f"{at}fc1.weight": [ffn, hidden], f"{at}fc1.bias": [ffn],
                   f"{at}fc2.weight": [hidden, ffn], f"{at}fc2.bias": [hidden]}
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2
        for d in shape:
            size *= d
        header["model.decoder." + name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + offset)
    return folder


def test_health_is_watched_through_load_serve_and_drain(start, slow_model, api):
    daemon = start(model=slow_model, wait=False)
    seen, serving = [], threading.Event()

    def watch():
        try:
            for reply in daemon.health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S):
                seen.append(reply.status)
                if reply.status == Status.SERVING:
                    serving.set()
        except grpc.RpcError:
            pass  # the server is gone

    watcher = threading.Thread(target=watch)
    watcher.start()
    with pytest.raises(grpc.RpcError) as refused:
        daemon.stub.Generate(daemon.request([2], 1), timeout=PATIENCE_S)
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert daemon.health.Check(health_pb2.HealthCheckRequest(service="liveness")).status == Status.SERVING
    assert serving.wait(PATIENCE_S), daemon.log()
    daemon.terminate()
    assert daemon.wait() == 0
    watcher.join(PATIENCE_S)
    assert seen == [Status.NOT_SERVING, Status.SERVING, Status.NOT_SERVING]


def test_it_says_when_it_loads_warms_up_and_serves(start, slow_model, api):
    daemon = start(model=slow_model, wait=False)
    states = []
    while not states or states[-1] != api.pb.SERVER_STATE_SERVING:
        assert daemon.process.poll() is None, daemon.log()
        state = daemon.stub.GetServerInfo(api.pb.GetServerInfoRequest(), timeout=PATIENCE_S).state
        if not states or states[-1] != state:
            states.append(state)
    assert states == [api.pb.SERVER_STATE_LOADING, api.pb.SERVER_STATE_WARMING, api.pb.SERVER_STATE_SERVING]


def test_sigterm_lets_four_running_streams_end_complete(start):
    daemon = start()
    results, first_tokens = {}, threading.Barrier(5)

    def read(i):
        ids, reason = [], None
        for n, chunk in enumerate(daemon.stub.GenerateStream(daemon.request([2, 100 + i], 450), timeout=PATIENCE_S)):
            if n == 0:
                first_tokens.wait(PATIENCE_S)
            ids.extend(chunk.token_ids)
            if chunk.HasField("finish"):
                reason = chunk.finish.reason
        results[i] = (len(ids), reason)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    first_tokens.wait(PATIENCE_S)
    daemon.terminate()
    for t in threads:
        t.join()
    assert results == {i: (450, 1) for i in range(4)}
    assert daemon.wait() == 0, daemon.log()


def test_new_requests_are_refused_while_draining(start):
    daemon = start("--scheduler-max-batch", "1")
    stream = daemon.stub.GenerateStream(daemon.request([2, 100], 500), timeout=PATIENCE_S)
    next(stream)
    watch = daemon.health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
    assert next(watch).status == Status.SERVING
    daemon.signal(signal.SIGSTOP)  # so that the stream cannot end before the refusal is seen
    daemon.terminate()
    refused = daemon.stub.Generate.future(daemon.request([2], 1), timeout=PATIENCE_S)
    daemon.signal(signal.SIGCONT)
    with pytest.raises(grpc.RpcError) as raised:
        assert next(watch).status == Status.NOT_SERVING
        for _ in range(1000):
            daemon.stub.Generate(daemon.request([2], 1), timeout=PATIENCE_S)
    assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
    assert refused.exception() is None or refused.code() == grpc.StatusCode.UNAVAILABLE
    assert daemon.wait() == 0


def test_a_second_signal_stops_at_once(start):
    daemon = start("--drain-timeout-s", "1000")
    streams = [daemon.stub.GenerateStream(daemon.request([2, i], 500), timeout=PATIENCE_S) for i in range(100)]
    next(streams[0])
    watch = daemon.health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
    next(watch)
    daemon.terminate()
    assert next(watch).status == Status.NOT_SERVING
    daemon.terminate()
    daemon.wait()
    codes = []
    for stream in streams:
        try:
            list(stream)
            codes.append(None)
        except grpc.RpcError as error:
            codes.append(error.code())
    assert any(codes), "every stream ended complete: nothing was stopped"


def has_ended(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_sigterm_while_loading_exits_at_once(start, slow_model):
    daemon = start(model=slow_model, wait=False)
    assert daemon.health.Check(health_pb2.HealthCheckRequest()).status == Status.NOT_SERVING
    ranks = [daemon.pid(rank) for rank in range(PROCESSES)]
    daemon.terminate()
    if PROCESSES == 1:
        assert daemon.wait() == 0 and "stopped by a signal while loading" in daemon.log(), daemon.log()
        return
    # mpirun takes its time to end the others, and has been seen to stay although all had ended: left as zombies.
    deadline = time.monotonic() + PATIENCE_S
    while not all(has_ended(pid) for pid in ranks):
        assert time.monotonic() < deadline, daemon.log()
        time.sleep(0.01)
    daemon.process.kill()
    daemon.wait()


def test_exit_codes_and_messages_when_it_cannot_start(tmp_path):
    for args, code, part in [
        ((), 2, "--model"),
        (("--no-such-flag",), 2, "no-such-flag"),
        (("--threads", "many"), 2, "threads"),
        (("--model", str(tmp_path / "nowhere"), "--listen", "127.0.0.1:0"), 1, "nowhere"),
        (("--sparsity-default-tier", "best"), 2, "sparsity.default_tier"),
        (("--model", str(MODEL), "--sparsity-highest-tier", "high"), 1, "sparsity.default_tier is \"exact\""),
        (("--model", str(MODEL), "--listen", "127.0.0.1:0", "--predictor", "none", "--sparsity-default-tier", "high"), 1,
         "sparsity.default_tier: tier high"),
        (("--model", str(MODEL), "--listen", "not an address"), 2, "not an address"),
        (("--model", str(MODEL), "--listen", "127.0.0.1:0", "--kv-memory-mib", "1"), 1, "512 tokens"),
    ]:
        done = run_daemon(*args)
        assert done.returncode == code, (args, done)
        assert part in done.stderr, (args, done)


def put_fifo(path):
    os.mkfifo(path)


def put_socket(path):
    listener = socket.socket(socket.AF_UNIX)
    with contextlib.chdir(path.parent):  # a path of more than 107 bytes is no address
        listener.bind(path.name)
    listener.close()


# A read of any of them waits for somebody, has no end, or makes no sense.
NO_FILES = {"a FIFO": put_fifo, "a directory": pathlib.Path.mkdir, "a socket": put_socket,
            "a device": lambda path: path.symlink_to("/dev/zero")}
MODEL_FILES = ("config.json", "model.safetensors", "predictor.safetensors", "tokenizer.json", "vocab.json", "merges.txt",
               "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
INSTEAD_OF_TOKENIZER_JSON = ("vocab.json", "merges.txt")  # read only where it is not there


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_holds_up_no_start(tmp_path, kind):
    for name in (*MODEL_FILES, "--config", "--predictor"):
        folder = tmp_path / name.strip("-").replace(".", "_")
        folder.mkdir()
        flags = ["--listen", "127.0.0.1:0", "--model", str(MODEL)]
        if name.startswith("--"):
            odd = folder / "odd"
            flags += [name, str(odd)]
        else:
            for file in MODEL.iterdir():
                if file.name != name and (file.name != "tokenizer.json" or name not in INSTEAD_OF_TOKENIZER_JSON):
                    (folder / file.name).symlink_to(file)
            odd = folder / name
            flags[-1] = str(folder)
        NO_FILES[kind](odd)
        done = run_daemon(*flags)
        assert done.returncode == 1, (name, done)
        assert f"{odd}: is {kind}, not a regular file" in done.stderr, (name, done)


def test_a_fifo_holds_up_no_end(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    done = run_daemon("--model", str(tmp_path / "nowhere"), "--listen", "127.0.0.1:0", "--log-termination-file",
                      str(tmp_path / "fifo"))
    assert done.returncode == 1, done
    assert "cannot write log.termination_file" in done.stderr, done


def test_output_that_does_not_arrive_is_a_failure():
    plan = ("--model", MODEL, "--plan", "--plan-memory-gib", "4", "--plan-bandwidth-gbs", "10")
    for command in [("dejavud", "--help"), ("dejavud", "--version"), ("dejavud", "--print-config"), ("dejavud", *plan),
                    ("dejavu-cli", "--help"), ("dejavu-cli", "--version"), ("dejavu-loadtest", "--help"),
                    ("dejavu-calibrate", "--help"), ("dejavu-convert", "--help"), ("dejavu-eval", "--version"),
                    ("dejavu-sim", "--help"), ("dejavu-sim", "--rate", "1", "--seconds", "1"),
                    ("dejavu-bench", "--help")]:
        if not (BIN / command[0]).exists():  # an image has fewer
            continue
        for target, code in [("/dev/full", 1), ("/dev/null", 0)]:
            with open(target, "wb") as out:
                done = subprocess.run([BIN / command[0], *command[1:]], stdout=out, stderr=subprocess.PIPE, text=True,
                                      timeout=PATIENCE_S)
            assert done.returncode == code, (command, done)
            assert ("cannot write to standard output" in done.stderr) == (code == 1), (command, done)


def test_cpu_target_names_what_there_is(start):
    """Of the kernels that this processor has each serves, and any other is refused by the names of those."""
    done = run_daemon("--version", "--verbose")
    assert done.returncode == 0, done
    used, names = re.fullmatch(r"dejavud \S+\nCPU kernels: (\S+), the best of (.+)\n", done.stdout).groups()
    names = names.split(", ")
    assert names[0] == used
    worst = start("--cpu-target", names[-1])
    assert f"CPU kernels: {names[-1]}, as cpu_target asks" in worst.log()
    done = run_daemon("--model", str(MODEL), "--listen", "127.0.0.1:0", "--device", "cpu", "--cpu-target", "pdp11")
    assert done.returncode == 1 and f'cpu_target is "pdp11"; what this processor has and this build knows: {", ".join(names)}' in done.stderr, done
    assert run_daemon("--verbose").returncode == 2


@pytest.mark.parametrize("resource_name", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_memory_that_is_refused_ends_the_start_with_a_message(tmp_path, resource_name):
    """At some of the limits it serves, at the others it says what it lacks: with 1 where it could not start, with 3 where it could
    and a thread that gRPC starts later found no room."""
    limited = lambda mib: lambda: resource.setrlimit(getattr(resource, resource_name), (mib << 20, mib << 20))
    if subprocess.run([BIN / "dejavud", "--version"], preexec_fn=limited(3000), capture_output=True).returncode != 0:
        pytest.skip("a sanitizer takes terabytes of address space")
    served = refused = 0
    for mib in (40, 60, 80, 100, 130, 160, 200, 250, 300, 350, 400, 500, 650, 900, 1400, 3000):
        log = tmp_path / f"{mib}.log"
        with open(log, "wb") as out:
            process = subprocess.Popen(
                [BIN / "dejavud", "--model", MODEL, "--listen", "127.0.0.1:0", "--metrics-listen", "", "--threads", "2"],
                stdout=subprocess.DEVNULL, stderr=out, preexec_fn=limited(mib))
        try:
            deadline = time.monotonic() + PATIENCE_S
            while process.poll() is None and " serving " not in log.read_text(errors="replace"):
                assert time.monotonic() < deadline, (mib, log.read_text())
                time.sleep(0.02)
            if process.poll() is None:
                process.terminate()
            code, text = process.wait(timeout=PATIENCE_S), log.read_text(errors="replace")
            if code == 0:
                served += 1
            elif code == -signal.SIGABRT and "low_level_alloc" in text:  # Abseil's locks, which have room or end the process
                assert re.search(r"mmap error: \d+", text), (mib, text)
                refused += 1
            elif "error while loading shared libraries" not in text:  # that is the system's affair
                assert code in ([3] if " serving " in text else [1, 3]), (mib, code, text)
                assert re.search(r"\d+ bytes|GiB|thread", text.splitlines()[-1]), (mib, text)
                refused += 1
        finally:
            process.kill()
            process.wait()
    assert served > 0 and refused > 0


# The two ways to have no GPU that hold on every machine: none that the process may see, and no module to ask.
NO_GPU = [({"CUDA_VISIBLE_DEVICES": ""}, ("no NVIDIA driver", "no CUDA device", "no CUDA module")),
          ({"DEJAVU_CUDA_MODULE": "/nowhere/libdejavu_cuda.so"}, ("no CUDA module: /nowhere/libdejavu_cuda.so",))]


@pytest.mark.parametrize("environment, missing", NO_GPU)
def test_device_cuda_without_a_gpu_says_what_is_missing(environment, missing):
    done = run_daemon("--model", str(MODEL), "--listen", "127.0.0.1:0", "--device", "cuda", environment=environment)
    assert done.returncode == 1, done
    assert "device cuda: " in done.stderr and any(part in done.stderr for part in missing), done


@pytest.mark.parametrize("environment, missing", NO_GPU)
def test_device_auto_without_a_gpu_serves_on_the_cpu_and_says_why(start, api, environment, missing):
    daemon = start("--device", "auto", environment=environment)
    assert "cpu" in daemon.stub.GetServerInfo(api.pb.GetServerInfoRequest(), timeout=PATIENCE_S).backend
    assert len(daemon.stub.Generate(daemon.request([2, 5, 7], 4), timeout=PATIENCE_S).token_ids) == 4
    assert any("device auto: " in line and part in line for line in daemon.log().splitlines() for part in missing)


def test_a_port_in_use_is_refused_by_name():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run_daemon("--model", str(MODEL), "--listen", address)
    assert done.returncode == 1 and address in done.stderr, done


def test_a_port_of_another_dejavud_is_refused(daemon):
    done = run_daemon("--model", str(MODEL), "--listen", daemon.address)
    assert done.returncode == 1 and daemon.address in done.stderr, done


def test_hostile_checkpoints_are_refused_with_file_and_reason(tmp_path):
    header = json.dumps({"model.decoder.embed_tokens.weight": {"dtype": "F32", "shape": [10, 4], "data_offsets": [0, 160]}}).encode()
    for content, part in [
        (b"", "model.safetensors"),
        (struct.pack("<Q", 2**63) + b"{}", "model.safetensors"),
        (struct.pack("<Q", len(header)) + header, "embed_tokens"),  # data missing
    ]:
        (tmp_path / "config.json").write_text('{"model_type": "opt"}')
        (tmp_path / "model.safetensors").write_bytes(content)
        done = run_daemon("--model", str(tmp_path), "--listen", "127.0.0.1:0")
        assert done.returncode == 1 and part in done.stderr, done
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    done = run_daemon("--model", str(tmp_path), "--listen", "127.0.0.1:0")
    assert done.returncode == 1 and "llama" in done.stderr, done


def test_without_a_tokenizer_token_ids_are_served_and_text_is_refused(start, api):
    daemon = start(model=PARITY / "pre-norm-hd64")
    assert len(daemon.stub.Generate(daemon.request([2, 5, 7], 4), timeout=PATIENCE_S).token_ids) == 4
    for call in (lambda: daemon.stub.Generate(api.pb.GenerateRequest(text="Hello")),
                 lambda: daemon.stub.Tokenize(api.pb.TokenizeRequest(text="Hello"))):
        with pytest.raises(grpc.RpcError) as raised:
            call()
        assert raised.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert not daemon.stub.GetModelInfo(api.pb.GetModelInfoRequest()).has_tokenizer


def test_a_full_queue_is_refused_with_a_retry_delay(start):
    from google.rpc import error_details_pb2
    from test_client import details
    daemon = start("--scheduler-max-batch", "1", "--scheduler-max-waiting-requests", "1")
    streams = [daemon.stub.GenerateStream(daemon.request([2, 100], 500), timeout=PATIENCE_S) for _ in range(12)]
    refused = []
    for stream in streams:
        try:
            list(stream)
        except grpc.RpcError as error:
            refused.append(error)
    assert refused
    for error in refused:
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details(error, error_details_pb2.RetryInfo).retry_delay.ToNanoseconds() > 0
    daemon.expect_idle()
