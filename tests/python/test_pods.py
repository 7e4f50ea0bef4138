"""The pods of deploy/kubernetes, against the daemon that runs in them: its settings, probes, time to drain, ranks."""
import contextlib
import os
import pathlib
import re
import signal
import subprocess
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from conftest import BIN, MODEL, MPI_ENVIRONMENT, PATIENCE_S
from manifests import DEPLOY, KUBERNETES, OVERLAYS, dejavud, environment, of_kind, overlays, pods, servers, settings


@overlays
def test_the_daemon_takes_the_settings_and_listens_on_the_ports(overlay, tmp_path):
    for _, container in servers(overlay):
        config = settings(overlay, container, tmp_path)
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        listens = {"grpc": config["listen"], "health": config["health"]["listen"], "metrics": config["metrics"]["listen"]}
        if overlay == "edge":
            assert listens.pop("grpc").startswith("127.0.0.1:") and "grpc" not in ports  # the proxy's, for which see below
        assert listens == {name: f"0.0.0.0:{ports[name]}" for name in listens}
        assert config["admin"]["listen"].startswith("127.0.0.1:")
        assert config["log"]["termination_file"] == container["terminationMessagePath"] == "/dev/termination-log"
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert str(pathlib.PurePath(config["model"]).parent) in mounts
        files = [*(config["tls"][key] for key in ("cert", "key", "client_ca")), config["auth"]["tokens_file"]]
        if overlay == "edge":
            assert files == ["", "", "", "/tokens/tokens"] and "subPath" not in mounts["/tokens"]
        elif overlay == "tls":
            # Mounted as whole folders: Kubernetes does not rotate what is mounted by subPath.
            assert all("subPath" not in mounts[str(pathlib.PurePath(file).parent)] for file in files)
        else:
            assert files == ["", "", "", ""]
        # A GPU is asked for by name, so that a pod without one fails instead of being slow.
        gpus = int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
        assert config["device"] == ("cuda" if gpus else "cpu")
        if gpus > 1:
            shm, = (volume for pod, each in servers(overlay) if each is container for volume in pod["spec"]["volumes"]
                    if volume["name"] == mounts["/dev/shm"]["name"])
            assert shm["emptyDir"]["medium"] == "Memory"


def proxies():
    """The proxy's containers, with their pods, the daemon's settings and their own."""
    for pod, container in servers("edge"):
        proxy, = (each for each in pod["spec"]["containers"] if each["name"] == "proxy")
        yield pod, container, proxy, environment("edge", proxy)


def test_the_proxy_stands_before_its_daemon(tmp_path):
    for _, container, proxy, own in proxies():
        config = settings("edge", container, tmp_path)
        ports = {port["name"]: port["containerPort"] for port in proxy["ports"]}
        assert own["PROXY_DAEMON"] == config["listen"] and config["transport"]["gateways"] == "127.0.0.1"
        for name, listen in (("grpc", "PROXY_LISTEN"), ("edge-health", "PROXY_HEALTH_LISTEN"), ("edge-metrics", "PROXY_METRICS_LISTEN")):
            assert own[listen] == f"0.0.0.0:{ports[name]}"
        assert proxy["readinessProbe"]["grpc"] == {"port": ports["edge-health"], "service": "dejavu.v1.GenerationService"}
        # What it is told exists.
        known = set(re.findall(r"\bPROXY_[A-Z_]+", (DEPLOY / "proxy/haproxy.cfg").read_text()))
        assert own.keys() <= known
        assert own["PROXY_TLS"] in {mount["mountPath"] for mount in proxy["volumeMounts"] if "subPath" not in mount}


def test_the_proxy_ends_after_the_daemon_has_told_its_clients(tmp_path):
    for pod, container, proxy, own in proxies():
        drain = settings("edge", container, tmp_path)["drain"]
        daemon_refuses_s = container["lifecycle"]["preStop"]["sleep"]["seconds"] + drain["linger_ms"] / 1000
        proxy_closes_s = proxy["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert proxy_closes_s >= daemon_refuses_s
        proxy_drain_s = int(own["PROXY_DRAIN"].removesuffix("s"))
        assert proxy_drain_s >= drain["timeout_s"]
        assert pod["spec"]["terminationGracePeriodSeconds"] >= proxy_closes_s + proxy_drain_s + 10


def test_settings_of_the_proxy_are_explained_and_used():
    """In the head of deploy/proxy/serve, with the defaults of the configuration."""
    configuration, script = ((DEPLOY / "proxy" / name).read_text() for name in ("haproxy.cfg", "serve"))
    used = dict(re.findall(r'\$\{(PROXY_[A-Z_]+)-([^}]*)\}', configuration + script))
    head = re.sub(r"\n#\s*", " ", script[:script.index("set -u")])
    for name, default in used.items():
        assert name in head and default in head, name
    assert set(re.findall(r"PROXY_[A-Z_]+", head)) == used.keys() | {"PROXY_PLAINTEXT"}


@overlays
def test_pods_are_given_the_time_to_drain(overlay, tmp_path):
    for pod, container in servers(overlay):
        drain = settings(overlay, container, tmp_path)["drain"]
        needed_s = container["lifecycle"]["preStop"]["sleep"]["seconds"] + drain["linger_ms"] / 1000 + drain["timeout_s"]
        assert pod["spec"]["terminationGracePeriodSeconds"] >= needed_s + 10
        # A readiness probe that fails is seen before new requests are refused.
        probe = container["readinessProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] <= drain["linger_ms"] / 1000
        if overlay == "multi-host":
            for name, other in pods(overlay):
                if "workerTemplate" in name:
                    assert other["spec"]["terminationGracePeriodSeconds"] >= pod["spec"]["terminationGracePeriodSeconds"]
    for document in of_kind(overlay, "Deployment"):
        rolling = document["spec"]["strategy"]["rollingUpdate"]
        assert rolling["maxUnavailable"] + rolling["maxSurge"] == 1
        assert rolling["maxUnavailable"] < document["spec"].get("replicas", 2)


def test_probes_ask_for_what_the_daemon_answers(start, tmp_path):
    """On the listener of the probes, by the names in the manifests; a name that does not exist is told from one that does."""
    asked = set()
    for overlay in OVERLAYS:
        for _, container in servers(overlay):
            port, = (port["containerPort"] for port in container["ports"] if port["name"] == "health")
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert container[probe]["grpc"]["port"] == port
                asked.add((probe, container[probe]["grpc"].get("service", "")))
    assert asked == {("startupProbe", ""), ("readinessProbe", "dejavu.v1.GenerationService"), ("livenessProbe", "liveness")}

    port_file = tmp_path / "health_port"
    daemon = start("--health-listen", "127.0.0.1:0", "--health-port-file", port_file)
    with grpc.insecure_channel(f"127.0.0.1:{port_file.read_text().strip()}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for _, service in asked:
            reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING, (service, daemon.log())
        with pytest.raises(grpc.RpcError) as error:
            stub.Check(health_pb2.HealthCheckRequest(service="readiness"), timeout=PATIENCE_S)
        assert error.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("overlay,model,devices", [("tp-8", "opt-66b", 8), ("multi-host", "opt-175b", 16)])
def test_large_models_fit_where_the_overlay_puts_them(overlay, model, devices):
    (_, container), = servers(overlay)
    ranks = int(container["resources"]["limits"]["nvidia.com/gpu"])
    for document in of_kind(overlay, "LeaderWorkerSet"):
        ranks *= document["spec"]["leaderWorkerTemplate"]["size"]
        assert environment(overlay, container)["RANKS_PER_HOST"] == container["resources"]["limits"]["nvidia.com/gpu"]
    assert ranks == devices
    assert environment(overlay, container)["DEJAVUD_MODEL"].endswith("/" + model)
    result = dejavud("--plan=json", "--model", model, "--weights", environment(overlay, container)["DEJAVUD_WEIGHTS"],
                     "--plan-devices", devices, "--plan-device", "a100-80")
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_group_drains_on_sigterm(api, tmp_path):
    """launch.sh, for a group of one pod with two ranks: the stream that runs ends as it should, and so does mpirun."""
    port_file, log_path = tmp_path / "port", tmp_path / "log"
    log = open(log_path, "wb")
    group = subprocess.Popen(
        ["sh", KUBERNETES / "overlays/multi-host/launch.sh", "--listen", "127.0.0.1:0", "--port-file", port_file],
        env={**os.environ, **MPI_ENVIRONMENT, "PATH": f"{BIN}:{os.environ['PATH']}", "TMPDIR": str(tmp_path),
             "LWS_LEADER_ADDRESS": "localhost", "LWS_GROUP_SIZE": "1", "RANKS_PER_HOST": "2",
             "DEJAVUD_MODEL": str(MODEL), "DEJAVUD_THREADS": "1", "DEJAVUD_METRICS_LISTEN": ""},
        stderr=log, stdout=log, start_new_session=True)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not port_file.exists():
            assert group.poll() is None and time.monotonic() < deadline, log_path.read_text()
            time.sleep(0.01)
        with grpc.insecure_channel(f"127.0.0.1:{int(port_file.read_text())}") as channel:
            for reply in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S):
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    break
            request = api.pb.GenerateRequest()
            request.token_ids.ids.extend([2, 5, 7])
            request.stopping.max_new_tokens, request.stopping.ignore_eos = 300, True
            chunks = api.rpc.GenerationServiceStub(channel).GenerateStream(request, timeout=PATIENCE_S)
            next(chunks)
            group.terminate()
            *_, last = chunks
            assert last.finish.generated_tokens == 300
        assert group.wait(timeout=PATIENCE_S) == 0, log_path.read_text()
        assert "serving" in log_path.read_text() and "on 2 processes" in log_path.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group.pid, signal.SIGKILL)
