"""Restarts that clients do not notice: health first, then GOAWAY, while what runs goes on; and the clients that we advise."""
import collections
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from certificates import Authority
from conftest import BIN, PATIENCE_S, ROOT, Daemon
from test_security import TENANTS, bearer, secret, tls_flags, token_lines

CLIENT = ROOT / "deploy/client"
SERVICE_CONFIG = json.loads((CLIENT / "service-config.json").read_text())
# The short form of `30 restarts under load at 16 streams`, for which see operations.md.
RESTARTS = int(os.environ.get("DEJAVU_RESTARTS", "3"))
STREAMS = int(os.environ.get("DEJAVU_STREAMS", "8"))
Code = grpc.StatusCode
Status = health_pb2.HealthCheckResponse


class Connectivity:
    """The states that a channel has been in."""

    def __init__(self, channel):
        self.changed, self.states = threading.Condition(), []
        channel.subscribe(self.note)
        with self.changed:
            assert self.changed.wait_for(lambda: self.states, PATIENCE_S)

    def note(self, state):
        with self.changed:
            self.states.append(state)
            self.changed.notify_all()

    def wait_until_left_ready(self):
        def left():
            ready = grpc.ChannelConnectivity.READY
            return ready in self.states and self.states[-1] != ready

        with self.changed:
            assert self.changed.wait_for(left, PATIENCE_S), self.states


def unread_stream(daemon, tokens=480):
    """A stream that cannot end before it is read: its replies are larger than what the transport holds."""
    request = daemon.request([2, 5, 7], tokens)
    request.output.top_logprobs = 100
    stream = daemon.stub.GenerateStream(request, timeout=PATIENCE_S)
    next(chunk for chunk in stream if chunk.token_ids)
    return stream


def test_a_shutdown_is_seen_before_it_hurts(start, api, tmp_path):
    daemon = start("--transport-max-outbox-bytes", str(1 << 30), "--drain-timeout-s", "1000", "--drain-linger-ms", "1",
                   "--drain-goaway-ms", "1", "--health-listen", "127.0.0.1:0", "--health-port-file",
                   tmp_path / "health_port")
    connectivity = Connectivity(daemon.channel)
    stream = unread_stream(daemon)
    with grpc.insecure_channel(f"127.0.0.1:{int((tmp_path / 'health_port').read_text())}") as probes:
        health = health_pb2_grpc.HealthStub(probes)
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert next(watch).status == Status.SERVING
        daemon.terminate()
        assert next(watch).status == Status.NOT_SERVING
        connectivity.wait_until_left_ready()  # GOAWAY
        # Nobody gets in any more, and who probes is told the truth.
        with pytest.raises(grpc.RpcError) as refused:
            daemon.stub.Generate(daemon.request([2], 1), timeout=PATIENCE_S)
        assert refused.value.code() == Code.UNAVAILABLE
        assert health.Check(health_pb2.HealthCheckRequest(service="liveness"), timeout=PATIENCE_S).status == Status.SERVING
        assert daemon.process.poll() is None
        rest = list(stream)
    assert rest[-1].finish.generated_tokens == 480
    assert daemon.wait() == 0
    assert "drained" in daemon.log()


def test_a_stream_outlives_its_connections_age(start):
    daemon = start("--transport-max-outbox-bytes", str(1 << 30), "--connection-max-age-s", "0.5")
    connectivity = Connectivity(daemon.channel)
    stream = unread_stream(daemon)
    connectivity.wait_until_left_ready()
    assert len(daemon.stub.Generate(daemon.request([2, 5], 2), timeout=PATIENCE_S).token_ids) == 2  # on a new one
    assert list(stream)[-1].finish.generated_tokens == 480


class Replica:
    """A daemon that comes back at the same address."""
    FLAGS = ("--drain-linger-ms", "300", "--drain-goaway-ms", "200", "--drain-timeout-s", "100")

    def __init__(self, api, folder, *flags):
        folder.mkdir()
        self.api, self.folder, self.flags = api, folder, [*self.FLAGS, *flags]
        self.daemon = Daemon(api, folder, *self.flags)

    def restart(self):
        address = self.daemon.address
        self.daemon.stop()
        assert self.daemon.process.returncode == 0, self.daemon.log()
        assert "cut off" not in self.daemon.log()
        self.daemon = Daemon(self.api, self.folder, *self.flags, listen=address)

    def wait_until_used(self, loads):
        """By all clients: they have found it again, as minReadySeconds gives them the time to."""
        deadline = time.monotonic() + PATIENCE_S
        while not all(f"tenant={load.name}" in self.daemon.log() for load in loads):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def without_retries(config):
    return {**config, "methodConfig": [{k: v for k, v in method.items() if k != "retryPolicy"}
                                       for method in config["methodConfig"]]}


class Load:
    """Streams at once over one channel, again and again; each must say what it says alone."""

    def __init__(self, api, name, daemon, addresses, config, streams):
        self.name = name
        self.channel = grpc.insecure_channel(
            "ipv4:" + ",".join(addresses), [("grpc.service_config", json.dumps(config)),
                                            ("grpc.use_local_subchannel_pool", 1),
                                            ("grpc.initial_reconnect_backoff_ms", 100),
                                            ("grpc.max_reconnect_backoff_ms", 1000)])
        self.stub = api.rpc.GenerationServiceStub(self.channel)
        self.requests = [daemon.request([2, 100 + i], 60) for i in range(streams)]
        self.expected = [list(daemon.stub.Generate(request, timeout=PATIENCE_S).token_ids) for request in self.requests]
        self.stop, self.finished, self.failures = threading.Event(), 0, []
        self.threads = [threading.Thread(target=self.run, args=(i,)) for i in range(streams)]
        for thread in self.threads:
            thread.start()

    def run(self, i):
        metadata = [("x-tenant", self.name)]
        while not self.stop.is_set():
            ids = []
            try:
                for chunk in self.stub.GenerateStream(self.requests[i], timeout=PATIENCE_S, metadata=metadata):
                    ids.extend(chunk.token_ids)
                assert ids == self.expected[i]
                self.finished += 1
            except grpc.RpcError as error:
                self.failures.append((error.code(), len(ids), error.details()))
            except AssertionError:
                self.failures.append(("lost tokens", len(ids), ""))

    def end(self):
        self.stop.set()
        for thread in self.threads:
            thread.join()
        self.channel.close()


def test_rolling_restarts_fail_no_request(api, tmp_path):
    replicas = [Replica(api, tmp_path / name) for name in ("a", "b")]
    try:
        addresses = [replica.daemon.address for replica in replicas]
        first = replicas[0].daemon
        policy = Load(api, "policy", first, addresses, SERVICE_CONFIG, STREAMS)
        plain = Load(api, "plain", first, addresses, without_retries(SERVICE_CONFIG), 2)
        try:
            for n in range(RESTARTS):
                replicas[n % 2].restart()
                replicas[n % 2].wait_until_used((policy, plain))
        finally:
            for load in (policy, plain):
                load.end()
        print(f"{RESTARTS} restarts: {policy.finished} streams with the policy, {len(policy.failures)} failed; without "
              f"retries {plain.finished}, refused {collections.Counter(f[2][:90] for f in plain.failures)}")
        assert policy.failures == []
        assert policy.finished and plain.finished
        # Without retries a refusal is seen, before the first token.
        assert [failure for failure in plain.failures if failure[:2] != (Code.UNAVAILABLE, 0)] == []
    finally:
        for replica in replicas:
            replica.daemon.stop()


@pytest.fixture(scope="module")
def secured(api, tmp_path_factory):
    """A daemon with TLS and tokens, and the files that its clients need."""
    folder = tmp_path_factory.mktemp("secured")
    authority = Authority(folder, "ours")
    (folder / "tokens").write_text(token_lines(TENANTS))
    (folder / "token").write_text(TENANTS["ada"] + "\n")
    (folder / "wrong").write_text("wrong\n")
    mount = secret(folder / "tls", authority)
    ca = grpc.ssl_channel_credentials(authority.pem)
    daemon = Daemon(api, folder, *tls_flags(mount), "--auth-tokens-file", folder / "tokens",
                    connect=lambda address: grpc.secure_channel(address, ca))
    daemon.ca, daemon.token, daemon.wrong = authority.cert, folder / "token", folder / "wrong"
    yield daemon
    daemon.stop()


def run(*command, api=None):
    stubs = str(pathlib.Path(api.pb.__file__).parents[2]) if api else ""
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=PATIENCE_S,
                          env={**os.environ, "PYTHONPATH": stubs})


def test_the_published_examples_run(daemon, secured, api):
    prompt = "It was a dark night, and"
    python, cpp = [sys.executable, CLIENT / "example.py"], [BIN / "client_example"]
    config = CLIENT / "service-config.json"
    request = api.pb.GenerateRequest(text=prompt)
    request.stopping.max_new_tokens = 40
    request.sampling.seed = 7
    expected = daemon.stub.Generate(request, timeout=PATIENCE_S).text
    target = f"ipv4:{daemon.address}"
    for result in (run(*python, target, prompt, api=api), run(*cpp, target, config, prompt),
                   run(*python, secured.address, prompt, "--ca", secured.ca, "--token-file", secured.token, api=api),
                   run(*cpp, secured.address, config, prompt, secured.ca, secured.token)):
        assert result.returncode == 0, result.stderr
        assert result.stdout == expected + "\n"
    for result in (run(*python, secured.address, prompt, "--ca", secured.ca, "--token-file", secured.wrong, api=api),
                   run(*cpp, secured.address, config, prompt, secured.ca, secured.wrong)):
        assert result.returncode == 1
        assert "the token is not known here" in result.stderr


def test_the_cli_knows_tls_and_tokens(secured):
    cli = [BIN / "dejavu-cli", "--server", secured.address]
    good = run(*cli, "--tls-ca", secured.ca, "--token-file", secured.token, "generate", "Hello", "--max-new-tokens", "2")
    assert good.returncode == 0, good.stderr
    for flags, words in ((["--tls-ca", secured.ca], "carries no token"),
                         (["--tls-ca", secured.ca, "--token-file", secured.wrong], "not known here")):
        refused = run(*cli, *flags, "generate", "Hello")
        assert refused.returncode == 1 and words in refused.stderr, refused.stderr
    for flags, words in ((["--tls-ca", "/nowhere"], "cannot use --tls-ca /nowhere: No such file"),
                         (["--token-file", "/dev/null"], "the file is empty"),
                         (["--tls-key", secured.token], "belong together"),
                         (["--tls-server-name", "x"], "need --tls-ca")):
        wrong = run(*cli, *flags, "health")
        assert wrong.returncode == 2 and words in wrong.stderr, wrong.stderr
    away = [BIN / "dejavu-cli", "--server", "192.0.2.1:50051", "--timeout", "0.2", "--token-file", secured.token]
    assert "in plain text" in run(*away, "health").stderr
    assert run(*away, "--allow-plaintext-token", "health").returncode in (3, 4)
