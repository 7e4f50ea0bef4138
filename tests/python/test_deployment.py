"""What deploy/kubernetes renders to, deploy/Dockerfile and deploy/fetch-model.sh, against Kubernetes' schemas, each other and the
daemon. kubectl.py says where the kubectl comes from.
"""
import contextlib
import functools
import hashlib
import http.server
import json
import os
import pathlib
import re
import signal
import subprocess
import threading
import time

import grpc
import jsonschema
import kubernetes_validate
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

import kubectl
from conftest import BIN, MODEL, MPI_ENVIRONMENT, PATIENCE_S, ROOT

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = ["cpu", "gpu", "monitoring", "multi-host", "tls", "tp-8"]
SCHEMAS = {path.stem: json.loads(path.read_text()) for path in (KUBERNETES / "schemas").iterdir()}
VERSION = re.search(r"project\(dejavud VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text())[1]
# Secrets are the cluster owner's; what must be in them is in operations.md.
SECRETS = {"dejavud-tls", "dejavud-tokens", "dejavud-ssh"}

overlays = pytest.mark.parametrize("overlay", OVERLAYS)


def render(folder):
    result = subprocess.run([kubectl.find(), "kustomize", folder], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return list(yaml.safe_load_all(result.stdout))


@functools.cache
def rendered(overlay):
    return render(KUBERNETES / "overlays" / overlay)


def of_kind(overlay, kind):
    return [document for document in rendered(overlay) if document["kind"] == kind]


def templates(document):
    """The pod templates in it, by name."""
    spec = document.get("spec", {})
    if document["kind"] == "LeaderWorkerSet":
        return {part: spec["leaderWorkerTemplate"][part] for part in ("leaderTemplate", "workerTemplate")}
    return {"template": spec["template"]} if "template" in spec else {}


def pods(overlay):
    return [(f"{document['kind']}/{document['metadata']['name']}/{name}", template)
            for document in rendered(overlay) for name, template in templates(document).items()]


def containers(pod):
    return pod["spec"].get("initContainers", []) + pod["spec"]["containers"]


def servers(overlay):
    """The containers in which dejavud runs and serves, with their pods."""
    return [(pod, container) for _, pod in pods(overlay) for container in pod["spec"]["containers"]
            if container["name"] == "dejavud"]


def config_map(overlay, name):
    found, = (document for document in of_kind(overlay, "ConfigMap") if document["metadata"]["name"] == name)
    return found["data"]


def environment(overlay, container):
    """Of the container, as the kubelet would make it."""
    variables = {}
    for source in container.get("envFrom", []):
        variables |= config_map(overlay, source["configMapRef"]["name"])
    for entry in container.get("env", []):
        source = entry.get("valueFrom", {})
        if "configMapKeyRef" in source:
            variables[entry["name"]] = config_map(overlay, source["configMapKeyRef"]["name"])[source["configMapKeyRef"]["key"]]
        elif "resourceFieldRef" in source:
            assert source["resourceFieldRef"]["resource"] == "limits.cpu"
            variables[entry["name"]] = container["resources"]["limits"]["cpu"]
        else:
            variables[entry["name"]] = entry["value"]
    return variables


def dejavud(*arguments, **variables):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DEJAVUD_")}
    return subprocess.run([BIN / "dejavud", *map(str, arguments)], env={**clean, **variables}, capture_output=True, text=True,
                          timeout=PATIENCE_S)


def settings(overlay, container, folder):
    """The daemon's configuration in that container, as the daemon itself reads it."""
    pod = next(pod for pod, each in servers(overlay) if each is container)
    volume, = (volume for volume in pod["spec"]["volumes"] if volume["name"] == "config")
    file = folder / "dejavud.yaml"
    file.write_text(config_map(overlay, volume["configMap"]["name"])["dejavud.yaml"])
    assert container["args"] == ["--config", "/etc/dejavud/dejavud.yaml"]
    variables = {name: value for name, value in environment(overlay, container).items() if name.startswith("DEJAVUD_")}
    result = dejavud("--config", file, "--print-config", **variables)
    assert result.returncode == 0, result.stderr
    result_check = dejavud("--config", file, "--check-config", **variables)
    assert result_check.returncode == 0, result_check.stderr
    return yaml.safe_load(result.stdout)


def test_without_a_kubectl_the_message_says_what_to_do(monkeypatch, tmp_path):
    old = tmp_path / "kubectl"
    old.write_text("""#!/bin/sh\necho '{"clientVersion": {"major": "1", "minor": "20"}}'\n""")
    old.chmod(0o755)
    monkeypatch.setenv("KUBECTL", "")
    monkeypatch.setattr(kubectl, "FETCHED", tmp_path / "none")
    monkeypatch.setattr(kubectl.shutil, "which", lambda name: str(old))
    with pytest.raises(RuntimeError, match=r"1\.27 or later.*setup test.*found: .*kubectl \(1\.20\)"):
        kubectl.find()


def test_these_are_all_overlays():
    assert sorted(path.name for path in (KUBERNETES / "overlays").iterdir()) == OVERLAYS


@overlays
def test_every_document_is_what_kubernetes_takes(overlay):
    kinds = set()
    for document in rendered(overlay):
        kinds.add(document["kind"])
        if document["kind"] in SCHEMAS:
            jsonschema.validate(document, SCHEMAS[document["kind"]])
            checked = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **template["metadata"]},
                        "spec": template["spec"]} for template in templates(document).values()]
        else:
            checked = [document]
        for each in checked:
            for version in ("1.30", "1.37"):
                kubernetes_validate.validate(each, version, strict=True)
    assert {"ConfigMap", "Job", "NetworkPolicy", "PersistentVolumeClaim", "PodDisruptionBudget", "Service",
            "ServiceAccount"} < kinds
    assert ("LeaderWorkerSet" in kinds) != ("Deployment" in kinds)
    assert ({"PodMonitor", "PrometheusRule", "HorizontalPodAutoscaler"} <= kinds) == (overlay == "monitoring")


@overlays
def test_pods_are_restricted(overlay):
    for name, pod in pods(overlay):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        # Or a Service's variables would be taken for settings, DEJAVUD_PORT first.
        assert spec["enableServiceLinks"] is False, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True and context["runAsUser"] >= 10000 and context["fsGroup"], name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in containers(pod):
            assert container["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                                                    "capabilities": {"drop": ["ALL"]}}, name
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys() & container["resources"]["requests"].keys()
        assert all(set(volume) - {"name"} <= {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
                   for volume in spec["volumes"]), name


@overlays
def test_images_are_ours_and_of_this_version(overlay):
    targets = set(re.findall(r"^FROM \S+ AS (\S+)", (DEPLOY / "Dockerfile").read_text(), re.M))
    for name, pod in pods(overlay):
        for container in containers(pod):
            image = re.fullmatch(r"localhost/dejavud-([a-z-]+):([0-9.]+)", container["image"])
            assert image is not None and image[1] in targets and image[2] == VERSION, (name, container["image"])


@overlays
def test_references_lead_somewhere(overlay):
    maps = {document["metadata"]["name"]: document["data"] for document in of_kind(overlay, "ConfigMap")}
    accounts = {document["metadata"]["name"] for document in of_kind(overlay, "ServiceAccount")}
    claims = {document["metadata"]["name"] for document in of_kind(overlay, "PersistentVolumeClaim")}
    used = set()
    for name, pod in pods(overlay):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert pod["spec"]["serviceAccountName"] in accounts, name
        for volume in volumes.values():
            if "configMap" in volume:
                used.add(volume["configMap"]["name"])
                assert {item["key"] for item in volume["configMap"].get("items", [])} <= maps[volume["configMap"]["name"]].keys()
            elif "secret" in volume:
                assert volume["secret"]["secretName"] in SECRETS
            elif "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
        mounted = {mount["name"] for container in containers(pod) for mount in container["volumeMounts"]}
        assert mounted == volumes.keys(), name
        for container in containers(pod):
            environment(overlay, container)  # fails on a key that is not there
            used |= {source["configMapRef"]["name"] for source in container.get("envFrom", [])}
    assert used == maps.keys()

    labels = [pod["metadata"]["labels"] for _, pod in pods(overlay)]
    selectors = [document["spec"]["selector"] for document in of_kind(overlay, "Service")]
    selectors += [document["spec"]["selector"]["matchLabels"]
                  for kind in ("PodDisruptionBudget", "PodMonitor", "Deployment") for document in of_kind(overlay, kind)]
    selectors += [document["spec"]["podSelector"]["matchLabels"] for document in of_kind(overlay, "NetworkPolicy")
                  if "matchLabels" in document["spec"]["podSelector"]]
    for selector in selectors:
        assert sum(selector.items() <= each.items() for each in labels) == 1, selector
    ports = {port["name"] for _, container in servers(overlay) for port in container["ports"]}
    for document in of_kind(overlay, "NetworkPolicy"):
        for rule in document["spec"].get("ingress", []):
            assert {port["port"] for port in rule.get("ports", [])} <= ports
    assert {port["targetPort"] for document in of_kind(overlay, "Service") for port in document["spec"]["ports"]} <= ports


@overlays
def test_pods_can_reach_their_volume(overlay):
    """A volume of one node keeps all pods that mount it there."""
    claim, = of_kind(overlay, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce" if overlay in ("cpu", "monitoring", "tls") else "ReadWriteMany"]
    for name, pod in pods(overlay):
        if claim["spec"]["accessModes"] == ["ReadWriteOnce"]:
            rule, = pod["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
            assert rule["topologyKey"] == "kubernetes.io/hostname"
            assert all(rule["labelSelector"]["matchLabels"].items() <= other["metadata"]["labels"].items()
                       for _, other in pods(overlay)), name
        else:
            assert "affinity" not in pod["spec"], name


@overlays
def test_the_daemon_takes_the_settings_and_listens_on_the_ports(overlay, tmp_path):
    for _, container in servers(overlay):
        config = settings(overlay, container, tmp_path)
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for name, address in (("grpc", config["listen"]), ("health", config["health"]["listen"]),
                              ("metrics", config["metrics"]["listen"])):
            assert address == f"0.0.0.0:{ports[name]}"
        assert config["admin"]["listen"].startswith("127.0.0.1:")
        assert config["log"]["termination_file"] == container["terminationMessagePath"] == "/dev/termination-log"
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert str(pathlib.PurePath(config["model"]).parent) in mounts
        files = [*(config["tls"][key] for key in ("cert", "key", "client_ca")), config["auth"]["tokens_file"]]
        if overlay == "tls":
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


def test_what_is_monitored_exists():
    metrics = set(re.findall(r"^\| `(dejavu_\w+)` \| gauge", (ROOT / "docs/operations/metrics.md").read_text(), re.M))
    scaler, = of_kind("monitoring", "HorizontalPodAutoscaler")
    assert {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]} <= metrics
    deployment, = of_kind("monitoring", "Deployment")
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"] and "replicas" not in deployment["spec"]
    monitor, = of_kind("monitoring", "PodMonitor")
    (_, container), = servers("monitoring")
    ports = {port["name"] for port in container["ports"]}
    assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports


def test_the_rules_are_those_of_the_repository(tmp_path):
    rule, = of_kind("monitoring", "PrometheusRule")
    expected = []
    for name in ("recording", "alerts"):
        for group in yaml.safe_load((DEPLOY / f"monitoring/rules/{name}.yaml").read_text())["groups"]:
            expected.append({**group, "name": group["name"].replace("dejavu-", f"dejavu-{name}-", 1)})
    assert rule["spec"]["groups"] == expected, "run deploy/kubernetes/components/monitoring/make_prometheus_rule.py"
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rule["spec"]))
    subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yaml"], check=True, timeout=PATIENCE_S)


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


# --- fetch-model

FETCH = DEPLOY / "fetch-model.sh"


def test_the_demo_model_is_what_the_manifests_say():
    listed = dict(reversed(line.split("  ")) for line in (KUBERNETES / "base/SHA256SUMS").read_text().splitlines())
    assert listed == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in MODEL.iterdir()}


class Files(http.server.BaseHTTPRequestHandler):
    """Serves `content` (name to bytes), ranges too, and notes what was asked for."""
    content = {}
    ranges = True
    asked = []

    def do_GET(self):
        Files.asked.append((self.path, self.headers.get("Range")))
        data = Files.content.get(self.path.rsplit("/", 1)[1])
        if data is None:
            self.send_error(404)
            return
        first = 0
        if Files.ranges and "Range" in self.headers:
            first = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
            if first >= len(data):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        self.wfile.write(data[first:])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def source(tmp_path):
    """(URL, SHA256SUMS, run): a server of two files, and the script run against it."""
    Files.content = {"config.json": b"{}\n", "model.safetensors": bytes(range(256)) * 512}
    Files.ranges, Files.asked = True, []
    sums = tmp_path / "sums"
    lines = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in Files.content.items()]
    sums.write_text("# two files\n" + "".join(lines))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/models/tiny"

    def run(folder, list_of_files=sums, from_url=url):
        return subprocess.run(["sh", FETCH, from_url, list_of_files, folder], capture_output=True, text=True, timeout=PATIENCE_S)

    yield sums, run
    server.shutdown()
    thread.join()
    server.server_close()


def complete(folder, sums):
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {**Files.content, "SHA256SUMS": sums.read_bytes()}
    assert not folder.with_name(folder.name + ".partial").exists()


def test_fetches_once(source, tmp_path):
    sums, run = source
    folder = tmp_path / "model"
    assert run(folder).returncode == 0
    complete(folder, sums)
    asked = len(Files.asked)
    again = run(folder)
    assert (again.returncode, len(Files.asked)) == (0, asked) and "complete" in again.stderr
    other = tmp_path / "other"
    other.write_text(sums.read_text().replace("# two", "# 2"))
    refused = run(folder, list_of_files=other)
    assert refused.returncode == 1 and "holds something else" in refused.stderr


def test_what_is_corrupt_is_not_kept(source, tmp_path):
    sums, run = source
    right, folder = Files.content["model.safetensors"], tmp_path / "model"
    Files.content["model.safetensors"] = right[:-1] + b"x"
    refused = run(folder)
    assert refused.returncode == 1 and "model.safetensors is not what" in refused.stderr
    assert not folder.exists() and not (tmp_path / "model.partial/model.safetensors").exists()
    Files.content["model.safetensors"] = right
    assert run(folder).returncode == 0
    complete(folder, sums)
    # The file that was right the first time is not fetched again.
    assert [path for path, _ in Files.asked].count("/models/tiny/config.json") == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_goes_on_where_it_stopped(source, tmp_path, ranges):
    sums, run = source
    Files.ranges = ranges
    partial = tmp_path / "model.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(Files.content["model.safetensors"][:1000])
    (partial / "of-an-earlier-list").write_text("x")
    assert run(tmp_path / "model").returncode == 0
    complete(tmp_path / "model", sums)
    asked = [at for path, at in Files.asked if path.endswith("model.safetensors")]
    assert asked == (["bytes=1000-"] if ranges else ["bytes=1000-", None])


def test_a_part_that_is_wrong_is_fetched_anew(source, tmp_path):
    """As long as the file and not the file: there is nothing to go on with."""
    sums, run = source
    partial = tmp_path / "model.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(bytes(len(Files.content["model.safetensors"])))
    assert run(tmp_path / "model").returncode == 0
    complete(tmp_path / "model", sums)


@pytest.mark.parametrize("line,message", [
    ("", "names no file"), ("abc  model.safetensors", "not a line"), ("0" * 64 + "  ../model.safetensors", "not a line"),
    ("0" * 64 + "  .hidden", "not a line"), ("0" * 64 + "  missing", "could not be fetched"),
    ("0" * 64 + "  SHA256SUMS", "names itself")])
def test_lists_that_cannot_be_followed(source, tmp_path, line, message):
    _, run = source
    wrong = tmp_path / "wrong"
    wrong.write_text(f"# a list\n{line}\n")
    refused = run(tmp_path / "model", list_of_files=wrong)
    assert refused.returncode == 1 and message in refused.stderr
    assert not (tmp_path / "model").exists() and not (tmp_path / "hidden").exists()
    usage = subprocess.run(["sh", FETCH, "x"], capture_output=True, timeout=PATIENCE_S)
    assert usage.returncode == 2


def test_takes_the_demo_model_from_a_folder(source, tmp_path):
    """As the Job of the cpu overlay does."""
    _, run = source
    assert run(tmp_path / "model", list_of_files=KUBERNETES / "base/SHA256SUMS", from_url=f"file://{MODEL}").returncode == 0
    assert {path.name for path in MODEL.iterdir()} | {"SHA256SUMS"} == {path.name for path in (tmp_path / "model").iterdir()}


# --- the Dockerfile

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def stages():
    """Name of each stage to its instructions, as (word, rest), continued lines joined."""
    result = {}
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M).replace("\\\n", " ")
    for word, rest in re.findall(r"^([A-Z]+) +(.*)$", text, re.M):
        if word == "FROM":
            base, _, name = rest.split()
            result[name] = [("FROM", base)]
        elif result:
            result[name].append((word, rest))
    return result


def chain(name):
    """The stage's instructions after those of the stages that it stands on."""
    instructions = stages()[name]
    base = re.sub(r"\$\{MULTI_HOST_ON\}", "cuda", instructions[0][1])
    return (chain(base) if base in stages() else []) + instructions


@pytest.mark.parametrize("target", ["cpu", "cuda", "multi-host", "fetch"])
def test_images_run_without_root(target):
    users = [rest for word, rest in chain(target) if word == "USER"]
    assert users[-1] == "65532:65532"
    assert f"--uid {users[-1].split(':')[0]} " in DOCKERFILE
    assert [word for word, _ in chain(target)].count("ENTRYPOINT") == 1
    assert chain(target)[0] == ("FROM", "${BASE}")


def test_the_last_stage_is_the_default():
    assert list(stages())[-1] == "cpu"


def test_what_is_copied_exists_and_is_in_the_context():
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    kept = [line[1:] for line in ignore if line.startswith("!")]
    assert "*" in ignore and all((ROOT / path).exists() for path in kept)
    copied = set()
    for instructions in stages().values():
        for word, rest in instructions:
            if word != "COPY":
                continue
            *sources, _ = rest.split()
            if sources[0].startswith("--from="):
                assert sources[0].removeprefix("--from=") in stages(), rest
                continue
            for path in sources:
                assert any(pathlib.PurePath(path).is_relative_to(each) for each in kept), path
            copied |= set(sources)
    # What the build reads is there.
    cmake = (ROOT / "CMakeLists.txt").read_text()
    read = re.findall(r"^  ([a-z][\w/.]+\.cc)$", cmake, re.M) + re.findall(r"\$\{CMAKE_SOURCE_DIR\}/([\w./-]+)", cmake)
    read += re.findall(r"(?:file\(READ|configure_file\() *([a-z][\w./-]+)", cmake)
    assert {"server", "proto", "deploy"} <= {path.split("/")[0] for path in read}
    for path in read:
        assert any(pathlib.PurePath(path).is_relative_to(each) for each in copied), path


def test_the_runtime_packages_are_those_that_the_programs_load():
    """Of this build's programs: no library is missing in the image and none is there for nothing."""
    run_line, = (rest for word, rest in stages()["runtime"] if word == "RUN")
    listed = set(re.search(r"--no-install-recommends\s+(.*?)&&", run_line)[1].split())
    files = set()
    others = ("libc.", "libm.", "libgcc_s.", "ld-")  # every image has these
    for program in ("dejavud", "dejavu-cli"):
        # The direct ones; what these load is their packages' affair.
        headers = subprocess.run(["objdump", "-p", BIN / program], capture_output=True, text=True, check=True).stdout
        loaded = subprocess.run(["ldd", BIN / program], capture_output=True, text=True, check=True).stdout
        files |= {os.path.realpath(re.search(rf"{re.escape(name)} => (/\S+)", loaded)[1])
                  for name in re.findall(r"NEEDED +(\S+)", headers) if not name.startswith(others)}
    # By their ends: Debian's packages know some as /lib/..., which is /usr/lib/... on a machine.
    loaded = {"/".join(path.split("/")[-2:]) for path in files}
    for package in sorted(listed):
        content = subprocess.run(["dpkg-query", "-L", package], capture_output=True, text=True, check=True, timeout=PATIENCE_S)
        held = {"/".join(path.split("/")[-2:]) for path in content.stdout.splitlines()}
        assert held & loaded, f"{package} is there for nothing"
        loaded -= held
    assert not loaded, "no package is there for these"


def test_the_image_holds_only_what_runs():
    assert [rest for word, rest in stages()["runtime"] if word == "COPY"] == [
        "--from=build /src/build/demo/bin/dejavud /src/build/demo/bin/dejavu-cli /usr/local/bin/",
        "--from=model /models /usr/share/dejavu/models"]
    for target in ("cuda", "multi-host"):
        module, = (rest for word, rest in stages()[target] if word == "COPY" and "--from=build" in rest)
        assert module.endswith(".so /usr/local/lib/dejavu/"), "where dejavud looks for modules"


# --- operations.md

OPERATIONS = (ROOT / "docs/operations/deploy.md").read_text()


def table(heading):
    """The first column of the table whose header begins so."""
    lines = OPERATIONS[OPERATIONS.index(f"| {heading} |"):].split("\n\n")[0].splitlines()[2:]
    return [line.split("|")[1].strip(" `") for line in lines]


def test_operations_lists_every_exit_code():
    main = (ROOT / "server/daemon/main.cc").read_text()
    codes = {int(code) for code in re.findall(r"k\w+ = (\d+)", re.search(r"enum ExitCode \{(.*?)\}", main)[1])}
    usage = dejavud("--no-such-flag").returncode
    killed = 128 + 9
    assert {int(code) for code in table("dejavud")} == codes | {usage, killed}
    readme = (ROOT / "README.md").read_text()
    readme_table = readme[readme.index("| Exit code |"):].split("\n\n")[0]
    assert set(table("dejavud")) - {str(killed)} == set(re.findall(r"^\| (\d) \|", readme_table, re.M))
    assert table("fetch-model") == re.findall(r"(\d) [A-Za-z]", re.search(r"# Exit codes: (.*)", FETCH.read_text())[1])


def test_operations_lists_every_refusal():
    sources = [path.read_text() for path in [*(ROOT / "server").rglob("*.cc"), ROOT / "engine/scheduling/admission.cc"]]
    words = {word for text in sources for word in re.findall(r'"([A-Z][A-Z_]{4,})"', text)}
    codes = {code.name for code in grpc.StatusCode}
    assert set(table("Reason")) == words - codes - {"FEATURE", "SERVER_STATE_"}
    messages = {message for text in sources for message in re.findall(r'UnavailableRetry\(\s*"([^"]+)"', text)}
    assert set(table("Message")) == messages


def test_operations_can_be_followed(tmp_path):
    """All blocks marked `local`, in one shell, in their order."""
    steps = re.findall(r"^( *)```sh local\n(.*?)^ *```$", OPERATIONS, re.M | re.S)
    assert len(steps) >= 8
    script = "set -eu\ntrap 'kill -9 $(jobs -p) 2>/dev/null || :' EXIT\n" + "".join(
        "".join(line.removeprefix(indent) for line in block.splitlines(keepends=True)) for indent, block in steps)
    programs, work = tmp_path / "bin", tmp_path / "work"
    programs.mkdir()
    work.mkdir()
    (programs / "kubectl").symlink_to(kubectl.find())
    environment = {**os.environ, "PATH": f"{programs}:{BIN}:{os.environ['PATH']}", "WORK": str(work)}
    result = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True,
                            timeout=3 * PATIENCE_S)
    log = work / "log"
    assert result.returncode == 0, result.stdout + result.stderr + (log.read_text() if log.exists() else "")
    assert "the token is not known here" in result.stderr
    # Commands for a cluster name folders that exist.
    for path in re.findall(r"-k (deploy/\S+)", OPERATIONS):
        assert (ROOT / path / "kustomization.yaml").exists(), path


def lay_out(folder, *replacements):
    """The overlay that operations.md shows, rendered in `folder` from these manifests."""
    text, = re.findall(r"```yaml\n( *apiVersion: kustomize.*?)^ *```$", OPERATIONS, re.M | re.S)
    text = "".join(line[3:] for line in text.splitlines(keepends=True)).replace("sha256:...", "sha256:" + "0" * 64)
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    here = os.path.relpath(KUBERNETES, folder)
    text = re.sub(r"github\.com/YOU/dejavud/deploy/kubernetes(/[a-z/-]+)\?ref=v0\.1\.0", rf"{here}\1", text)
    (folder / "kustomization.yaml").write_text(text)
    (folder / "SHA256SUMS").write_text("0" * 64 + "  model.safetensors\n")
    documents = render(folder)
    for document in documents:
        if document["kind"] in SCHEMAS:
            jsonschema.validate(document, SCHEMAS[document["kind"]])
        else:
            kubernetes_validate.validate(document, "1.37", strict=True)
    data = {name: value for document in documents if document["kind"] == "ConfigMap" for name, value in document["data"].items()}
    assert data["DEJAVUD_MODEL"] == "/models/opt-30b" and data["SHA256SUMS"].endswith("model.safetensors\n")
    settings = {name: value for name, value in data.items() if name.startswith("DEJAVUD_")}
    (folder / "dejavud.yaml").write_text(data["dejavud.yaml"])
    checked = dejavud("--config", folder / "dejavud.yaml", "--check-config", **settings)
    assert checked.returncode == 0, checked.stderr
    return {document["kind"]: document for document in documents}, settings


TLS = ("components:\n", "components:\n  - github.com/YOU/dejavud/deploy/kubernetes/components/tls?ref=v0.1.0\n")


def test_an_overlay_of_your_own_is_as_operations_writes_it(tmp_path):
    """gpu with monitoring and autoscaler, and with tls laid over that."""
    by_kind, settings = lay_out(tmp_path, TLS)
    assert {"HorizontalPodAutoscaler", "PodMonitor", "PrometheusRule"} < by_kind.keys()
    container, = by_kind["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "REGISTRY/dejavud-cuda@sha256:" + "0" * 64
    assert {"tls", "tokens"} < {mount["name"] for mount in container["volumeMounts"]}
    assert settings["DEJAVUD_SCHEDULER_MAX_BATCH"] == "32" and {"DEJAVUD_DEVICE", "DEJAVUD_TLS_CERT"} < settings.keys()


def test_groups_of_hosts_can_be_monitored_and_secured_too(tmp_path):
    autoscaler = "  - github.com/YOU/dejavud/deploy/kubernetes/components/autoscaler?ref=v0.1.0\n"
    by_kind, settings = lay_out(tmp_path, TLS, ("overlays/gpu", "overlays/multi-host"), (autoscaler, ""))
    assert "PodMonitor" in by_kind and "DEJAVUD_TLS_CERT" in settings
    leader = templates(by_kind["LeaderWorkerSet"])["leaderTemplate"]["spec"]
    container, = leader["containers"]
    assert container["name"] == "dejavud"
    assert {"tls", "tokens"} < {mount["name"] for mount in container["volumeMounts"]}
    assert {"dejavud-tls", "dejavud-tokens"} < {volume.get("secret", {}).get("secretName") for volume in leader["volumes"]}
