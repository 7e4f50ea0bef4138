"""Who is let in: TLS, client certificates, tokens; and that secrets change under a running server."""
import hashlib
import os
import socket
import ssl
import subprocess
import threading
import time

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from google.rpc import error_details_pb2

from certificates import Authority, SecretMount
from conftest import MODEL, PATIENCE_S, metric, run_daemon, until

Code = grpc.StatusCode
# Which know no token.
PROBES = {"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch", "/grpc.health.v1.Health/List",
          "/inference.GRPCInferenceService/ServerLive", "/inference.GRPCInferenceService/ServerReady",
          "/inference.GRPCInferenceService/ModelReady",
          "/vllm.grpc.engine.VllmEngine/HealthCheck"}
TENANTS = {"ada": "secret-of-ada", "bob": "secret-of-bob", "operators": "secret-of-operators"}


def bearer(token):
    return [("authorization", f"Bearer {token}")]


def token_lines(tenants):
    return "".join(f"{tenant}:{hashlib.sha256(token.encode()).hexdigest()}\n" for tenant, token in tenants.items())


def code_of(call):
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value.code()


def refusal(call):
    """Code and reason."""
    with pytest.raises(grpc.RpcError) as error:
        call()
    for detail in rpc_status.from_call(error.value).details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return error.value.code(), info.reason
    raise AssertionError(error.value)


def shown_certificate(address):
    """PEM of what the server shows to a new connection."""
    host, port = address.split(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as raw:
        with context.wrap_socket(raw, server_hostname="localhost") as tls:
            return ssl.DER_cert_to_PEM_cert(tls.getpeercert(binary_form=True)).strip()


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"), "ours")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("stranger"), "another")


def secret(folder, authority, **issue):
    cert, key = authority.issue(**issue)
    return SecretMount(folder, cert=cert, key=key, ca=authority.pem)


def tls_flags(mount, client_ca=False):
    return ["--tls-cert", mount["cert"], "--tls-key", mount["key"], "--tls-reload-s", "0.1",
            *(["--tls-client-ca", mount["ca"]] if client_ca else [])]


def secure(ca, cert=None, key=None, name=None):
    """A way to connect: for Daemon, and for clients of their own."""
    def connect(address):
        options = [("grpc.ssl_target_name_override", name)] if name else []
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, cert),
                                   [*options, ("grpc.use_local_subchannel_pool", 1)])
    return connect


def test_only_clients_of_our_authority_get_in(start, api, tmp_path, authority, stranger):
    mount = secret(tmp_path / "tls", authority, names="DNS:localhost")
    ours = authority.issue()
    good = secure(authority.pem, *ours, name="localhost")
    daemon = start(*tls_flags(mount, client_ca=True), connect=good)

    def call(connect):
        with connect(daemon.address) as channel:
            stub = api.rpc.GenerationServiceStub(channel)
            return stub.Generate(daemon.request([2, 5], 2), timeout=PATIENCE_S)

    assert len(call(good).token_ids) == 2
    for refused in (secure(authority.pem, name="localhost"),                                     # no certificate
                    secure(authority.pem, *stranger.issue(), name="localhost"),                  # another authority's
                    secure(authority.pem, *authority.issue(days=-1), name="localhost"),          # expired
                    secure(stranger.pem, *ours, name="localhost"),                               # the server's is not known
                    secure(authority.pem, *ours, name="another.example"),                        # nor is this its name
                    secure(authority.pem, *ours),                                                # nor 127.0.0.1
                    grpc.insecure_channel):
        assert code_of(lambda: call(refused)) == Code.UNAVAILABLE
    assert len(call(good).token_ids) == 2


def test_tls_is_1_2_at_least(start, tmp_path, authority):
    mount = secret(tmp_path / "tls", authority)
    daemon = start(*tls_flags(mount), connect=secure(authority.pem))

    def handshake(version):
        asked = subprocess.run(["openssl", "s_client", "-connect", daemon.address, version, "-alpn", "h2", "-cipher",
                                "ALL:@SECLEVEL=0"], input=b"", capture_output=True, timeout=PATIENCE_S)
        return b"BEGIN CERTIFICATE" in asked.stdout and b"Cipher is (NONE)" not in asked.stdout

    assert [handshake(version) for version in ("-tls1", "-tls1_1", "-tls1_2", "-tls1_3")] == [False, False, True, True]


def test_certificates_are_rotated_under_running_streams(start, api, tmp_path, authority, stranger):
    mount = secret(tmp_path / "tls", authority)
    connect = secure(authority.pem)
    daemon = start(*tls_flags(mount), connect=connect)
    stop, failures, finished = threading.Event(), [], [0, 0]

    def load(i, fresh):
        """Streams on one connection, or on a new one for each."""
        stub = daemon.stub
        while not stop.is_set():
            channel = connect(daemon.address) if fresh else None
            try:
                if fresh:
                    stub = api.rpc.GenerationServiceStub(channel)
                ids = [id for chunk in stub.GenerateStream(daemon.request([2, 7 + i], 40), timeout=PATIENCE_S)
                       for id in chunk.token_ids]
                assert len(ids) == 40
                finished[fresh] += 1
            except Exception as error:  # whatever it is, a client has seen it
                failures.append(error)
                return
            finally:
                if fresh:
                    channel.close()

    threads = [threading.Thread(target=load, args=(i, fresh)) for fresh in (False, True) for i in range(3)]
    for thread in threads:
        thread.start()
    for n in range(10):
        cert, key = authority.issue()
        mount.write(cert=cert, key=key, ca=authority.pem)
        until(lambda: shown_certificate(daemon.address) == cert.decode().strip())
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert all(finished)
    until(lambda: metric(daemon, "dejavu_credential_reloads_total") >= 10)
    expiry = subprocess.run(["openssl", "x509", "-noout", "-enddate", "-dateopt", "iso_8601"], input=cert,
                            capture_output=True, check=True).stdout.decode().split("=")[1].strip()
    assert metric(daemon, "dejavu_tls_certificate_expiry_timestamp_seconds") == \
        ssl.cert_time_to_seconds(time.strftime("%b %d %H:%M:%S %Y GMT", time.strptime(expiry, "%Y-%m-%d %H:%M:%SZ")))

    # What cannot be used changes nothing: a key of another certificate, one that has expired, a file that has gone.
    for bad in (dict(cert=authority.issue()[0], key=key), dict(zip(("cert", "key"), authority.issue(days=-1))),
                dict(cert=cert, key=b"no key")):
        before = metric(daemon, "dejavu_credential_reload_failures_total")
        mount.write(**bad, ca=authority.pem)
        until(lambda: metric(daemon, "dejavu_credential_reload_failures_total") > before)
        assert shown_certificate(daemon.address) == cert.decode().strip()
    until(lambda: str(mount["key"]) in daemon.log())
    # Another authority's, as when that is replaced: what stands, stands; who comes must know it.
    other_cert, other_key = stranger.issue()
    mount.write(cert=other_cert, key=other_key, ca=stranger.pem)
    until(lambda: shown_certificate(daemon.address) == other_cert.decode().strip())
    assert len(daemon.stub.Generate(daemon.request([2, 5], 2), timeout=PATIENCE_S).token_ids) == 2
    with secure(stranger.pem)(daemon.address) as channel:
        assert len(api.rpc.GenerationServiceStub(channel).Generate(daemon.request([2, 5], 2), timeout=PATIENCE_S).token_ids) == 2


def test_clients_authorities_are_rotated_too(start, api, tmp_path, authority, stranger):
    mount = secret(tmp_path / "tls", authority)
    ours, theirs = authority.issue(), stranger.issue()
    daemon = start(*tls_flags(mount, client_ca=True), connect=secure(authority.pem, *ours))

    def serves(client):
        with secure(authority.pem, *client)(daemon.address) as channel:
            try:
                health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
                return True
            except grpc.RpcError as error:
                assert error.code() == Code.UNAVAILABLE
                return False

    assert serves(ours) and not serves(theirs)
    mount.write(cert=mount["cert"].read_bytes(), key=mount["key"].read_bytes(), ca=stranger.pem)
    until(lambda: serves(theirs))
    assert not serves(ours)


def test_files_that_cannot_be_used_stop_the_start(tmp_path, authority):
    cert, key = authority.issue()
    expired, expired_key = authority.issue(days=-1)
    files = dict(cert=cert, key=key, other_key=authority.issue()[1], expired=expired, expired_key=expired_key, text=b"text")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    at = {name: str(tmp_path / name) for name in [*files, "missing", "tokens"]}
    termination = tmp_path / "termination-log"

    def refuses(words, *flags):
        result = run_daemon("--log-termination-file", termination, *flags)
        assert result.returncode == 1, result.stderr
        assert words in result.stderr
        assert words in termination.read_text()

    refuses(at["missing"], "--tls-cert", at["missing"], "--tls-key", at["key"])
    refuses("No such file", "--tls-cert", at["cert"], "--tls-key", at["missing"])
    refuses(f"{at['text']} holds no certificate", "--tls-cert", at["text"], "--tls-key", at["key"])
    refuses(f"{at['text']} holds no private key", "--tls-cert", at["cert"], "--tls-key", at["text"])
    refuses(f"{at['other_key']} is not the key of the certificate", "--tls-cert", at["cert"], "--tls-key", at["other_key"])
    refuses(f"{at['expired']} has expired", "--tls-cert", at["expired"], "--tls-key", at["expired_key"])
    refuses("belong together", "--tls-cert", at["cert"])
    refuses("tls.client_ca needs", "--tls-client-ca", at["cert"])
    refuses(f"{at['text']} holds no certificate", "--tls-cert", at["cert"], "--tls-key", at["key"], "--tls-client-ca",
            at["text"])
    line = token_lines({"ada": "x"})
    for text, words in (("", "holds no token"), ("# nobody\n", "holds no token"), (line + "bob\n", "line 2"),
                        (line + "\nbob:12\n", "line 3"), (line.replace("ada", "a da"), "line 1"),
                        (line + token_lines({"bob": "x"}), "line 2: another tenant has the same token"),
                        ("bob:" + "g" * 64, "line 1"), ("#" * (1 << 20) + "\n", "the limit is 1048576")):
        (tmp_path / "tokens").write_text(text)
        refuses(at["tokens"], "--auth-tokens-file", at["tokens"])
        assert words in termination.read_text()


def test_tokens_cross_a_network_only_over_tls(tmp_path, authority):
    mount = secret(tmp_path / "tls", authority)
    tokens = tmp_path / "tokens"
    tokens.write_text(token_lines(TENANTS))

    def reason(*flags):
        result = run_daemon("--auth-tokens-file", tokens, *flags)
        assert result.returncode == 1
        return result.stderr

    away = "192.0.2.1:50051"  # nobody's address: who is allowed to listen there cannot
    assert f"listen is {away}: tokens would cross the network in plain text" in reason("--listen", away)
    assert f"admin.listen is {away}: tokens would" in reason("--admin-listen", away)
    for allowed in (["--auth-allow-plaintext"], tls_flags(mount)):
        assert f"cannot listen on {away}" in reason("--listen", away, *allowed)


@pytest.fixture
def guarded(start, tmp_path):
    """A daemon that wants tokens; `rewrite` exchanges them."""
    tokens, ports = tmp_path / "tokens", {name: tmp_path / f"{name}_port" for name in ("admin", "health")}
    tokens.write_text("# who may call\n\n" + token_lines(TENANTS))
    daemon = start("--auth-tokens-file", tokens, "--tls-reload-s", "0.1", "--scheduler-max-batch", "1", "--admin-listen", "127.0.0.1:0",
                   "--admin-port-file", ports["admin"], "--health-listen", "127.0.0.1:0", "--health-port-file",
                   ports["health"])
    daemon.admin_address, daemon.health_address = (f"127.0.0.1:{int(port.read_text())}" for port in ports.values())

    def rewrite(tenants):
        (tmp_path / "tokens.new").write_text(token_lines(tenants))
        os.rename(tmp_path / "tokens.new", tokens)

    daemon.rewrite = rewrite
    yield daemon
    for token in TENANTS.values():
        assert token not in daemon.log()


def methods(address, metadata):
    """Every method that the port's own descriptors know: name to whether it is listed there."""
    found = []
    with grpc.insecure_channel(address) as channel:
        info = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        ask = reflection_pb2.ServerReflectionRequest

        def answer(request):
            return next(iter(info(iter([request]), timeout=PATIENCE_S, metadata=metadata)))

        for service in answer(ask(list_services="")).list_services_response.service:
            reply = answer(ask(file_containing_symbol=service.name)).file_descriptor_response
            for file in map(descriptor_pb2.FileDescriptorProto.FromString, reply.file_descriptor_proto):
                for described in file.service:
                    if f"{file.package}.{described.name}" == service.name:
                        found += [f"/{service.name}/{method.name}" for method in described.method]
    return found


def test_every_method_of_every_service_asks_for_a_token(guarded, api):
    public = methods(guarded.address, bearer(TENANTS["ada"]))
    admin = methods(guarded.admin_address, bearer(TENANTS["operators"]))
    # What the published files declare is there, and none of it twice.
    for pb, found in ((api.pb, public), (api.admin_pb, admin)):
        for service in pb.DESCRIPTOR.services_by_name.values():
            assert {f"/{service.full_name}/{method.name}" for method in service.methods} <= set(found)
    assert {"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "/grpc.health.v1.Health/Check"} <= set(public)

    for address, names in ((guarded.address, public), (guarded.admin_address, admin)):
        with grpc.insecure_channel(address) as channel:
            for name in [*names, "/dejavu.v1.GenerationService/NoSuchMethod", "/no.such.Service/Method"]:
                call = lambda metadata: list(channel.stream_stream(name)(iter([b""]), timeout=PATIENCE_S,
                                                                         metadata=metadata))
                if name in PROBES:
                    if not name.endswith("Watch"):
                        assert len(call(None)) == 1
                    continue
                assert refusal(lambda: call(None)) == (Code.UNAUTHENTICATED, "TOKEN_MISSING"), name
                assert refusal(lambda: call(bearer("wrong"))) == (Code.UNAUTHENTICATED, "TOKEN_UNKNOWN"), name


def test_what_is_no_token_is_refused(guarded, api):
    stub, request = guarded.stub, guarded.request([2, 5], 2)
    digest = hashlib.sha256(TENANTS["ada"].encode()).hexdigest()

    def call(metadata):
        return stub.Generate(request, timeout=PATIENCE_S, metadata=metadata)

    for scheme in ("Bearer", "bearer", "BEARER"):
        assert len(call([("authorization", f"{scheme} {TENANTS['ada']}")]).token_ids) == 2
    for malformed in ([("authorization", TENANTS["ada"])], [("authorization", f"Basic {TENANTS['ada']}")],
                      [("authorization", "")], bearer("x" * 4097), bearer(TENANTS["ada"]) * 2):
        assert refusal(lambda: call(malformed)) == (Code.UNAUTHENTICATED, "TOKEN_MALFORMED")
    for unknown in ("", digest, TENANTS["ada"] + " ", TENANTS["ada"][:-1], "x" * 4096):
        assert refusal(lambda: call(bearer(unknown))) == (Code.UNAUTHENTICATED, "TOKEN_UNKNOWN")


def test_a_revoked_token_is_refused_and_a_new_one_taken(guarded, api):
    def call(token):
        return guarded.stub.Generate(guarded.request([2, 5], 2), timeout=PATIENCE_S, metadata=bearer(token))

    request = guarded.request([2, 5], 480)
    running = guarded.stub.GenerateStream(request, timeout=PATIENCE_S, metadata=bearer(TENANTS["ada"]))
    next(running)
    guarded.rewrite({"ada": "next-secret-of-ada"})
    until(lambda: metric(guarded, "dejavu_credential_reloads_total") == 1)
    assert refusal(lambda: call(TENANTS["ada"])) == (Code.UNAUTHENTICATED, "TOKEN_UNKNOWN")
    assert refusal(lambda: call(TENANTS["bob"])) == (Code.UNAUTHENTICATED, "TOKEN_UNKNOWN")
    assert len(call("next-secret-of-ada").token_ids) == 2
    assert list(running)[-1].HasField("finish")  # it was let in
    guarded.rewrite({})  # nobody: surely a mistake
    until(lambda: metric(guarded, "dejavu_credential_reload_failures_total") > 0)
    assert len(call("next-secret-of-ada").token_ids) == 2
    until(lambda: "holds no token" in guarded.log())


def test_a_token_speaks_for_its_tenant_alone(guarded, api):
    def stream(tenant, claimed=None, **fields):
        metadata = bearer(TENANTS[tenant]) + ([("x-tenant", claimed)] if claimed else [])
        return guarded.stub.GenerateStream(guarded.request([2, 5], 480, **fields), timeout=PATIENCE_S, metadata=metadata)

    def abort(tenant, request_id):
        return guarded.stub.Abort(api.pb.AbortRequest(request_id=request_id), timeout=PATIENCE_S,
                                  metadata=bearer(TENANTS[tenant])).found

    assert refusal(lambda: next(stream("ada", claimed="bob"))) == (Code.PERMISSION_DENIED, "TENANT_MISMATCH")
    before = [stream("ada") for _ in range(12)]  # they run one by one: what waits behind them does not end by itself
    last = stream("ada", claimed="ada", request_id="ada-1")

    with grpc.insecure_channel(guarded.admin_address) as channel:
        state = api.admin_rpc.AdminServiceStub(channel).GetEngineState
        until(lambda: "ada-1" in state(api.admin_pb.GetEngineStateRequest(), timeout=PATIENCE_S,
                                       metadata=bearer(TENANTS["operators"])).live_request_ids)
    assert not abort("bob", "ada-1")  # as if there were none
    assert abort("ada", "ada-1")
    assert code_of(lambda: list(last)) == Code.CANCELLED
    for other in before:
        other.cancel()


def test_only_operators_operate(guarded, api):
    with grpc.insecure_channel(guarded.admin_address) as channel:
        state = api.admin_rpc.AdminServiceStub(channel).GetEngineState
        ask = api.admin_pb.GetEngineStateRequest()
        assert refusal(lambda: state(ask, timeout=PATIENCE_S, metadata=bearer(TENANTS["ada"]))) == \
            (Code.PERMISSION_DENIED, "NOT_AN_OPERATOR")
        state(ask, timeout=PATIENCE_S, metadata=bearer(TENANTS["operators"]))


def test_the_port_for_probes_serves_health_alone(guarded, api):
    with grpc.insecure_channel(guarded.health_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "liveness", "dejavu.v1.GenerationService"):
            assert health.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S).status == 1
        stub = api.rpc.GenerationServiceStub(channel)
        call = lambda metadata: stub.Generate(guarded.request([2], 1), timeout=PATIENCE_S, metadata=metadata)
        assert code_of(lambda: call(None)) == Code.UNAUTHENTICATED
        assert code_of(lambda: call(bearer(TENANTS["ada"]))) == Code.UNIMPLEMENTED
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        assert code_of(lambda: list(reflect(iter([]), metadata=bearer(TENANTS["ada"]), timeout=PATIENCE_S))) == \
            Code.UNIMPLEMENTED


def test_a_failure_leaves_its_reason_behind(start, tmp_path):
    termination = tmp_path / "termination-log"
    daemon = start("--scheduler-fault", "throw@3", "--log-termination-file", termination)
    assert code_of(lambda: daemon.stub.Generate(daemon.request([2, 5], 9), timeout=PATIENCE_S)) is not None
    assert daemon.wait() == 3
    assert termination.read_text() == "the engine has failed; exiting\n"
