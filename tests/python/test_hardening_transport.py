"""The limits of the transport, each at its edge: what one client may hold, and that others go on."""
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import http2
from attacks import SERVICE, score_request
from conftest import PATIENCE_S, metric, run_daemon, until

RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED, OK = 8, 4, 0


def connect(daemon, **fields):
    return http2.Connection(daemon.address, patience_s=PATIENCE_S, **fields)


def generate(daemon, tokens=20):
    return daemon.request([2, 5, 7], tokens).SerializeToString()


def test_a_call_without_a_request_ends(start):
    daemon = start("--transport-request-timeout-s", "0.2")
    with connect(daemon) as peer:
        silent = peer.call(SERVICE + "Generate", end=False)
        assert peer.outcome(silent).code == DEADLINE_EXCEEDED
        assert "transport.request_timeout_s" in peer.stream(silent).header("grpc-message")
        # Its connection goes on.
        assert peer.outcome(peer.call(SERVICE + "Generate", generate(daemon))).code == OK


def test_a_call_whose_client_takes_nothing_ends(start):
    daemon = start("--transport-stall-timeout-s", "0.2")
    with connect(daemon, settings_sent={http2.INITIAL_WINDOW: 0}) as peer:
        stuck = peer.call(SERVICE + "GenerateStream", generate(daemon))
        assert peer.outcome(stuck).code == RESOURCE_EXHAUSTED or peer.stream(stuck).reset is not None
    daemon.expect_idle()


def test_large_replies_that_nobody_reads_are_refused_and_streams_beside_them_go_on(start):
    daemon = start("--transport-max-unread-mib-per-connection", "1")
    with connect(daemon, settings_sent={http2.INITIAL_WINDOW: 0}) as peer:
        scores = [peer.call(SERVICE + "Score", score_request(500, 100)) for _ in range(12)]
        refused = lambda: [i for i in scores if peer.stream(i).code == RESOURCE_EXHAUSTED]  # noqa: E731
        peer.until(lambda: all(peer.stream(i).headers for i in scores))  # headers need no window: a reply has been made
        assert "on this connection of at most 1048576" in peer.stream(refused()[0]).header("grpc-message")
        stream = peer.call(SERVICE + "GenerateStream", generate(daemon))
        peer.send(http2.window_update(stream, 1 << 20))
        assert peer.outcome(stream).code == OK
        # What was kept comes once it is read.
        kept = [i for i in scores if i not in refused()]
        peer.send(*(http2.window_update(i, 1 << 24) for i in kept))
        assert [peer.outcome(i).code for i in kept] == [OK] * len(kept) and kept
    daemon.expect_idle()


def test_calls_beyond_the_limit_are_refused_while_probes_and_others_pass(start, tmp_path):
    daemon = start("--transport-max-calls", "8", "--transport-max-calls-per-peer", "4", "--transport-request-timeout-s", "0",
                   "--health-listen", "127.0.0.1:0", "--health-port-file", tmp_path / "health_port")
    with connect(daemon, source="127.0.0.2") as peer:
        open_calls = [peer.call(SERVICE + "Generate", end=False) for _ in range(4)]
        until(lambda: metric(daemon, "dejavu_open_calls") == 4)
        fifth = peer.outcome(peer.call(SERVICE + "Generate", generate(daemon)))
        assert fifth.code == RESOURCE_EXHAUSTED and "address" in fifth.header("grpc-message")
        with connect(daemon, source="127.0.0.3") as other:
            assert other.outcome(other.call(SERVICE + "Generate", generate(daemon))).code == OK
        with grpc.insecure_channel(f"127.0.0.1:{int((tmp_path / 'health_port').read_text())}") as channel:
            probe = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
            assert probe.status == health_pb2.HealthCheckResponse.SERVING
        peer.send(*(http2.reset(i) for i in open_calls))
        # Their places are free again.
        until(lambda: peer.outcome(peer.call(SERVICE + "Generate", generate(daemon, 1))).code == OK)


def test_metadata_beyond_the_limit_ends_its_call_alone(braked):
    with connect(braked) as peer:
        stream = peer.call(SERVICE + "GenerateStream", generate(braked, 50))
        peer.until(lambda: peer.stream(stream).messages)
        large = peer.outcome(peer.call(SERVICE + "Generate", generate(braked), metadata=[("x-large", "x" * 16000)] * 2))
        assert large.code == RESOURCE_EXHAUSTED and "transport.max_metadata_bytes" in large.header("grpc-message")
        assert peer.outcome(stream).code == OK
    braked.expect_idle()


def test_an_idle_connection_is_told_to_go(start):
    daemon = start("--connection-max-idle-s", "0.2")
    with connect(daemon) as peer:
        assert peer.outcome(peer.call(SERVICE + "Generate", generate(daemon))).code == OK
        assert peer.is_closed() or peer.goaway is not None


@pytest.mark.parametrize("timeout", ["99999999H", "2562048H", "2562047H", "876000H", "99999999M", "99999999S", "99999999m"])
def test_a_deadline_may_be_as_far_away_as_grpc_allows(daemon, timeout):
    with connect(daemon) as peer:
        assert peer.outcome(peer.call(SERVICE + "Generate", generate(daemon, 2), timeout=timeout)).code == OK
        assert peer.outcome(peer.call("/grpc.health.v1.Health/Check", b"", timeout=timeout)).code == OK


@pytest.mark.parametrize("listen", ["[::1]:0", "localhost:0", "0.0.0.0:0", "[::]:0"])
def test_every_kind_of_address_is_listened_to_and_its_connections_are_known(start, listen):
    """A call whose connection the table does not know would count as one that has gone."""
    daemon = start(listen=listen, connect=lambda address: grpc.insecure_channel(address.replace("127.0.0.1", {
        "[::1]:0": "[::1]", "[::]:0": "[::1]"}.get(listen, "127.0.0.1"))))
    # More at once than lost calls may be.
    calls = [daemon.stub.Generate.future(daemon.request([2, 5, 7], 2), timeout=PATIENCE_S) for _ in range(100)]
    assert [call.result().finish.generated_tokens for call in calls] == [2] * 100


def test_gateways_must_be_addresses():
    ended = run_daemon("--transport-gateways", "127.0.0.1,proxy.local")
    assert ended.returncode == 1 and "transport.gateways names proxy.local" in ended.stderr, ended.stderr


def test_more_connections_than_descriptors_are_not_promised():
    ended = run_daemon("--transport-max-connections", "5000", wrap=["prlimit", "--nofile=1024:1024"])
    assert ended.returncode == 1 and "transport.max_connections is 5000; the limit of 1024" in ended.stderr, ended.stderr
