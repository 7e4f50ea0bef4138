"""HAProxy as deploy/proxy sets it up, before a real daemon: what must pass through it, and what must not.

Strangers come from 127.0.0.2 (attacks.py), over plain text where TLS is not what is asked: limits of one address meet them, and no
good client. Nothing is asserted about how long something takes.
"""
import contextlib
import os
import pathlib
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import http2
from certificates import Authority
from conftest import BIN, PATIENCE_S, ROOT, Daemon, until
from hardening import MOST_GROWTH_MIB, resident_mib, start_attack
from log_lines import lines_of, poll
from proxy import Proxy
from test_security import TENANTS, bearer, metric, secret, shown_certificate, token_lines

Code = grpc.StatusCode
SERVICE = "/dejavu.v1.GenerationService/"
# Deadlines are bounds of the tests: a machine with much else to do shall not have calls refused because of them.
FLAGS = ("--transport-gateways", "127.0.0.1", "--scheduler-deadline-slack", "0")
# A second for each step: a stream of 480 tokens does not end while a test has patience.
ENDLESS = ("--scheduler-fault", "slow@1000")
ATTACK_S = 3
MOST_PROXY_MIB = 128
MOST_DESCRIPTORS = 700  # of the daemon, which needs two for a connection: 100 and 200 of one address, and its own


class Front:
    """A daemon and a proxy, with a client of the proxy."""

    def __init__(self, api, folder, *flags, connect=grpc.insecure_channel, tls=None, **settings):
        folder.mkdir(exist_ok=True)
        self.daemon = Daemon(api, folder, *FLAGS, *flags)
        self.proxy = Proxy(self.daemon.address, folder / "proxy.log", tls, **settings)
        self.address, self.request = self.proxy.address, self.daemon.request
        self.channel = connect(self.address)
        self.stub = api.rpc.GenerationServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def tokens(self, ids, count, **options):
        return [id for chunk in self.stub.GenerateStream(self.request(ids, count), timeout=PATIENCE_S, **options)
                for id in chunk.token_ids]

    def stop(self):
        self.channel.close()
        self.proxy.stop()
        self.daemon.stop()


@pytest.fixture(scope="module")
def front(api, tmp_path_factory):
    """Shared by tests that leave it as they found it. Steps take 10 ms: streams do not end before a test has done its part."""
    front = Front(api, tmp_path_factory.mktemp("front"), "--scheduler-fault", "slow@10")
    yield front
    front.stop()
    assert front.daemon.process.returncode == 0, front.daemon.log()


@pytest.fixture
def fronts(api, tmp_path):
    started = []

    def start(*flags, **options):
        started.append(Front(api, tmp_path / f"front-{len(started)}", *flags, **options))
        return started[-1]

    yield start
    for front in started:
        front.stop()


def refusal(call):
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value.code(), error.value.details()


# --- what passes through


def test_answers_are_those_of_the_daemon(front):
    request = front.request([2, 5, 7], 40)
    alone = front.daemon.stub.Generate(request, timeout=PATIENCE_S)
    assert list(front.stub.Generate(request, timeout=PATIENCE_S).token_ids) == list(alone.token_ids)
    chunks = list(front.stub.GenerateStream(request, timeout=PATIENCE_S))
    assert [id for chunk in chunks for id in chunk.token_ids] == list(alone.token_ids)
    assert len([chunk for chunk in chunks if chunk.token_ids]) > 5  # as they came, not as one
    # Errors with their details, which travel as trailers.
    with pytest.raises(grpc.RpcError) as error:
        front.stub.Generate(front.request([2], 0), timeout=PATIENCE_S)
    assert error.value.code() == Code.INVALID_ARGUMENT and "stopping.max_new_tokens" in error.value.details()
    assert any(key == "grpc-status-details-bin" for key, _ in error.value.trailing_metadata())
    assert refusal(lambda: front.channel.unary_unary(SERVICE + "NoSuchMethod")(b"", timeout=PATIENCE_S))[0] == Code.UNIMPLEMENTED
    # Four megabytes pass; what is larger is refused by the daemon.
    big = front.request([2], 1)
    big.text = "x" * (5 << 20)
    assert refusal(lambda: front.stub.Generate(big, timeout=PATIENCE_S))[0] == Code.RESOURCE_EXHAUSTED


def test_health_passes_and_probes_ask_through_the_daemons_own_port(front):
    for address in (front.address, front.proxy.health_address):
        with grpc.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for service in ("", "dejavu.v1.GenerationService", "liveness"):
                assert stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S).status == 1
            watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
            assert next(watch).status == 1
            watch.cancel()
    with grpc.insecure_channel(front.proxy.health_address) as channel:
        assert refusal(lambda: channel.unary_unary(SERVICE + "GetModelInfo")(b"", timeout=PATIENCE_S))[0] == Code.UNIMPLEMENTED


def test_the_daemons_log_names_the_client(front):
    """By the proxy's word: what the client says of itself is dropped."""
    before = len(lines_of(front.daemon))
    with http2.Connection(front.address, source="127.0.0.2") as peer:
        told = [("x-forwarded-for", "203.0.113.7"), ("x-forwarded-for", "203.0.113.8"), ("forwarded", "for=203.0.113.9")]
        assert peer.outcome(peer.call(SERVICE + "GetModelInfo", b"", told)).code == 0
    line = poll(lambda: [line for line in lines_of(front.daemon)[before:] if line.get("method") == "GetModelInfo"], front.daemon.log)[0]
    assert line["peer"] == "ipv4:127.0.0.2"


def test_deadlines_reach_the_daemon(front):
    """By frames, so that no client ends the call first: it is the daemon that says so."""
    with http2.Connection(front.address) as peer:
        ended = peer.outcome(peer.call(SERVICE + "GenerateStream", front.request([2, 5], 480).SerializeToString(), timeout="300m"))
    assert ended.code == Code.DEADLINE_EXCEEDED.value[0]
    front.daemon.expect_idle()


def test_cancels_free_the_rows(fronts):
    front = fronts(*ENDLESS)
    streams = [front.stub.GenerateStream(front.request([2, 50 + i], 480), timeout=PATIENCE_S) for i in range(8)]
    for stream in streams:
        next(stream)
    load = front.daemon.load()
    assert load.running_requests + load.waiting_requests == 8
    for stream in streams:
        stream.cancel()
    front.daemon.expect_idle()
    # A client that has gone without a word, too.
    peer = http2.Connection(front.address)
    stream = peer.call(SERVICE + "GenerateStream", front.request([2, 5], 480).SerializeToString())
    peer.until(lambda: peer.stream(stream).data)
    peer.close(abruptly=True)
    front.daemon.expect_idle()


def test_a_client_that_does_not_read_holds_up_nobody_else(front):
    with http2.Connection(front.address, credit=False, connection_window=None) as peer:
        request = front.request([2, 5], 480)
        request.output.top_logprobs = 100
        stream = peer.call(SERVICE + "GenerateStream", request.SerializeToString())
        peer.until(lambda: len(peer.stream(stream).data) > 60000)  # its window is full
        assert len(front.tokens([2, 9], 40)) == 40
    front.daemon.expect_idle()


def test_the_client_is_named_by_the_proxy_and_binary_metadata_is_left_out(front):
    """gRPC 1.51 ends the connection of a `-bin` value that is not base64."""
    with http2.Connection(front.address) as peer:
        stream = peer.call(SERVICE + "GenerateStream", front.request([2, 5], 20).SerializeToString())
        hurt = peer.call(SERVICE + "GetModelInfo", b"", [("x-bad-bin", "!?*"), ("grpc-trace-bin", "AA AA")])
        assert peer.outcome(hurt).code == 0 and peer.outcome(stream).code == 0


def test_nothing_is_sent_twice(tmp_path):
    """A daemon that dies under a call: the client is told (by REFUSED_STREAM), and decides itself whether to ask again."""
    asked = []

    def die_under_each_call(server):
        with contextlib.suppress(OSError):  # the test's end
            while True:
                peer, _ = server.accept()
                peer.sendall(http2.settings())
                content = b""
                while SERVICE.encode() not in content and (more := peer.recv(1 << 16)):
                    content += more
                asked.append(content)
                peer.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=die_under_each_call, args=(server,))
        thread.start()
        proxy = Proxy(f"127.0.0.1:{server.getsockname()[1]}", tmp_path / "proxy.log")
        try:
            with http2.Connection(proxy.address) as peer:
                ended = peer.outcome(peer.call(SERVICE + "Generate", b""))
            assert ended.ended and not ended.data and ended.code in (None, Code.UNAVAILABLE.value[0])
            assert len(asked) == 1
        finally:
            proxy.stop()
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


# --- secured


class Secured:
    def __init__(self, api, folder):
        self.authority = Authority(folder, "ours")
        self.mount = secret(folder / "tls", self.authority, names="DNS:localhost,IP:127.0.0.1")
        # As Kubernetes calls them.
        for name, kind in (("tls.crt", "cert"), ("tls.key", "key"), ("ca.crt", "ca")):
            (folder / "tls" / name).symlink_to(f"..data/{kind}")
        (folder / "tokens").write_text(token_lines(TENANTS))
        self.cert, self.key = self.authority.issue()
        self.front = Front(api, folder, "--auth-tokens-file", folder / "tokens", tls=folder / "tls", connect=self.connect,
                           PROXY_RELOAD_S=0.2)

    def connect(self, address, authority=None, identity=True):
        cert, key = identity if isinstance(identity, tuple) else (self.cert, self.key) if identity else (None, None)
        return grpc.secure_channel(address, grpc.ssl_channel_credentials((authority or self.authority).pem, key, cert),
                                   [("grpc.use_local_subchannel_pool", 1)])


@pytest.fixture(scope="module")
def secured(api, tmp_path_factory):
    secured = Secured(api, tmp_path_factory.mktemp("secured"))
    yield secured
    secured.front.stop()


def test_only_clients_of_our_authority_with_a_token_get_in(secured, api, tmp_path):
    front, stranger = secured.front, Authority(tmp_path, "another")
    assert len(front.tokens([2, 5], 4, metadata=bearer(TENANTS["ada"]))) == 4
    assert refusal(lambda: front.tokens([2, 5], 4))[0] == Code.UNAUTHENTICATED
    assert refusal(lambda: front.tokens([2, 5], 4, metadata=bearer("wrong")))[0] == Code.UNAUTHENTICATED
    for options in (dict(identity=False), dict(identity=stranger.issue()), dict(identity=secured.authority.issue(days=-1)),
                    dict(authority=stranger)):
        with secured.connect(front.address, **options) as channel:
            stub = api.rpc.GenerationServiceStub(channel)
            call = lambda: stub.Generate(front.request([2], 1), timeout=PATIENCE_S, metadata=bearer(TENANTS["ada"]))
            assert refusal(call)[0] == Code.UNAVAILABLE
    with grpc.insecure_channel(front.address) as channel:
        assert refusal(lambda: channel.unary_unary(SERVICE + "Generate")(b"", timeout=PATIENCE_S))[0] == Code.UNAVAILABLE


def test_old_tls_is_refused(secured):
    def handshake(version):
        asked = subprocess.run(["openssl", "s_client", "-connect", secured.front.address, version, "-alpn", "h2", "-cipher",
                                "ALL:@SECLEVEL=0"], input=b"", capture_output=True, timeout=PATIENCE_S)
        return b"BEGIN CERTIFICATE" in asked.stdout and b"Cipher is (NONE)" not in asked.stdout

    assert [handshake(version) for version in ("-tls1_1", "-tls1_2", "-tls1_3")] == [False, True, True]


def test_certificates_are_rotated_under_a_running_stream(secured):
    front = secured.front
    stream = unread_stream_of(front, metadata=bearer(TENANTS["ada"]))
    before = shown_certificate(front.address)
    cert, key = secured.authority.issue()
    secured.mount.write(cert=cert, key=key, ca=secured.authority.pem)
    until(lambda: shown_certificate(front.address) == cert.decode().strip())
    assert before != cert.decode().strip()
    secured.mount.write(cert=b"no certificate", key=key, ca=secured.authority.pem)  # changes nothing
    until(lambda: "no certificate" in (secured.mount.folder / "tls.crt").read_text() and "ALERT" in front.proxy.log())
    assert shown_certificate(front.address) == cert.decode().strip()
    assert list(stream)[-1].finish.generated_tokens == 480
    secured.mount.write(cert=cert, key=key, ca=secured.authority.pem)


def unread_stream_of(front, **options):
    """A stream that cannot end before it is read: its replies are larger than what stands between."""
    request = front.request([2, 5, 7], 480)
    request.output.top_logprobs = 100
    stream = front.stub.GenerateStream(request, timeout=PATIENCE_S, **options)
    next(chunk for chunk in stream if chunk.token_ids)
    return stream


# --- the end


def test_a_drain_under_load_loses_nothing(fronts):
    """As a pod ends: the daemon is told first, the proxy after its readiness has been seen."""
    front = fronts("--scheduler-fault", "slow@10", "--drain-linger-ms", "500", "--drain-timeout-s", "100")
    request = front.request([2, 5, 7], 100)
    expected = list(front.daemon.stub.Generate(request, timeout=PATIENCE_S).token_ids)
    watch = front.health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
    assert next(watch).status == 1
    ended, begun = [], threading.Barrier(9, timeout=PATIENCE_S)

    def stream():
        chunks = front.stub.GenerateStream(request, timeout=PATIENCE_S)
        ids = list(next(chunk for chunk in chunks if chunk.token_ids).token_ids)
        begun.wait()
        try:
            ids += [id for chunk in chunks for id in chunk.token_ids]
            ended.append("whole" if ids == expected else ids)
        except grpc.RpcError as error:
            ended.append(error.code())

    threads = [threading.Thread(target=stream) for _ in range(8)]
    for thread in threads:
        thread.start()
    begun.wait()
    front.daemon.terminate()
    assert next(watch).status == 2  # clients are told to leave
    front.proxy.terminate()
    for thread in threads:
        thread.join()
    assert ended == ["whole"] * 8
    assert front.daemon.wait() == 0
    front.channel.close()
    assert front.proxy.wait() == 0, front.proxy.log()


def test_without_its_daemon_the_proxy_says_so(fronts):
    front = fronts()
    front.daemon.stop()
    code, details = refusal(lambda: front.tokens([2, 5], 4))
    assert code == Code.UNAVAILABLE, details
    with grpc.insecure_channel(front.proxy.health_address) as probes:
        call = lambda: health_pb2_grpc.HealthStub(probes).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert refusal(call)[0] == Code.UNAVAILABLE


# --- limits


def test_other_http_does_not_reach_the_daemon(front):
    before = metric(front.daemon, "dejavu_build_info"), front.daemon.log()
    with http2.Connection(front.address) as peer:
        for pairs, status in (
                ([(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "x")], "405"),
                (http2.grpc_headers(SERVICE + "Generate", content_type="application/json"), "415")):
            stream = peer.next_stream()
            peer.send(http2.headers(stream, pairs, end_stream=True))
            assert peer.outcome(stream).header(":status") == status
    assert http2.exchange(front.address, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")[1]
    assert before[0] == 1 and front.daemon.log() == before[1]


def test_an_address_has_its_share_of_calls_and_requests(fronts):
    front = fronts(*ENDLESS, PROXY_SOURCE_CALLS=4, PROXY_SOURCE_REQUESTS=40)
    request = front.request([2, 5], 480).SerializeToString()

    with http2.Connection(front.address, source="127.0.0.2") as peer:
        running = [peer.call(SERVICE + "GenerateStream", request) for _ in range(4)]
        peer.until(lambda: all(peer.stream(stream).data for stream in running))
        refused = peer.outcome(peer.call(SERVICE + "GetModelInfo", b""))
        assert refused.code == Code.RESOURCE_EXHAUSTED.value[0]
        assert refused.header("grpc-message") == "too many calls of this address at once"
        assert refused.header("content-type") == "application/grpc"
        for stream in running:
            peer.send(http2.reset(stream))
        front.daemon.expect_idle()
        ended = [peer.outcome(stream) for stream in [peer.call(SERVICE + "GetModelInfo", b"") for _ in range(60)]]
        assert ended[0].code == 0 and ended[-1].header("grpc-message") == "too many requests of this address"
    assert len(front.tokens([2, 5], 4)) == 4  # another address


def test_an_address_has_its_share_of_connections(fronts):
    front = fronts(PROXY_SOURCE_CONNECTIONS=3, PROXY_SOURCE_CONNECTION_RATE=1000)
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(http2.Connection(front.address, source="127.0.0.2")) for _ in range(3)]
        assert all(peer.answers() for peer in peers)
        with pytest.raises((http2.Closed, OSError)):
            http2.Connection(front.address, source="127.0.0.2").read()
        assert all(peer.answers() for peer in peers)
        assert len(front.tokens([2, 5], 4)) == 4  # another address


def test_every_client_has_a_connection_of_its_own_behind_the_proxy(fronts):
    """What ends that of one ends no other's calls."""
    front = fronts(*ENDLESS)
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(3):
            peer = stack.enter_context(http2.Connection(front.address))
            stream = peer.call(SERVICE + "GenerateStream", front.request([2, 5], 480).SerializeToString())
            peer.until(lambda: peer.stream(stream).data)
            connections.append(metric(front.daemon, "dejavu_connections"))
        assert connections[0] < connections[1] < connections[2]


def test_metadata_is_bounded(front):
    with http2.Connection(front.address) as peer:
        good = peer.call(SERVICE + "GenerateStream", front.request([2, 5], 20).SerializeToString())
        fits = peer.call(SERVICE + "GetModelInfo", b"", [("x-a", "a" * 7000)])
        large = peer.call(SERVICE + "GetModelInfo", b"", [("x-a", "a" * 9000)])
        assert peer.outcome(large).header("grpc-message") == "more than 8192 bytes of metadata"
        assert [peer.outcome(stream).code for stream in (fits, good)] == [0, 0]  # on the same connection


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.parametrize("attack,count", [
    ("rapid_reset", None), ("continuation", None), ("indexed_headers", None), ("endless_integer", None), ("slow_headers", 200),
    ("idle", 2000), ("open_calls", 4000), ("pings", None), ("settings", None), ("churn", 400)])
def test_floods_reach_neither_the_daemon_nor_the_good_client(api, front, attack, count):
    """While it lasts, a good client's streams end OK with the same tokens; memory and descriptors of both processes are bounded."""
    daemon, proxy = front.daemon.pid(), front.proxy.workers()[-1]
    expected = front.tokens([2, 5, 7], 40)
    before, most = resident_mib(daemon), dict(daemon=0, proxy=0)
    for pid in (daemon, proxy):
        pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM begins again
    attacker = start_attack(attack, front.address, ATTACK_S, count=count)
    streams = 0
    while attacker.poll() is None or not streams:
        assert front.tokens([2, 5, 7], 40) == expected
        streams += 1
        for name, pid in (("daemon", daemon), ("proxy", proxy)):
            most[name] = max(most[name], descriptors(pid))
    assert attacker.wait() == 0 and attacker.stdout.read()
    with http2.Connection(front.address) as peer:  # new connections get in
        assert peer.outcome(peer.call("/grpc.health.v1.Health/Check", b"")).messages == [b"\x08\x01"]
    assert resident_mib(daemon, "VmHWM") - before <= MOST_GROWTH_MIB
    assert resident_mib(proxy, "VmHWM") <= MOST_PROXY_MIB
    assert most["daemon"] <= MOST_DESCRIPTORS, most
    front.daemon.expect_idle()


def test_idle_connections_of_many_addresses_are_let_go(fronts):
    """As many as there are places, each address within its share: they never reach the daemon, and end by themselves."""
    front = fronts(PROXY_CONNECTIONS=300, PROXY_STALL="2s")
    expected, before = front.tokens([2, 5, 7], 40), descriptors(front.daemon.pid())
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", int(front.address.split(":")[1])), PATIENCE_S,
                                                             source_address=(f"127.0.1.{1 + i // 50}", 0))) for i in range(400)]
        assert front.tokens([2, 5, 7], 40) == expected  # on the connection that it has
        with grpc.insecure_channel(front.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:  # and on a new one
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S, wait_for_ready=True)
        for peer in idle:
            peer.settimeout(PATIENCE_S)
            with contextlib.suppress(ConnectionResetError):
                while peer.recv(1 << 12):
                    pass
        assert descriptors(front.daemon.pid()) <= before + 2 * 2  # the new one


def test_what_was_refused_is_counted(front):
    attacker = start_attack("idle", front.address, 1, count=300)
    assert attacker.wait() == 0
    with urllib.request.urlopen(f"http://{front.proxy.metrics_address}/metrics", timeout=PATIENCE_S) as page:
        text = page.read().decode()
    denied = [line for line in text.splitlines() if line.startswith('haproxy_frontend_denied_connections_total{proxy="edge"}')]
    assert float(denied[0].split()[-1]) >= 100
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"http://{front.proxy.metrics_address}/", timeout=PATIENCE_S)


def test_connections_end_when_nothing_happens_on_them(fronts):
    front = fronts(PROXY_IDLE="1s")
    with http2.Connection(front.address) as peer:
        assert peer.outcome(peer.call(SERVICE + "GetModelInfo", b"")).code == 0
        assert peer.is_closed()
        assert peer.goaway is not None


def test_patience_is_for_those_who_owe_something(fronts):
    """Not for a client that waits for a slow daemon or watches its health."""
    front = fronts("--scheduler-fault", "slow@1500", PROXY_STALL="1s", PROXY_SILENCE="4s")
    watch = front.health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
    assert next(watch).status == 1
    assert len(front.tokens([2, 5], 5)) == 5  # longer than both
    front.daemon.terminate()
    assert next(watch).status == 2


def test_a_client_that_takes_nothing_is_let_go(fronts):
    front = fronts(PROXY_STALL="1s")
    request = front.request([2, 5], 480)
    request.output.top_logprobs = 100
    with http2.Connection(front.address, credit=False, connection_window=None) as peer:
        ended = peer.outcome(peer.call(SERVICE + "GenerateStream", request.SerializeToString()), PATIENCE_S)
        assert ended.ended and ended.code != 0
    front.daemon.expect_idle()


# --- the local command


def test_up_starts_both_and_stops_both(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    up = subprocess.Popen([ROOT / "deploy/proxy/up", "--bin", BIN, "--folder", tmp_path / "up", "--listen", f"127.0.0.1:{port}"],
                          stdout=subprocess.PIPE, text=True)
    try:
        ready = up.stdout.readline()
        assert ready.startswith("ready: ")
        command = ready.removeprefix("ready: ").strip() + " --max-new-tokens 8"
        said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=PATIENCE_S)
        assert said.returncode == 0 and said.stdout, said.stderr
        without = command.replace(f" --tls-cert {tmp_path}/up/client.crt --tls-key {tmp_path}/up/client.key", "")
        assert without != command and subprocess.run(["bash", "-c", without], capture_output=True, timeout=PATIENCE_S).returncode
    finally:
        up.terminate()
    assert up.wait(timeout=PATIENCE_S) == 0
    assert "drained" in (tmp_path / "up/dejavud.log").read_text()
    assert "exited with code 0" in (tmp_path / "up/proxy.log").read_text()
