"""Scheduling as clients see it: who is refused and why, how requests end in every state, and what they share."""
import signal
import subprocess
import threading
import time

import grpc
import pytest
from google.rpc import error_details_pb2

from conftest import BIN, PATIENCE_S
from test_client import details, expect_error

MAX_TIME, LENGTH = 5, 1
# Steps of some milliseconds: long enough to meet a request in any state.
SLOW_MODEL = "synthetic:opt-125m"


def wait_for(daemon, condition):
    """Until the server's load says so: bounded, and without a guess about how long things take."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition(load := daemon.load()):
        assert time.monotonic() < deadline, load
        time.sleep(0.002)


def info(daemon, api):
    return daemon.stub.GetServerInfo(api.pb.GetServerInfoRequest(), timeout=PATIENCE_S)


def expect_books_balanced(daemon, api):
    a = info(daemon, api).admission
    assert a.received == a.finished + a.cancelled + a.failed + a.live + sum(a.refused.values()), a
    return a


def read(stream, chunks):
    try:
        for chunk in stream:
            chunks.append(chunk)
    except grpc.RpcError as error:
        return error
    return None


def prompt(length, start=10):
    return [2] + [start + i % 500 for i in range(length - 1)]


# Queued, in prefill (a step takes one token of a prompt), between tokens, during the last token.
STATES = ("queued", "prefill", "decode", "last")
TOKENS = {"queued": 200, "prefill": 200, "decode": 2000, "last": 8}
CODES = {"cancel": grpc.StatusCode.CANCELLED, "abort": grpc.StatusCode.CANCELLED,
         "deadline": grpc.StatusCode.DEADLINE_EXCEEDED, "slow reader": grpc.StatusCode.RESOURCE_EXHAUSTED}


@pytest.fixture(scope="module")
def slow(api, tmp_path_factory):
    from conftest import Daemon
    daemon = Daemon(api, tmp_path_factory.mktemp("slow"), "--scheduler-max-batch", "2", "--scheduler-prefill-chunk-tokens", "1",
                    "--scheduler-deadline-slack", "0", "--transport-max-outbox-bytes", "1024", "--weights", "int8",
                    "--kv-prefix-cache=false", model=SLOW_MODEL)
    yield daemon
    daemon.stop()
    assert daemon.process.returncode == 0, daemon.log()


def ask(slow, api, state, way):
    """The stream of a request that is to end in this way in that state."""
    victim = slow.request(prompt(1000 if state == "prefill" else 4, 900), TOKENS[state], request_id="victim")
    # A deadline meets it in its state because the state lasts longer; the last token may win the race.
    timeout = {"queued": 0.2, "prefill": 0.3, "decode": 0.5, "last": 0.05}[state] if way == "deadline" else PATIENCE_S
    if way != "slow reader":
        return slow.stub.GenerateStream(victim, timeout=timeout)
    # A connection of its own, whose window stays small; and output enough to fill window and outbox, but at the end.
    channel = grpc.insecure_channel(slow.address, options=[("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)])
    if state != "last":
        victim.output.top_logprobs = 100
        victim.stopping.max_new_tokens = 400
        victim.stopping.min_new_tokens = 400
    return api.rpc.GenerationServiceStub(channel).GenerateStream(victim, timeout=timeout)


def wait_for_state(slow, state, stream):
    """Until the stream's request is in it. Returns the chunks that came until then."""
    chunks = []
    if state == "queued":
        wait_for(slow, lambda load: load.waiting_requests == 1)
    elif state == "prefill":
        before = slow.load().prompt_tokens
        wait_for(slow, lambda load: load.prompt_tokens > before + 10)
    else:
        wanted = 1 if state == "decode" else TOKENS[state] - 1
        while sum(len(c.token_ids) for c in chunks) < wanted:
            chunks.append(next(stream))
    return chunks


@pytest.mark.parametrize("way", CODES)
@pytest.mark.parametrize("state", STATES)
def test_a_request_ends_in_every_state_and_hurts_nobody(slow, api, state, way):
    neighbour = slow.request(prompt(4), 60)
    alone = list(slow.stub.Generate(neighbour, timeout=PATIENCE_S).token_ids)
    blockers = []
    if state == "queued":
        blockers = [slow.stub.GenerateStream(slow.request(prompt(3, 600 + i), 1500), timeout=PATIENCE_S) for i in range(2)]
        wait_for(slow, lambda load: load.running_requests == 2)
    else:
        beside = slow.stub.Generate.future(neighbour, timeout=PATIENCE_S)

    stream, chunks = ask(slow, api, state, way), []
    if way in ("cancel", "abort"):
        chunks = wait_for_state(slow, state, stream)
        if way == "cancel":
            stream.cancel()
        else:
            found = slow.stub.Abort(api.pb.AbortRequest(request_id="victim"), timeout=PATIENCE_S).found
            assert found or state == "last"
    if way == "slow reader":
        # Nobody reads, and yet its memory is given back. In the queue that is nothing yet: the others have to go first.
        for blocker in blockers:
            blocker.cancel()
        if state != "queued":
            assert list(beside.result(timeout=PATIENCE_S).token_ids) == alone
        wait_for(slow, lambda load: load.running_requests == 0 and load.waiting_requests == 0)

    error = read(stream, chunks)
    if error is None:
        assert state == "last" and chunks[-1].finish.generated_tokens == TOKENS[state]
    else:
        assert error.code() == CODES[way], error
    for blocker in blockers:
        blocker.cancel()
    if state != "queued" and way != "slow reader":
        assert list(beside.result(timeout=PATIENCE_S).token_ids) == alone
    slow.expect_idle()
    expect_books_balanced(slow, api)


def test_a_deadline_that_cannot_be_met_is_refused_at_once_with_the_time_it_would_take(start, api):
    daemon = start("--weights", "int8", model=SLOW_MODEL)
    steps = daemon.load().steps
    error = expect_error(lambda: daemon.stub.Generate(daemon.request(prompt(100), 1800), timeout=2),
                         grpc.StatusCode.DEADLINE_EXCEEDED)
    assert details(error, error_details_pb2.ErrorInfo).reason == "DEADLINE_INFEASIBLE"
    assert details(error, error_details_pb2.RetryInfo).retry_delay.ToNanoseconds() > 0
    assert "would take about" in error.details()
    assert daemon.load().steps == steps, "it never ran"
    assert expect_books_balanced(daemon, api).refused["DEADLINE_INFEASIBLE"] == 1
    costs = info(daemon, api).cost_model
    assert costs.steps > 0 and costs.exact_ms > 0 and costs.prefill_token_ms > 0


def stand_still(daemon, seconds):
    """As under a debugger, behind a laptop's lid, or in a live migration."""
    daemon.signal(signal.SIGSTOP)
    time.sleep(seconds)
    daemon.signal(signal.SIGCONT)


def test_a_pause_of_the_process_makes_no_deadline_infeasible(start, api):
    daemon = start("--threads", "1", "--no-pin-threads")
    call = daemon.request(prompt(4), 100)

    def took_s():
        began = time.monotonic()
        daemon.stub.Generate(call, timeout=PATIENCE_S)
        return time.monotonic() - began

    enough_s = max(0.2, 4 * min(took_s() for _ in range(5)))
    for _ in range(4):
        stream = daemon.stub.GenerateStream(daemon.request(prompt(4), 400), timeout=PATIENCE_S)
        next(stream)
        stand_still(daemon, 4)
        assert read(stream, []) is None
    daemon.expect_idle()
    # The machine may be too busy for that deadline; the server, which is idle, may not think so.
    for _ in range(50):
        try:
            assert len(daemon.stub.Generate(call, timeout=enough_s).token_ids) == 100
            break
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED, error
            assert "would take about" not in error.details(), (enough_s, error)
    else:
        raise AssertionError("the machine was too busy for 50 calls")
    assert expect_books_balanced(daemon, api).refused["DEADLINE_INFEASIBLE"] == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_daemon_that_was_stopped_has_not_hung(start, api, ranks):
    daemon = start("--scheduler-watchdog-s", "1", "--tensor-parallel", str(ranks), "--peer-timeout-s", "1", "--weights", "int8",
                   "--threads", "2", model=SLOW_MODEL)
    stream = daemon.stub.GenerateStream(daemon.request(prompt(4), 300), timeout=PATIENCE_S)
    for _ in range(3):
        next(stream)
        stand_still(daemon, 3)
    assert read(stream, []) is None
    daemon.expect_idle()


def test_a_tenants_queue_is_bounded_by_itself(start, api):
    daemon = start("--scheduler-max-batch", "1", "--scheduler-tenant-max-waiting-requests", "1", "--weights", "int8",
                   model=SLOW_MODEL)
    as_tenant = lambda name: {"metadata": (("x-tenant", name),), "timeout": PATIENCE_S}
    running = daemon.stub.GenerateStream(daemon.request(prompt(4), 1500), **as_tenant("a"))
    wait_for(daemon, lambda load: load.running_requests == 1)
    waiting = daemon.stub.GenerateStream(daemon.request(prompt(4), 2), **as_tenant("a"))
    wait_for(daemon, lambda load: load.waiting_requests == 1)
    error = expect_error(lambda: daemon.stub.Generate(daemon.request(prompt(4), 2), **as_tenant("a")),
                         grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert details(error, error_details_pb2.ErrorInfo).reason == "TENANT_REQUESTS"
    other = daemon.stub.GenerateStream(daemon.request(prompt(4), 2), **as_tenant("b"))
    running.cancel()
    assert len(list(waiting)) > 0 and len(list(other)) > 0
    error = expect_error(lambda: daemon.stub.Generate(daemon.request(prompt(4), 2), **as_tenant("a b")),
                         grpc.StatusCode.INVALID_ARGUMENT)
    assert "x-tenant" in error.details()
    daemon.expect_idle()


def test_an_interactive_request_passes_those_that_wait(start, api):
    daemon = start("--scheduler-max-batch", "1", "--weights", "int8", model=SLOW_MODEL)
    running = daemon.stub.GenerateStream(daemon.request(prompt(4), 1500), timeout=PATIENCE_S)
    wait_for(daemon, lambda load: load.running_requests == 1)
    finished, lock, threads = [], threading.Lock(), []

    def run(name, urgency):
        request = daemon.request(prompt(4), 60)  # so far apart that the order in which threads wake does not count
        request.scheduling.urgency = urgency
        daemon.stub.Generate(request, timeout=PATIENCE_S)
        with lock:
            finished.append(name)

    for i, (name, urgency) in enumerate((("batch", api.pb.URGENCY_BATCH), ("normal", api.pb.URGENCY_NORMAL),
                                         ("interactive", api.pb.URGENCY_INTERACTIVE))):
        threads.append(threading.Thread(target=run, args=(name, urgency)))
        threads[-1].start()
        wait_for(daemon, lambda load: load.waiting_requests == i + 1)
    running.cancel()
    for thread in threads:
        thread.join()
    assert finished == ["interactive", "normal", "batch"]


def test_a_prefix_is_found_again_by_its_tenant_and_salt_alone(daemon, api):
    request = daemon.request(prompt(400, 20), 8)
    request.scheduling.cache_salt = "this test"
    call = lambda **keys: daemon.stub.Generate(request, timeout=PATIENCE_S, **keys)
    first, again = call(), call()
    assert first.finish.cached_prompt_tokens == 0
    assert again.finish.cached_prompt_tokens == 384  # whole blocks of 16; the last token is always computed
    assert list(again.token_ids) == list(first.token_ids)
    assert call(metadata=(("x-tenant", "other"),)).finish.cached_prompt_tokens == 0
    request.scheduling.prefix_cache = False
    without = call()
    assert without.finish.cached_prompt_tokens == 0 and list(without.token_ids) == list(first.token_ids)
    request.scheduling.ClearField("prefix_cache")
    request.scheduling.cache_salt = "another"
    assert call().finish.cached_prompt_tokens == 0
    load = daemon.load()
    assert load.kv_blocks_cached > 0 and load.kv_blocks_free == load.kv_blocks_total


def test_requests_that_begin_alike_compute_it_once(daemon, api):
    request = daemon.request(prompt(300, 40), 12)
    request.scheduling.cache_salt = "alike"
    request.sampling.temperature = 1.0
    before = daemon.load()
    calls = []
    for seed in range(4):
        request.sampling.seed = seed
        calls.append(daemon.stub.Generate.future(request, timeout=PATIENCE_S))
    replies = [call.result() for call in calls]
    assert sorted(r.finish.cached_prompt_tokens for r in replies) == [0, 288, 288, 288]
    assert len({tuple(r.token_ids) for r in replies}) > 1
    after = daemon.load()
    assert after.prompt_tokens - before.prompt_tokens == 300 + 3 * 12
    assert after.cached_prompt_tokens - before.cached_prompt_tokens == 3 * 288
    daemon.expect_idle()


def sampled(daemon, samples, length=100, tokens=12, seed=5, **fields):
    request = daemon.request(prompt(length, 60), tokens, **fields)
    request.sampling.temperature = 1.0
    request.sampling.seed = seed
    request.sampling.samples = samples
    return request


@pytest.mark.parametrize("cached", (True, False))
def test_samples_are_what_their_seeds_give_and_compute_the_prompt_once(daemon, api, cached):
    alone = []
    for seed in range(5, 9):
        request = sampled(daemon, 1, seed=seed)
        request.scheduling.prefix_cache = False
        alone.append(daemon.stub.Generate(request, timeout=PATIENCE_S))
    assert len({tuple(r.token_ids) for r in alone}) > 1

    request = sampled(daemon, 4)
    request.scheduling.prefix_cache = cached
    request.scheduling.cache_salt = "samples"
    before = daemon.load()
    reply = daemon.stub.Generate(request, timeout=PATIENCE_S)
    after = daemon.load()
    samples = [reply, *reply.more_samples]
    assert [s.sample for s in reply.more_samples] == [1, 2, 3]
    assert [s.prompt.seed for s in samples] == [5, 6, 7, 8]
    assert [list(s.token_ids) for s in samples] == [list(r.token_ids) for r in alone]
    assert [s.text for s in samples] == [r.text for r in alone]
    assert [s.finish.reason for s in samples] == [LENGTH] * 4
    assert [s.finish.cached_prompt_tokens for s in samples] == [0, 96, 96, 96]
    assert after.prompt_tokens - before.prompt_tokens == 100 + 3 * 4
    daemon.expect_idle()

    streamed = [[] for _ in range(4)]
    for chunk in daemon.stub.GenerateStream(request, timeout=PATIENCE_S):
        streamed[chunk.sample].append(chunk)
    for chunks, r in zip(streamed, alone):
        assert [i for c in chunks for i in c.token_ids] == list(r.token_ids)
        assert chunks[0].HasField("prompt") and sum(c.HasField("prompt") for c in chunks) == 1
        assert chunks[-1].HasField("finish") and sum(c.HasField("finish") for c in chunks) == 1
        # Nobody finds what a request without the cache has left behind.
        assert (chunks[-1].finish.cached_prompt_tokens == 0) == (chunks is streamed[0] and not cached)
    daemon.expect_idle()
    expect_books_balanced(daemon, api)


def test_samples_come_in_together_and_end_together(slow, api):
    # Four for two slots: some run, some wait.
    request = sampled(slow, 4, length=4, tokens=1500, request_id="several")
    stream = slow.stub.GenerateStream(request, timeout=PATIENCE_S)
    wait_for(slow, lambda load: load.running_requests == 2 and load.waiting_requests == 2)
    assert slow.stub.Abort(api.pb.AbortRequest(request_id="several"), timeout=PATIENCE_S).found
    assert read(stream, []).code() == grpc.StatusCode.CANCELLED
    slow.expect_idle()
    request.request_id = "several-again"  # the call may hold the other for a moment longer than the engine
    stream = slow.stub.GenerateStream(request, timeout=PATIENCE_S)
    next(stream)
    stream.cancel()
    slow.expect_idle()
    request.request_id = "several-more"
    assert read(slow.stub.GenerateStream(request, timeout=0.5), []).code() == grpc.StatusCode.DEADLINE_EXCEEDED
    slow.expect_idle()
    expect_books_balanced(slow, api)


def test_samples_that_do_not_all_fit_are_all_refused(start, api):
    daemon = start("--scheduler-max-waiting-requests", "3", "--limits-max-samples", "8")
    error = expect_error(lambda: daemon.stub.Generate(sampled(daemon, 4), timeout=PATIENCE_S),
                         grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert "4 samples" in error.details()
    admission = expect_books_balanced(daemon, api)
    assert admission.refused["QUEUE_FULL"] == 4 and admission.finished == 0
    for samples, temperature, wanted in ((9, 1.0, "8"), (2, 0.0, "temperature")):
        request = sampled(daemon, samples)
        request.sampling.temperature = temperature
        error = expect_error(lambda: daemon.stub.Generate(request, timeout=PATIENCE_S), grpc.StatusCode.INVALID_ARGUMENT)
        assert "sampling.samples" in error.details() and wanted in error.details()
    assert info(daemon, api).limits.max_samples == 8
    assert len(daemon.stub.Generate(sampled(daemon, 3), timeout=PATIENCE_S).more_samples) == 2


def test_overcommitted_memory_computes_again_and_changes_no_token(start, api):
    daemon = start("--kv-overcommit=true", "--kv-memory-mib", "5", "--kv-prefix-cache=false")
    requests = [daemon.request(prompt(20, 30 + 7 * i), 300) for i in range(6)]
    alone = [list(daemon.stub.Generate(r, timeout=PATIENCE_S).token_ids) for r in requests]
    calls = [daemon.stub.Generate.future(r, timeout=PATIENCE_S) for r in requests]
    assert [list(c.result().token_ids) for c in calls] == alone
    assert daemon.load().preemptions > 0, "there was memory for all of them"
    daemon.expect_idle()


def test_the_simulator_plays_a_trace(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens,urgency,tenant,tier,deadline_s\n"
                     "0,64,10,interactive,a,dense,\n0.5,64,10,batch,b,exact,30\n0.5,64,1000,,,,0.2\n9,64,1,,b,,\n")
    run = lambda *flags: subprocess.run([BIN / "dejavu-sim", *flags], capture_output=True, text=True, timeout=PATIENCE_S)
    done = run("--trace", trace)
    assert done.returncode == 0, done.stderr
    assert "received 4 = finished 3 + refused 1 + cancelled 0 + failed 0 + live 0" in done.stdout
    assert "tenant a: 74 tokens" in done.stdout
    trace.write_text(trace.read_text() + "0.1,64,10,,,,\n")
    done = run("--trace", trace)
    assert done.returncode == 2 and f"{trace}:6" in done.stderr, "out of order"
    done = run("--rate", "0")
    assert done.returncode == 2 and "--rate" in done.stderr + done.stdout


def test_max_time_ends_with_what_there_is(slow, api):
    request = slow.request(prompt(4), 2000)
    request.stopping.max_time_s = 0.5
    reply = slow.stub.Generate(request, timeout=PATIENCE_S)
    assert reply.finish.reason == MAX_TIME
    assert 0 < len(reply.token_ids) < 2000
    request.stopping.max_time_s = float("nan")
    assert "max_time_s" in expect_error(lambda: slow.stub.Generate(request, timeout=PATIENCE_S),
                                        grpc.StatusCode.INVALID_ARGUMENT).details()


@pytest.mark.parametrize("queue", ("true", "false"))
def test_sigterm_under_load_loses_nothing(start, queue):
    daemon = start("--scheduler-max-batch", "16", "--scheduler-max-waiting-requests", "32", f"--drain-queue={queue}",
                   "--drain-timeout-s", "100", "--weights", "int8", model=SLOW_MODEL)
    streams = [daemon.stub.GenerateStream(daemon.request(prompt(5, 10 * i + 5), 60), timeout=PATIENCE_S) for i in range(32)]
    wait_for(daemon, lambda load: load.running_requests == 16 and load.waiting_requests == 16)
    daemon.terminate()
    complete, refused = 0, 0
    for stream in streams:
        chunks = []
        error = read(stream, chunks)
        if error is None:
            complete += 1
            assert sum(len(c.token_ids) for c in chunks) == 60
        else:
            refused += 1
            assert error.code() == grpc.StatusCode.UNAVAILABLE, error
            assert details(error, error_details_pb2.RetryInfo).retry_delay.ToNanoseconds() > 0
    assert daemon.wait() == 0, daemon.log()
    assert (complete, refused) == ((32, 0) if queue == "true" else (16, 16))


def test_a_fault_in_a_step_fails_its_requests_and_ends_the_daemon(start, api):
    daemon = start("--scheduler-fault", "throw@440", "--scheduler-max-batch", "2")
    streams = [daemon.stub.GenerateStream(daemon.request(prompt(4), 450), timeout=PATIENCE_S) for _ in range(4)]
    codes = [read(stream, []).code() for stream in streams]
    assert sorted(code.name for code in codes) == ["INTERNAL", "INTERNAL", "UNAVAILABLE", "UNAVAILABLE"]
    assert daemon.wait() == 3, daemon.log()
    assert "injected fault" in daemon.log()


@pytest.mark.parametrize("flags", [("--scheduler-watchdog-s", "1"), ()], ids=["1 s", "default"])
def test_a_step_that_hangs_is_given_up(start, flags):
    daemon = start("--scheduler-fault", "hang@50", *flags)
    stream = daemon.stub.GenerateStream(daemon.request(prompt(4), 450), timeout=PATIENCE_S)
    assert read(stream, []) is not None
    assert daemon.wait() == 3, daemon.log()
    # A model that steps in a millisecond is not waited for longer than that by default.
    assert f"step 50 has not ended within {'1' if flags else '10'} s" in daemon.log()
