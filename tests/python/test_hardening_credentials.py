"""Credentials, signals, ids and quotas under callers and files that mean no good."""
import base64
import contextlib
import os
import signal
import subprocess

import grpc
import pytest

from certificates import Authority
from conftest import BIN, PATIENCE_S
from test_security import (TENANTS, bearer, metric, refusal, run_daemon, secret, secure, shown_certificate, tls_flags,
                           token_lines, until)

Code = grpc.StatusCode


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"), "ours")


def with_unreadable_end(pem):
    """The certificate, with something in place of its last day that is no time."""
    lines = pem.decode().strip().splitlines()
    der = base64.b64decode("".join(lines[1:-1]))
    end = subprocess.run(["openssl", "x509", "-noout", "-enddate", "-dateopt", "iso_8601"], input=pem, capture_output=True,
                         check=True).stdout.decode().split("=")[1].strip()
    wire = "".join(c for c in end[2:] if c.isdigit()).encode() + b"Z"
    assert der.count(wire) == 1
    spoilt = base64.encodebytes(der.replace(wire, b"no time, alas")).decode()
    return f"-----BEGIN CERTIFICATE-----\n{spoilt}-----END CERTIFICATE-----\n".encode()


def openssl_pair(folder, *key_arguments):
    """A certificate signed by itself, and its key."""
    cert, key = folder / "own.crt", folder / "own.key"
    subprocess.run(["openssl", "req", "-x509", *key_arguments, "-nodes", "-days", "2", "-subj", "/CN=localhost", "-keyout",
                    key, "-out", cert], check=True, capture_output=True)
    return cert.read_bytes(), key.read_bytes()


def test_certificates_that_cannot_serve_change_nothing(start, tmp_path, authority):
    mount = secret(tmp_path / "tls", authority)
    good = mount["cert"].read_bytes(), mount["key"].read_bytes()
    daemon = start(*tls_flags(mount), connect=secure(authority.pem))
    small = openssl_pair(tmp_path, "-newkey", "rsa:1024")
    for cert, key, words in ((with_unreadable_end(good[0]), good[1], "no time that could be read as the end"),
                             (*small, "serves no TLS connection")):
        before = metric(daemon, "dejavu_credential_reload_failures_total")
        mount.write(cert=cert, key=key, ca=authority.pem)
        until(lambda: metric(daemon, "dejavu_credential_reload_failures_total") > before)
        assert shown_certificate(daemon.address) == good[0].decode().strip()
        until(lambda: words in daemon.log())
        # Nor does a server start with them.
        refused = run_daemon(*tls_flags(mount))
        assert refused.returncode == 1 and words in refused.stderr
    mount.write(cert=good[0], key=good[1], ca=authority.pem)
    assert len(daemon.stub.Generate(daemon.request([2, 5], 2), timeout=PATIENCE_S).token_ids) == 2


def test_what_is_no_file_blocks_neither_start_nor_reload_nor_end(start, tmp_path, authority):
    fifo, folder = tmp_path / "fifo", tmp_path / "folder"
    os.mkfifo(fifo)
    folder.mkdir()
    cert, key = authority.issue()
    (tmp_path / "cert").write_bytes(cert)
    (tmp_path / "key").write_bytes(key)
    for path in (fifo, folder, "/dev/zero"):
        for flags in (["--auth-tokens-file", path], ["--tls-cert", path, "--tls-key", tmp_path / "key"],
                      ["--tls-cert", tmp_path / "cert", "--tls-key", path],
                      ["--tls-cert", tmp_path / "cert", "--tls-key", tmp_path / "key", "--tls-client-ca", path]):
            refused = run_daemon(*flags)
            assert refused.returncode == 1 and f"cannot read {path}" in refused.stderr

    tokens = tmp_path / "tokens"
    tokens.write_text(token_lines(TENANTS))
    daemon = start("--auth-tokens-file", tokens, "--tls-reload-s", "0.1")

    def generates():
        return len(daemon.stub.Generate(daemon.request([2, 5], 2), timeout=PATIENCE_S,
                                        metadata=bearer(TENANTS["ada"])).token_ids) == 2

    for kind in (os.mkfifo, os.mkdir):
        before = metric(daemon, "dejavu_credential_reload_failures_total")
        kind(tmp_path / "next")
        tokens.unlink()
        os.rename(tmp_path / "next", tokens)
        until(lambda: metric(daemon, "dejavu_credential_reload_failures_total") > before)
        assert generates()
        if kind is os.mkfifo:
            (tmp_path / "good").write_text(token_lines({**TENANTS, "eve": "secret-of-eve"}))
            os.rename(tmp_path / "good", tokens)
            until(lambda: metric(daemon, "dejavu_credential_reloads_total") == 1)
    daemon.terminate()
    assert daemon.wait() == 0


def test_sighup_has_credentials_read_at_once(start, tmp_path, authority):
    mount = secret(tmp_path / "tls", authority)
    tokens = tmp_path / "tokens"
    tokens.write_text(token_lines(TENANTS))
    daemon = start("--tls-cert", mount["cert"], "--tls-key", mount["key"], "--tls-reload-s", "86400", "--auth-tokens-file",
                   tokens, connect=secure(authority.pem))
    cert, key = authority.issue()
    mount.write(cert=cert, key=key, ca=authority.pem)
    tokens.write_text(token_lines({"ada": "next-secret-of-ada"}))
    daemon.signal(signal.SIGHUP)
    until(lambda: shown_certificate(daemon.address) == cert.decode().strip())
    until(lambda: metric(daemon, "dejavu_credential_reloads_total") == 2)
    call = lambda token: daemon.stub.Generate(daemon.request([2, 5], 2), timeout=PATIENCE_S, metadata=bearer(token))
    assert len(call("next-secret-of-ada").token_ids) == 2
    assert refusal(lambda: call(TENANTS["ada"]))[1] == "TOKEN_UNKNOWN"
    # Who asks hears of a fault each time.
    tokens.write_text("nonsense\n")
    for failures in (1, 2):
        daemon.signal(signal.SIGHUP)
        until(lambda: metric(daemon, "dejavu_credential_reload_failures_total") == failures)
    assert len(call("next-secret-of-ada").token_ids) == 2


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.skipif(
    not (BIN / "libdejavu_mpi.so").exists(), reason="built without MPI"))])
def test_stray_signals_end_nothing(start, processes):
    daemon = start(processes=processes)
    stray = [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO,
             signal.SIGPWR, signal.SIGRTMIN, signal.SIGRTMAX]
    for rank in range(processes):
        for number in stray:
            daemon.signal(number, rank)
    until(lambda: "no certificates and no tokens" in daemon.log())
    assert len(daemon.stub.Generate(daemon.request([2, 5], 9), timeout=PATIENCE_S).token_ids) == 9
    daemon.terminate()
    assert daemon.wait() == 0


RETRIES = 300


def code(call):
    try:
        call()
    except grpc.RpcError as error:
        return error.code()
    return Code.OK


def test_an_id_is_free_the_moment_its_client_has_the_answer(daemon):
    """Success and refusal by the engine: the next request of that id comes at once."""
    request = daemon.request([2, 5], 1, request_id="again")
    codes = [code(lambda: daemon.stub.Generate(request, timeout=PATIENCE_S)) for _ in range(RETRIES)]
    codes += [code(lambda: list(daemon.stub.GenerateStream(request, timeout=PATIENCE_S))) for _ in range(RETRIES)]
    assert codes == [Code.OK] * (2 * RETRIES)


def test_an_id_is_free_after_an_error_of_the_engine(start):
    daemon = start("--scheduler-max-batch", "1", "--scheduler-max-waiting-requests", "1", "--scheduler-fault", "slow@20",
                   "--scheduler-deadline-slack", "0")
    running = daemon.stub.GenerateStream(daemon.request([2, 5], 490), timeout=PATIENCE_S)
    next(running)
    waiting = daemon.stub.GenerateStream(daemon.request([2, 5], 1), timeout=PATIENCE_S)
    until(lambda: daemon.load().waiting_requests == 1)
    request = daemon.request([2, 5], 1, request_id="again")
    for _ in range(RETRIES):
        assert code(lambda: daemon.stub.Generate(request, timeout=PATIENCE_S)) == Code.RESOURCE_EXHAUSTED
    for call in (running, waiting):
        call.cancel()


@pytest.mark.parametrize("reused", [True, False])
def test_an_id_is_free_when_its_client_has_given_up(braked, api, reused):
    """After a deadline or a cancel the client has no answer, and it may come again before the server knows."""
    request = braked.request([2, 5], 480, request_id=f"given-up-{reused}")
    connections = [braked.stub]
    with contextlib.ExitStack() as stack:
        if not reused:
            channel = stack.enter_context(grpc.insecure_channel(braked.address, [("grpc.use_local_subchannel_pool", 1)]))
            connections.append(api.rpc.GenerationServiceStub(channel))
        for i in range(RETRIES):
            stub = connections[i % len(connections)]
            if i % 3 == 0:
                assert code(lambda: list(stub.GenerateStream(request, timeout=0.015))) == Code.DEADLINE_EXCEEDED
            stream = stub.GenerateStream(request, timeout=PATIENCE_S)
            assert next(stream).prompt.request_id == request.request_id
            stream.cancel()
    braked.expect_idle()


def test_what_runs_keeps_its_id(braked):
    request = braked.request([2, 5], 480, request_id="mine")
    stream = braked.stub.GenerateStream(request, timeout=PATIENCE_S)
    next(stream)
    assert refusal(lambda: braked.stub.Generate(request, timeout=PATIENCE_S)) == (Code.ALREADY_EXISTS, "DUPLICATE_REQUEST_ID")
    stream.cancel()
    braked.expect_idle()


@pytest.fixture
def tenants(start, tmp_path):
    """A daemon that knows tenants, slowly."""
    tokens, port = tmp_path / "tokens", tmp_path / "admin_port"
    tokens.write_text(token_lines(TENANTS))
    daemon = start("--auth-tokens-file", tokens, "--tls-reload-s", "0.1", "--scheduler-fault", "slow@10",
                   "--scheduler-deadline-slack", "0", "--admin-listen", "127.0.0.1:0", "--admin-port-file", port)
    daemon.admin_address, daemon.tokens = f"127.0.0.1:{int(port.read_text())}", tokens
    daemon.as_tenant = lambda tenant: dict(timeout=PATIENCE_S, metadata=bearer(TENANTS[tenant]))
    return daemon


def test_the_ids_of_tenants_have_nothing_to_do_with_each_other(tenants, api):
    request = tenants.request([2, 5], 480, request_id="shared")
    streams = {}
    for tenant in ("ada", "bob"):
        streams[tenant] = tenants.stub.GenerateStream(request, **tenants.as_tenant(tenant))
        assert next(streams[tenant]).prompt.request_id == "shared"

    def abort(tenant, request_id):
        return tenants.stub.Abort(api.pb.AbortRequest(request_id=request_id), **tenants.as_tenant(tenant))

    # Another tenant's id is as good as unknown.
    only = tenants.stub.GenerateStream(tenants.request([2, 5], 480, request_id="ada-1"), **tenants.as_tenant("ada"))
    next(only)
    assert abort("bob", "ada-1") == abort("bob", "no-such-id") == api.pb.AbortResponse(found=False)
    assert code(lambda: tenants.stub.Abort(api.pb.AbortRequest(request_id="ada-1", tenant="ada"),
                                                   **tenants.as_tenant("bob"))) == Code.INVALID_ARGUMENT
    with grpc.insecure_channel(tenants.admin_address) as channel:
        operator = api.admin_rpc.AdminServiceStub(channel)
        state = operator.GetEngineState(api.admin_pb.GetEngineStateRequest(), **tenants.as_tenant("operators"))
        assert sorted(zip(state.live_request_tenants, state.live_request_ids)) == \
            [("ada", "ada-1"), ("ada", "shared"), ("bob", "shared")]
        end = lambda **fields: operator.AbortRequest(api.pb.AbortRequest(**fields), **tenants.as_tenant("operators")).found
        assert refusal(lambda: end(request_id="shared")) == (Code.FAILED_PRECONDITION, "AMBIGUOUS_REQUEST_ID")
        assert not end(request_id="shared", tenant="eve")
        assert end(request_id="shared", tenant="bob")
        assert code(lambda: list(streams["bob"])) == Code.CANCELLED
        assert end(request_id="ada-1")
        assert code(lambda: list(only)) == Code.CANCELLED
    assert abort("ada", "shared").found
    assert code(lambda: list(streams["ada"])) == Code.CANCELLED
