"""What holds in every protocol, told of its speakers: test_protocols.py has those of gRPC, stock_gateway.py OpenAI's."""
import contextlib
import random
import signal
import threading
import time

import pytest
from grpc_health.v1 import health_pb2

import http2
from conftest import PATIENCE_S, until
from speakers import Ended

WORDS = "the sun was dark and he said that night of a little house by sea".split()
# A step of 10 ms: what is to be left in the middle does not end before.
BRAKED = ("--scheduler-fault", "slow@10", "--scheduler-deadline-slack", "0")
LONG = 480
# A client that loses its server looks for it again soon.
SOON = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200),
        ("grpc.use_local_subchannel_pool", 1)]


def text_request(api, text, tokens, **sampling):
    request = api.pb.GenerateRequest(text=text, sampling=sampling)
    request.stopping.max_new_tokens, request.stopping.ignore_eos = tokens, True
    return request


def mixed(api, i):
    """Request i of 200, in parameters that all protocols have."""
    choose = random.Random(i)
    request = text_request(api, " ".join(choose.choices(WORDS, k=choose.randrange(2, 40))), choose.randrange(1, 24), seed=i,
                           temperature=choose.choice([0, 0.5, 1, 1.5]), top_k=choose.choice([0, 5, 40]), top_p=choose.choice([0.5, 0.75, 1]))
    request.penalties.repetition = choose.choice([1, 1.5])
    request.stopping.ignore_eos = bool(i % 3)
    request.stopping.stop_token_ids.extend(choose.sample(range(4, 300), i % 4))
    return request


def long_request(api, i):
    return text_request(api, " ".join(WORDS[i % len(WORDS):]), LONG)


def run_all(tasks, threads):
    """Each task is called once, by so many threads."""
    turns, lock, failed = iter(tasks), threading.Lock(), []

    def client():
        while True:
            with lock:
                task = next(turns, None)
            if task is None:
                return
            try:
                task()
            except Exception as error:  # noqa: BLE001: told by the test
                failed.append(error)

    clients = [threading.Thread(target=client) for _ in range(threads)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    assert failed == []


def same_answers(daemon, speakers, requests):
    """Every speaker's answer to each request is that of our own API."""
    found = {}

    def ask(name, i):
        found[name, i] = speakers[name].ask(requests[i])

    run_all([lambda n=name, i=i: ask(n, i) for i in range(len(requests)) for name in speakers], threads=8)
    different = [(name, i) for name, i in found if not found[name, i].says(found["dejavu", i])]
    assert different == []
    assert len(found) == len(requests) * len(speakers) and len({found["dejavu", i].count for i in range(len(requests))}) > 10
    daemon.expect_idle()


def account(daemon):
    return daemon.stub.GetServerInfo(daemon.api.pb.GetServerInfoRequest(), timeout=PATIENCE_S).admission


@contextlib.contextmanager
def freed(daemon):
    """What runs inside ends before its last token, and leaves no block in use."""
    before = account(daemon).finished
    yield
    daemon.expect_idle()
    assert account(daemon).finished == before


def begun(daemon, speaker, count=3):
    calls = [speaker.begin(long_request(daemon.api, i)) for i in range(count)]
    for call in calls:
        if speaker.streams:
            call.first()
    until(lambda: daemon.load().running_requests == count)
    return calls


def a_cancel_frees_everything(daemon, speaker):
    with freed(daemon):
        for call in begun(daemon, speaker):
            call.cancel()


def a_deadline_frees_everything(daemon, speaker):
    with freed(daemon):
        with pytest.raises(Ended) as ended:
            speaker.begin(long_request(daemon.api, 0), timeout=1).rest()
        assert ended.value.code == "DEADLINE_EXCEEDED", ended.value


def the_server_keeps_the_deadline(daemon, speaker):
    """Of a client that does not look at the clock: nothing but the server ends its call."""
    with freed(daemon), http2.Connection(daemon.address) as peer:
        stream = peer.call(speaker.path, speaker.encode(long_request(daemon.api, 0)), timeout="500m")
        assert peer.outcome(stream).code == 4


def a_client_that_is_gone_leaves_nothing(daemon, speaker, relay):
    """`speaker` speaks through the relay."""
    with freed(daemon):
        calls = begun(daemon, speaker)
        relay.cut()
        for call in calls:
            with pytest.raises(Ended):
                call.rest()


def a_drain_loses_nothing(daemon, speakers, expected):
    """What runs ends whole, in every protocol at once; what is new each refuses in its own way. `expected`: of long_request(i)."""
    calls = [speaker.begin(long_request(daemon.api, i)) for i, speaker in enumerate(speakers.values())]
    for call, speaker in zip(calls, speakers.values()):
        if speaker.streams:
            call.first()
    until(lambda: daemon.load().running_requests == len(calls))
    daemon.terminate()
    until(lambda: daemon.health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S).status != health_pb2.HealthCheckResponse.SERVING)
    for name, speaker in speakers.items():
        with pytest.raises(Ended) as ended:
            speaker.ask(text_request(daemon.api, "late", 1))
        assert ended.value.code == speaker.unavailable, (name, ended.value)
    assert [name for name, call, answer in zip(speakers, calls, expected) if not call.rest().says(answer)] == []
    assert daemon.wait() == 0, daemon.log()


def restarts_lose_nothing(speakers, daemon, restart, number, expected):
    """Clients that ask again get the same answer, whichever daemon it is of. `restart` starts one at the same address. `expected`: of
    text_request(WORDS[0], 60). A drain ends what it has begun to send; a daemon that is killed does not."""
    request, wrong, done, stop = text_request(daemon.api, WORDS[0], 60), [], {name: 0 for name in speakers}, threading.Event()

    def ask_again_and_again(name, speaker):
        while not stop.is_set():
            call = speaker.begin(request)
            try:
                if call.rest().says(expected):
                    done[name] += 1
                else:
                    wrong.append(f"{name}: another answer")
            except Ended as ended:
                # Whoever is killed ends what has begun in any way. gRPC drops a call that reaches it while it shuts down.
                begun = call.has_begun()
                again = (speaker.unavailable, "CANCELLED") if number == signal.SIGTERM else (speaker.unavailable,)
                if (begun and number == signal.SIGTERM) or (ended.code not in again and not begun):
                    wrong.append(f"{name}: {ended}")
                time.sleep(0.02)

    threads = [threading.Thread(target=ask_again_and_again, args=each) for each in speakers.items()]
    for each in threads:
        each.start()
    try:
        at_least = lambda counts: all(done[name] >= counts[name] + 2 for name in done)
        until(lambda: at_least(dict.fromkeys(done, 0)))
        daemon.signal(number)
        assert daemon.wait() == (-number if number == signal.SIGKILL else 0), daemon.log()
        restart()
        before = dict(done)
        until(lambda: at_least(before))
    finally:
        stop.set()
        for each in threads:
            each.join()
    assert wrong == []
