"""What operators see and do: AdminService on a listener of its own, and the status page on the metrics port."""
import json
import pathlib
import re
import shutil
import subprocess
import threading
import time
import urllib.request

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from conftest import BIN, MODEL, PATIENCE_S

TIERS = {"dense": 1, "exact": 2, "high": 3, "balanced": 4, "fast": 5}


class Operator:
    """A daemon's AdminService."""

    def __init__(self, api, address):
        self.pb = api.admin_pb
        self.address = address
        self.channel = grpc.insecure_channel(address)
        self.stub = api.admin_rpc.AdminServiceStub(self.channel)

    def state(self):
        return self.stub.GetEngineState(self.pb.GetEngineStateRequest(), timeout=PATIENCE_S)

    def set_default_tier(self, tier):
        return self.stub.SetDefaultTier(self.pb.SetDefaultTierRequest(tier=TIERS.get(tier, tier)), timeout=PATIENCE_S)

    def reload(self):
        return self.stub.ReloadPredictor(self.pb.ReloadPredictorRequest(), timeout=PATIENCE_S)

    def profile(self, steps, timeout_s=0.0):
        return self.stub.Profile(self.pb.ProfileRequest(steps=steps, timeout_s=timeout_s), timeout=PATIENCE_S)

    def trace(self):
        return self.stub.DumpTrace(self.pb.DumpTraceRequest(), timeout=PATIENCE_S)

    def cli(self, *args):
        return subprocess.run([BIN / "dejavu-cli", "--admin-server", self.address, "admin", *args], capture_output=True,
                              text=True, timeout=PATIENCE_S)


@pytest.fixture
def operated(start, api, tmp_path):
    """Starts a daemon with an admin listener; returns it and its operator."""
    def start_one(*flags, **options):
        port_file = tmp_path / "admin_port"
        daemon = start("--admin-listen", "127.0.0.1:0", "--admin-port-file", port_file, *flags, **options)
        operator = Operator(api, f"127.0.0.1:{int(port_file.read_text())}")
        operator.state()  # connected, before a stream that it is quicker than
        return daemon, operator

    return start_one


def code_of(call):
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value.code(), error.value.details()


def begun_stream(daemon, request_id, tokens=480, metadata=(), **fields):
    """A stream that has shown its first token, so that it decodes."""
    request = daemon.request([2, 5, 7], tokens, request_id=request_id, **fields)
    stream = daemon.stub.GenerateStream(request, timeout=PATIENCE_S, metadata=metadata)
    next(chunk for chunk in stream if chunk.token_ids)
    return stream


def get(daemon, path):
    with urllib.request.urlopen(f"http://{daemon.metrics_address}{path}", timeout=PATIENCE_S) as reply:
        return reply.read(), reply.headers


def services(address):
    with grpc.insecure_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        for reply in stub.ServerReflectionInfo(iter([ask]), timeout=PATIENCE_S):
            return {service.name for service in reply.list_services_response.service}


def test_the_public_port_knows_no_admin_service(operated, api):
    daemon, operator = operated()
    public = Operator(api, daemon.address)
    for call in (public.state, public.reload, public.trace, lambda: public.profile(1),
                 lambda: public.set_default_tier("fast"),
                 lambda: public.stub.Drain(public.pb.DrainRequest(), timeout=PATIENCE_S),
                 lambda: public.stub.AbortRequest(api.pb.AbortRequest(request_id="x"), timeout=PATIENCE_S)):
        assert code_of(call)[0] == grpc.StatusCode.UNIMPLEMENTED
    assert "dejavu.v1.AdminService" not in services(daemon.address)
    assert services(operator.address) == {"dejavu.v1.AdminService", "grpc.reflection.v1.ServerReflection",
                                          "grpc.reflection.v1alpha.ServerReflection"}
    # Nor is there anything to generate on the operators' port.
    generation = api.rpc.GenerationServiceStub(operator.channel)
    assert code_of(lambda: generation.Generate(daemon.request([2], 1), timeout=PATIENCE_S))[0] == \
        grpc.StatusCode.UNIMPLEMENTED


def test_it_is_off_by_default(start, tmp_path):
    port_file = tmp_path / "admin_port"
    daemon = start("--admin-port-file", port_file)
    assert not port_file.exists()
    assert "operators" not in daemon.log()


def test_an_address_that_is_taken_stops_the_start(start, tmp_path):
    daemon = start()
    refused = subprocess.run([BIN / "dejavud", "--model", MODEL, "--listen", "127.0.0.1:0", "--metrics-listen", "",
                              "--admin-listen", daemon.address], capture_output=True, text=True, timeout=PATIENCE_S)
    assert refused.returncode == 1
    assert f"cannot listen on {daemon.address}" in refused.stderr


def test_the_state_tells_load_requests_and_layers(operated, api):
    daemon, operator = operated()
    stream = begun_stream(daemon, "mine", sparsity=api.pb.Sparsity(tier=5, shadow_every=2))
    for _ in range(20):
        next(stream)
    state = operator.state()
    assert state.server.state == api.pb.SERVER_STATE_SERVING
    assert state.server.load.running_requests == 1
    assert list(state.live_request_ids) == ["mine"]
    assert [layer.layer for layer in state.layers] == list(range(8))
    for layer in state.layers:
        assert layer.decode_rows > 0 and layer.shadow_rows > 0
        assert 0 < layer.mlp_density < 0.5 and 0 < layer.union_density < 0.5 and 0 < layer.head_density <= 1
        assert 0 < layer.recall <= 1 and 0 < layer.precision <= 1 and 0 <= layer.missed_mass < 1
    stream.cancel()
    told = json.loads(operator.cli("state", "--json").stdout)
    assert told["state"] == "SERVING" and len(told["layers"]) == 8


def test_an_operator_ends_a_request_of_any_tenant(operated, api):
    daemon, operator = operated(model="synthetic:opt-125m")
    stream = begun_stream(daemon, "theirs", tokens=1900, metadata=[("x-tenant", "somebody")])
    reply = operator.stub.AbortRequest(api.pb.AbortRequest(request_id="theirs"), timeout=PATIENCE_S)
    assert reply.found
    code, details = code_of(lambda: list(stream))
    assert code == grpc.StatusCode.CANCELLED and "aborted" in details
    assert not operator.stub.AbortRequest(api.pb.AbortRequest(request_id="theirs"), timeout=PATIENCE_S).found
    gone = operator.cli("abort", "theirs")
    assert (gone.returncode, gone.stdout) == (1, "no such request\n")
    daemon.expect_idle()


def test_the_default_tier_is_that_of_new_requests(operated, api):
    daemon, operator = operated("--sparsity-lowest-tier", "balanced")
    running = begun_stream(daemon, "old", tokens=60)
    assert operator.set_default_tier("balanced").previous == api.pb.TIER_EXACT
    info = daemon.stub.GetServerInfo(api.pb.GetServerInfoRequest(), timeout=PATIENCE_S)
    assert info.sparsity.default_tier == api.pb.TIER_BALANCED
    reply = daemon.stub.Generate(daemon.request([2, 5], 4), timeout=PATIENCE_S)
    assert reply.prompt.tier == reply.finish.sparsity.tier == api.pb.TIER_BALANCED
    asked = daemon.request([2, 5], 4, sparsity=api.pb.Sparsity(tier=api.pb.TIER_DENSE))
    assert daemon.stub.Generate(asked, timeout=PATIENCE_S).prompt.tier == api.pb.TIER_DENSE
    assert list(running)[-1].finish.sparsity.tier == api.pb.TIER_EXACT

    code, details = code_of(lambda: operator.set_default_tier("fast"))
    assert code == grpc.StatusCode.INVALID_ARGUMENT and "dense to balanced" in details
    assert code_of(lambda: operator.set_default_tier(0))[0] == grpc.StatusCode.INVALID_ARGUMENT
    done = operator.cli("set-default-tier", "high", "--json")
    assert json.loads(done.stdout) == {"tier": "high", "previous": "balanced"}


def test_a_default_tier_that_nothing_serves_is_refused(operated):
    _, operator = operated("--predictor", "none")
    code, details = code_of(lambda: operator.set_default_tier("fast"))
    assert code == grpc.StatusCode.FAILED_PRECONDITION and "predictor" in details


def test_a_predictor_is_read_again_while_requests_run(operated, api, tmp_path):
    """First one that selects nothing of its layers, as if it had been spoiled; then the good one."""
    good = (MODEL / "predictor.safetensors").read_bytes()
    path = tmp_path / "predictor.safetensors"
    path.write_bytes(good)
    daemon, operator = operated("--predictor", path, "--no-sparsity-fallback")
    tier = api.pb.Sparsity(tier=api.pb.TIER_FAST, deterministic=True)
    ask = lambda: daemon.stub.Generate(daemon.request([2, 5, 7], 30, sparsity=tier), timeout=PATIENCE_S)
    expected = ask()
    stream = begun_stream(daemon, "meanwhile", sparsity=tier)

    path.write_bytes(without_neurons(good))
    assert operator.reload().path == str(path)
    spoiled = ask()
    assert list(spoiled.token_ids) != list(expected.token_ids)
    assert spoiled.finish.sparsity.mlp_density < 0.1 * expected.finish.sparsity.mlp_density
    next(stream)

    path.write_bytes(good)
    assert operator.cli("reload-predictor").returncode == 0
    again = ask()
    assert list(again.token_ids) == list(expected.token_ids)
    assert again.finish.sparsity.mlp_density == pytest.approx(expected.finish.sparsity.mlp_density, abs=1e-9)
    stream.cancel()


def test_a_predictor_that_does_not_fit_leaves_the_old_one(operated, api, tmp_path):
    good = (MODEL / "predictor.safetensors").read_bytes()
    path = tmp_path / "predictor.safetensors"
    path.write_bytes(good)
    daemon, operator = operated("--predictor", path)
    ask = lambda: list(daemon.stub.Generate(
        daemon.request([2, 5, 7], 20, sparsity=api.pb.Sparsity(tier=api.pb.TIER_FAST)), timeout=PATIENCE_S).token_ids)
    expected = ask()
    path.write_bytes(good[:-100])
    assert code_of(operator.reload)[0] == grpc.StatusCode.INVALID_ARGUMENT
    # Of other weights.
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8:8 + size])
    meta = json.loads(header["__metadata__"]["dejavu.predictor"])
    digest = meta["weights"].removeprefix("sha256:")
    other = good.replace(digest.encode(), digest[::-1].encode())
    assert other != good
    path.write_bytes(other)
    assert code_of(operator.reload)[0] == grpc.StatusCode.FAILED_PRECONDITION
    path.unlink()
    assert code_of(operator.reload)[0] in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT,
                                           grpc.StatusCode.UNAVAILABLE)
    assert ask() == expected


def test_without_a_predictor_there_is_none_to_read_again(operated):
    _, operator = operated("--predictor", "none")
    code, details = code_of(operator.reload)
    assert code == grpc.StatusCode.FAILED_PRECONDITION and "no predictor is loaded" in details


def test_several_ranks_keep_their_predictor(operated):
    _, operator = operated("--tensor-parallel", "2")
    assert code_of(operator.reload)[0] == grpc.StatusCode.UNIMPLEMENTED


def without_neurons(predictor):
    """The same file with thresholds that no neuron exceeds."""
    size = int.from_bytes(predictor[:8], "little")
    header = json.loads(predictor[8:8 + size])
    out = bytearray(predictor)
    changed = 0
    for name, tensor in header.items():
        if name == "__metadata__" or "threshold" not in name or "neuron" not in name:
            continue
        begin, end = (8 + size + offset for offset in tensor["data_offsets"])
        out[begin:end] = b"\x00\x7c" * ((end - begin) // 2)
        changed += 1
    assert changed > 0, list(header)
    return bytes(out)


def test_a_profile_holds_the_next_steps(operated, api):
    daemon, operator = operated()
    stream = begun_stream(daemon, "profiled", sparsity=api.pb.Sparsity(tier=api.pb.TIER_FAST, shadow_every=2))
    before = daemon.load().steps
    steps = operator.profile(50).steps
    stream.cancel()
    assert len(steps) == 50
    assert [step.step for step in steps] == sorted({step.step for step in steps})
    assert steps[0].step >= before and steps[0].start_seconds == 0
    for step in steps:
        assert step.phase == operator.pb.STEP_PHASE_DECODE and step.decode_rows == 1 and step.prefill_rows == 0
        assert step.forward_ms > 0 and step.weight_bytes > 0
        parts = step.plan_ms + step.shadow_ms + step.forward_ms + step.handout_ms
        assert parts == pytest.approx(step.total_ms, rel=0.01, abs=0.01)
    shadowed = [step for step in steps if step.shadow_rows]
    assert 20 <= len(shadowed) <= 30 and all(step.shadow_ms > 0 for step in shadowed)


def test_a_profile_of_an_idle_engine_ends(operated):
    _, operator = operated()
    code, details = code_of(lambda: operator.profile(10, timeout_s=0.2))
    assert code == grpc.StatusCode.UNAVAILABLE and "nothing to do" in details
    for steps, seconds in ((0, 1), (1001, 1), (1, -1), (1, 601), (1, float("nan"))):
        assert code_of(lambda: operator.profile(steps, seconds))[0] == grpc.StatusCode.INVALID_ARGUMENT
    assert operator.cli("profile", "--seconds", "0.1").returncode == 3


def test_a_profile_whose_client_has_gone_lets_the_next_one_in(operated):
    daemon, operator = operated()
    gone = operator.stub.Profile.future(operator.pb.ProfileRequest(steps=1000, timeout_s=600), timeout=PATIENCE_S)
    gone.cancel()
    stream = begun_stream(daemon, "next")
    assert len(operator.profile(3).steps) == 3
    stream.cancel()


def test_the_trace_holds_the_slowest_tokens(operated):
    daemon, operator = operated()
    assert json.loads(operator.trace().json)["traceEvents"][0]["args"]["name"] == "steps"
    daemon.stub.Generate(daemon.request([2, 5, 7], 150), timeout=PATIENCE_S)
    reply = operator.trace()
    events = json.loads(reply.json)["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    steps = [event for event in spans if event["name"] == "step"]
    gaps = [event for event in spans if event["name"] == "token gap"]
    assert len(gaps) == reply.slow_tokens == 64 and len(steps) == reply.steps == 150
    for span in spans:
        assert {"name", "ph", "pid", "tid", "ts", "dur", "args"} <= set(span)
    for gap in gaps:
        args = gap["args"]
        assert {"sequence", "generated_tokens", "gap_ms", "steps_in_gap", "step", "phase", "rows", "decode_rows",
                "prefill_rows", "shadow_rows", "total_ms", "plan_ms", "shadow_ms", "forward_ms", "handout_ms",
                "weight_bytes"} == set(args)
        assert args["phase"] == "decode" and args["rows"] == 1 and args["steps_in_gap"] == 1
        assert gap["dur"] == pytest.approx(1000 * args["gap_ms"], rel=1e-3)
        assert args["gap_ms"] >= 0.9 * args["forward_ms"]
    # Slowest of all 149 there were: none of the steps that left no trace took longer than the quickest that did.
    kept = {gap["args"]["step"] for gap in gaps}
    quickest = min(gap["dur"] for gap in gaps)
    others = [step["dur"] for step in steps if step["args"]["step"] not in kept and step["args"]["phase"] == "decode"]
    assert len(others) == 85 and sorted(others)[len(others) // 2] <= quickest
    parts = [event for event in spans if event["name"] in ("plan", "shadow", "forward", "handout")]
    for step in steps:
        inside = sum(p["dur"] for p in parts if step["ts"] - 0.01 <= p["ts"] < step["ts"] + step["dur"])
        assert inside == pytest.approx(step["dur"], rel=0.02, abs=2)


def test_the_trace_is_written_to_a_file(operated, tmp_path):
    daemon, operator = operated()
    daemon.stub.Generate(daemon.request([2, 5, 7], 10), timeout=PATIENCE_S)
    path = tmp_path / "trace.json"
    told = operator.cli("trace", "--output", str(path), "--json")
    assert json.loads(told.stdout) == {"output": str(path), "slow_tokens": 9, "steps": 10}
    assert len(json.loads(path.read_text())["traceEvents"]) > 19


def test_an_operator_drains_as_a_signal_does(operated, api):
    daemon, operator = operated("--drain-linger-ms", "3000")  # still there for a second call
    stream = begun_stream(daemon, "last", tokens=200)
    drain = lambda: operator.stub.Drain(operator.pb.DrainRequest(), timeout=PATIENCE_S)
    assert not drain().already
    assert drain().already  # and no second signal
    chunks = list(stream)
    assert chunks[-1].finish.generated_tokens == 200
    assert daemon.wait() == 0, daemon.log()
    assert "drained" in daemon.log()


def test_drain_and_state_answer_while_the_model_is_loading(operated, api):
    """The others need the model."""
    daemon, operator = operated(wait=False, model="synthetic:opt-1.3b")
    if operator.state().server.state != api.pb.SERVER_STATE_LOADING:
        pytest.fail("a model of 1.3 B parameters was loaded at once")
    assert len(operator.state().layers) == 0
    for call in (operator.trace, operator.reload, lambda: operator.profile(1), lambda: operator.set_default_tier("fast")):
        assert code_of(call)[0] == grpc.StatusCode.UNAVAILABLE
    operator.cli("drain")
    assert daemon.wait() == 0


def test_the_status_page_has_what_the_daemon_reports(operated, api):
    daemon, _ = operated()
    page, headers = get(daemon, "/")
    assert headers["Content-Type"].startswith("text/html")
    text = page.decode()
    assert "/status.json" in text
    assert "http://" not in text and "https://" not in text  # nothing from elsewhere
    for _ in range(3):
        daemon.stub.Generate(daemon.request([2, 5, 7], 40, sparsity=api.pb.Sparsity(tier=5)), timeout=PATIENCE_S)
    daemon.expect_idle()
    body, headers = get(daemon, "/status.json")
    assert headers["Content-Type"] == "application/json"
    status = json.loads(body)
    info = daemon.stub.GetServerInfo(api.pb.GetServerInfoRequest(), timeout=PATIENCE_S)
    assert (status["state"], status["model"], status["version"]) == ("serving", info.model, info.version)
    assert status["default_tier"] == "exact" and status["backend"] == info.backend
    load = status["load"]
    assert load["generated_tokens"] == info.load.generated_tokens == 120
    assert load["prompt_tokens"] == info.load.prompt_tokens
    assert load["steps"] == info.load.steps
    assert (load["kv_blocks_total"], load["kv_blocks_free"]) == (info.load.kv_blocks_total, info.load.kv_blocks_free)
    assert status["requests"]["finished"] == 3
    first, between = status["latency"]["time_to_first_token"], status["latency"]["inter_token"]
    assert sum(first["counts"]) == 3 and sum(between["counts"]) == 117
    assert len(between["counts"]) == len(between["edges"]) + 1 and between["sum"] > 0
    assert len(status["layers"]) == 8
    for layer in status["layers"]:
        assert layer["decode_rows"] == 117 and 0 < layer["mlp_density"] <= layer["union_density"] + 1e-9 < 0.5
    assert status["sparsity"]["weight_bytes_saved"] > 0
    assert status["step"]["parts"]["forward"] > 0


def test_the_status_page_says_that_the_model_is_loading(operated):
    daemon, _ = operated(wait=False, model="synthetic:opt-1.3b")
    status = json.loads(get(daemon, "/status.json")[0])
    assert status["state"] == "loading" and "load" not in status
    daemon.terminate()
    daemon.wait()


def test_the_status_page_renders_without_errors(operated, api, tmp_path):
    daemon, _ = operated()
    done = threading.Event()

    def work(seed):
        while not done.is_set():
            request = daemon.request([2, 5, 7, seed], 60, sparsity=api.pb.Sparsity(tier=5, shadow_every=8))
            daemon.stub.Generate(request, timeout=PATIENCE_S)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(10, 13)]
    for worker in workers:
        worker.start()
    try:
        shot = pathlib.Path(tmp_path / "page.png")
        shown = chromium(daemon, tmp_path, "--dump-dom")
        chromium(daemon, tmp_path, f"--screenshot={shot}", "--window-size=1160,1000")
    finally:
        done.set()
        for worker in workers:
            worker.join()
    assert "CONSOLE" not in shown.stderr, shown.stderr
    page = shown.stdout
    assert 'id="state" class="state good">serving<' in page and "data-error" not in page
    assert len(re.findall(r"<title>layer \d", page)) == 8
    assert shot.read_bytes().startswith(b"\x89PNG")


def chromium(daemon, folder, *flags):
    return subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         "--disable-background-networking", "--enable-logging=stderr", f"--user-data-dir={folder / 'chromium'}",
         "--virtual-time-budget=8000", *flags, f"http://{daemon.metrics_address}/"],
        capture_output=True, text=True, timeout=PATIENCE_S, check=True)
