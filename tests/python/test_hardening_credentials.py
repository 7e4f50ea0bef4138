"""Credentials, signals, ids and quotas under callers and files that mean no good."""
import base64
import contextlib
import os
import re
import signal
import subprocess
import time
import urllib.request

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from certificates import Authority
from conftest import BIN, MODEL, PATIENCE_S
from log_lines import line_of, lines_of, poll
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
            assert refused.returncode == 1 and f"{path}: is a" in refused.stderr

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
    """Two samples never fit a queue of one."""
    daemon = start("--scheduler-max-waiting-requests", "1")
    request = daemon.request([2, 5], 1, request_id="again")
    request.sampling.temperature, request.sampling.samples = 1, 2
    codes = [code(lambda: daemon.stub.Generate(request, timeout=PATIENCE_S)) for _ in range(RETRIES)]
    assert codes == [Code.RESOURCE_EXHAUSTED] * RETRIES


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


def quota_refusal(call):
    """Quota, value, limit and the seconds after which it would be let in, of a refusal."""
    with pytest.raises(grpc.RpcError) as error:
        call()
    assert error.value.code() == Code.RESOURCE_EXHAUSTED
    info, failure, retry = error_details_pb2.ErrorInfo(), error_details_pb2.QuotaFailure(), error_details_pb2.RetryInfo()
    for detail in rpc_status.from_call(error.value).details:
        for message in (info, failure, retry):
            detail.Unpack(message)
    assert info.reason == "QUOTA_EXCEEDED" and failure.violations[0].subject == info.metadata["quota"]
    return (info.metadata["quota"], int(info.metadata["value"]), int(info.metadata["limit"]),
            retry.retry_delay.ToTimedelta().total_seconds())


def with_settings(settings):
    return "".join(line + (f" {settings[line.split(':')[0]]}" if line.split(":")[0] in settings else "") + "\n"
                   for line in token_lines(TENANTS).splitlines())


def rewrite(tokens, settings):
    new = tokens.with_suffix(".new")
    new.write_text(with_settings(settings))
    os.rename(new, tokens)


def my_info(daemon, tenant):
    return daemon.stub.GetServerInfo(daemon.api.pb.GetServerInfoRequest(), **daemon.as_tenant(tenant))


def test_quotas_of_tenants(tenants, api):
    """So small ones that what was used does not fade within the test, however slow the machine is."""
    rewrite(tenants.tokens, {"ada": "requests_per_minute=1 tokens_per_minute=1000"})
    until(lambda: my_info(tenants, "ada").tenant.requests_per_minute == 1)
    call = lambda tenant: tenants.stub.Generate(tenants.request([2, 5], 2), **tenants.as_tenant(tenant))
    call("ada")
    quota, value, limit, wait_s = quota_refusal(lambda: call("ada"))
    assert (quota, value, limit) == ("requests_per_minute", 2, 1) and 0 < wait_s <= 60
    for _ in range(5):
        call("bob")  # others have no such quota
    # What was used stays used when the file changes.
    rewrite(tenants.tokens, {"ada": "requests_per_minute=2 tokens_per_minute=500"})
    until(lambda: my_info(tenants, "ada").tenant.requests_per_minute == 2)
    info = my_info(tenants, "ada").tenant
    assert 0 < info.requests_used <= 1 and info.tokens_used <= 4 and info.live_requests == 0
    assert (info.tokens_per_minute, info.HasField("concurrent_requests")) == (500, False)
    call("ada")
    assert quota_refusal(lambda: call("ada"))[:3] == ("requests_per_minute", 3, 2)


def test_tokens_are_booked_and_what_was_not_used_comes_back(tenants, api):
    rewrite(tenants.tokens, {"ada": "tokens_per_minute=300"})
    until(lambda: my_info(tenants, "ada").tenant.tokens_per_minute == 300)
    # Ends at its first token: 199 of 202 come back, before the client has the answer.
    request = tenants.request([2, 5], 200)
    first = tenants.stub.Generate(tenants.request([2, 5], 1), **tenants.as_tenant("ada")).token_ids[0]
    request.stopping.stop_token_ids.append(first)
    for _ in range(20):
        assert len(tenants.stub.Generate(request, **tenants.as_tenant("ada")).token_ids) == 1
    # Samples count; the prompt once.
    many = tenants.request([2, 5], 150)
    many.sampling.temperature, many.sampling.samples = 1, 2
    assert quota_refusal(lambda: tenants.stub.Generate(many, **tenants.as_tenant("ada"))) == \
        ("tokens_per_minute", 302, 300, 0)  # never: there is no advice to wait
    stream = tenants.stub.GenerateStream(tenants.request([2, 5], 200), **tenants.as_tenant("ada"))
    next(stream)
    quota, value, limit, wait_s = quota_refusal(
        lambda: tenants.stub.Generate(tenants.request([2, 5], 250), **tenants.as_tenant("ada")))
    assert (quota, limit) == ("tokens_per_minute", 300) and wait_s > 0
    score = api.pb.ScoreRequest()
    score.token_ids.ids.extend([2] * 290)
    assert quota_refusal(lambda: tenants.stub.Score(score, **tenants.as_tenant("ada")))[0] == "tokens_per_minute"
    stream.cancel()
    until(lambda: my_info(tenants, "ada").tenant.tokens_used < 150)


def test_concurrent_requests_are_counted_until_the_client_has_the_answer(tenants, api):
    rewrite(tenants.tokens, {"ada": "concurrent_requests=2"})
    until(lambda: my_info(tenants, "ada").tenant.concurrent_requests == 2)
    begin = lambda: tenants.stub.GenerateStream(tenants.request([2, 5], 480), **tenants.as_tenant("ada"))
    streams = [begin(), begin()]
    for stream in streams:
        next(stream)
    assert my_info(tenants, "ada").tenant.live_requests == 2
    assert my_info(tenants, "bob").tenant.live_requests == 0
    assert quota_refusal(lambda: next(begin()))[:3] == ("concurrent_requests", 3, 2)
    streams.pop().cancel()
    until(lambda: my_info(tenants, "ada").tenant.live_requests == 1)
    short = tenants.request([2, 5], 1)
    for _ in range(100):
        tenants.stub.Generate(short, **tenants.as_tenant("ada"))
    streams.pop().cancel()


def test_tiers_of_tenants(start, tmp_path, api):
    tokens = tmp_path / "tokens"
    tokens.write_text(with_settings({"ada": "highest_tier=exact lowest_tier=exact", "bob": "highest_tier=balanced"}))
    daemon = start("--auth-tokens-file", tokens, "--sparsity-default-tier", "exact")

    def tier_of(tenant, tier=0):
        request = daemon.request([2, 5], 1)
        request.sparsity.tier = tier
        return daemon.stub.Generate(request, timeout=PATIENCE_S, metadata=bearer(TENANTS[tenant])).prompt.tier

    pb = api.pb
    assert tier_of("ada") == tier_of("ada", pb.TIER_EXACT) == pb.TIER_EXACT
    for tier in (pb.TIER_DENSE, pb.TIER_HIGH, pb.TIER_FAST):
        assert refusal(lambda: tier_of("ada", tier)) == (Code.PERMISSION_DENIED, "TIER_NOT_ALLOWED")
    # The server's default is too good for bob: without a name he gets the nearest that he may have.
    assert tier_of("bob") == tier_of("bob", pb.TIER_BALANCED) == pb.TIER_BALANCED
    assert refusal(lambda: tier_of("bob", pb.TIER_EXACT)) == (Code.PERMISSION_DENIED, "TIER_NOT_ALLOWED")
    assert tier_of("operators", pb.TIER_DENSE) == pb.TIER_DENSE
    info = daemon.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=PATIENCE_S, metadata=bearer(TENANTS["bob"])).tenant
    assert (info.tenant, info.highest_tier, info.lowest_tier) == ("bob", pb.TIER_BALANCED, pb.TIER_FAST)


def test_tenants_see_neither_paths_nor_the_load_of_others(tenants, api):
    stream = tenants.stub.GenerateStream(tenants.request([2, 5], 480), **tenants.as_tenant("ada"))
    next(stream)
    told = my_info(tenants, "bob")
    assert told.state == api.pb.SERVER_STATE_SERVING and told.limits.max_batch > 0
    assert not told.HasField("load") and not told.HasField("admission") and told.cost_model.steps == 0
    assert told.tenant.tenant == "bob" and told.tenant.live_requests == 0 and not told.tenant.busy
    assert told.sparsity.predictor and "/" not in told.sparsity.predictor
    assert str(MODEL) not in str(told)
    everything = my_info(tenants, "operators")
    assert everything.load.running_requests == 1 and everything.admission.live == 1
    assert str(MODEL) in everything.sparsity.predictor
    # Clients go on working.
    token = tenants.tokens.with_name("bobs")
    token.write_text(TENANTS["bob"])
    shown = subprocess.run([BIN / "dejavu-cli", "--server", tenants.address, "--token-file", token, "info"],
                           capture_output=True, text=True, timeout=PATIENCE_S)
    assert shown.returncode == 0 and "SERVING" in shown.stdout, shown.stderr
    stream.cancel()


@pytest.mark.parametrize("form", ["text", "json"])
def test_guesses_at_tokens_do_not_fill_the_log(start, tmp_path, form):
    tokens = tmp_path / "tokens"
    tokens.write_text(token_lines(TENANTS))
    daemon = start("--auth-tokens-file", tokens, "--log-format", form, "--log-refused-per-s", "3")
    guesses = 400
    began = time.monotonic()
    for i in range(guesses):
        assert code(lambda: daemon.stub.Generate(daemon.request([2], 1), timeout=PATIENCE_S, metadata=bearer(f"guess {i}"))) == \
            Code.UNAUTHENTICATED
    seconds = time.monotonic() - began + 2  # windows begin and end anywhere

    def told():
        lines = [line for line in lines_of(daemon) if line.get("code") == "UNAUTHENTICATED"]
        shown = [line for line in lines if line["event"] == "request"]
        counted = sum(int(line["count"]) for line in lines if line["event"] == "refusals_left_out")
        return (len(lines), len(shown), counted) if len(shown) + counted == guesses else None

    lines, shown, counted = poll(told, daemon.log)
    assert counted > 0 and 3 <= shown <= 3 * seconds and lines <= 4 * seconds
    # Others are logged as ever.
    good = daemon.request([2, 5], 2, request_id="good")
    daemon.stub.Generate(good, timeout=PATIENCE_S, metadata=bearer(TENANTS["ada"]))
    assert line_of(daemon, "good")["code"] == "OK"


def test_metrics_by_tenant_are_bounded(start, tmp_path):
    tokens = tmp_path / "tokens"
    names = {f"tenant-{i}": f"secret {i}" for i in range(5)}
    tokens.write_text(token_lines(names).replace("\n", " requests_per_minute=2\n"))
    daemon = start("--auth-tokens-file", tokens, "--metrics-tenants", "2")
    calls = 4
    for name, token in names.items():
        codes = [code(lambda: daemon.stub.Generate(daemon.request([2, 5], 3), timeout=PATIENCE_S, metadata=bearer(token)))
                 for _ in range(calls)]
        assert codes == [Code.OK] * 2 + [Code.RESOURCE_EXHAUSTED] * 2

    def tenants_of(metric_name):
        with urllib.request.urlopen(f"http://{daemon.metrics_address}/metrics", timeout=PATIENCE_S) as page:
            found = {}
            for tenant, value in re.findall(rf'^{metric_name}{{.*tenant="([^"]*)".*}} (\S+)$', page.read().decode(), re.M):
                found[tenant] = found.get(tenant, 0) + float(value)
            return found

    until(lambda: sum(tenants_of("dejavu_tenant_requests_total").values()) == calls * len(names))
    assert tenants_of("dejavu_tenant_requests_total") == {"tenant-0": 4, "tenant-1": 4, "all others": 12}
    assert tenants_of("dejavu_tenant_generated_tokens_total") == {"tenant-0": 6, "tenant-1": 6, "all others": 18}
    assert tenants_of("dejavu_tenant_prompt_tokens_total") == {"tenant-0": 4, "tenant-1": 4, "all others": 12}
    assert tenants_of("dejavu_tenant_quota_refusals_total") == {"tenant-0": 2, "tenant-1": 2, "all others": 6}


def test_without_being_asked_nothing_is_counted_by_tenant(tenants):
    tenants.stub.Generate(tenants.request([2, 5], 1), **tenants.as_tenant("ada"))
    with urllib.request.urlopen(f"http://{tenants.metrics_address}/metrics", timeout=PATIENCE_S) as page:
        assert "dejavu_tenant" not in page.read().decode()
