"""What deploy/kubernetes renders to, against Kubernetes' schemas, each other, the Dockerfile and the rules."""
import re
import subprocess

import jsonschema
import kubernetes_validate
import pytest
import yaml

import kubectl
from conftest import PATIENCE_S, ROOT
from manifests import (DEPLOY, KUBERNETES, OVERLAYS, SCHEMAS, containers, environment, of_kind, overlays, pods, rendered, servers,
                       settings, templates)

VERSION = re.search(r"project\(dejavud VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text())[1]
# Secrets are the cluster owner's; docs/operations says what must be in them.
SECRETS = {"dejavud-gateway-key", "dejavud-gateway-tls", "dejavud-tls", "dejavud-tokens", "dejavud-ssh"}
GATEWAY = "Deployment/dejavud-gateway/template"


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
        assert spec["automountServiceAccountToken"] is (name == GATEWAY), name
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
            secrets = [entry["valueFrom"]["secretKeyRef"]["name"] for entry in container.get("env", []) if "secretKeyRef" in entry.get("valueFrom", {})]
            assert set(secrets) <= SECRETS, name
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
    ports = {port["name"] for _, pod in pods(overlay) for container in pod["spec"]["containers"] for port in container.get("ports", [])}
    for document in of_kind(overlay, "NetworkPolicy"):
        for rule in document["spec"].get("ingress", []):
            assert {port["port"] for port in rule.get("ports", [])} <= ports
    assert {port["targetPort"] for document in of_kind(overlay, "Service") for port in document["spec"]["ports"]} <= ports


@overlays
def test_pods_can_reach_their_volume(overlay):
    """A volume of one node keeps all pods that mount it there."""
    claim, = of_kind(overlay, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce" if overlay in ("cpu", "edge", "gateway", "inference-pool", "monitoring", "tls") else "ReadWriteMany"]
    mounting = [(name, pod) for name, pod in pods(overlay) if any("persistentVolumeClaim" in volume for volume in pod["spec"]["volumes"])]
    assert len(mounting) >= 2
    for name, pod in mounting:
        if claim["spec"]["accessModes"] == ["ReadWriteOnce"]:
            rule, = pod["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
            assert rule["topologyKey"] == "kubernetes.io/hostname"
            assert all(rule["labelSelector"]["matchLabels"].items() <= other["metadata"]["labels"].items()
                       for _, other in mounting), name
        else:
            assert "affinity" not in pod["spec"], name


def test_strangers_reach_the_proxy_and_nothing_else():
    policy, = (document for document in of_kind("edge", "NetworkPolicy") if document["metadata"]["name"] == "dejavud")
    anybody, prometheus = policy["spec"]["ingress"]
    assert "from" not in anybody and [port["port"] for port in anybody["ports"]] == ["grpc"]
    assert prometheus["from"] and {port["port"] for port in prometheus["ports"]} == {"metrics", "edge-metrics"}
    (pod, daemon), = servers("edge")
    proxy, = (container for container in pod["spec"]["containers"] if container["name"] == "proxy")
    owner = {port["name"]: container["name"] for container in (daemon, proxy) for port in container["ports"]}
    assert owner == {"grpc": "proxy", "edge-health": "proxy", "edge-metrics": "proxy", "health": "dejavud", "metrics": "dejavud"}
    outside, = (document for document in of_kind("edge", "Service") if document["metadata"]["name"] == "dejavud-edge")
    assert outside["spec"]["type"] == "LoadBalancer" and outside["spec"]["externalTrafficPolicy"] == "Local"
    assert [port["targetPort"] for port in outside["spec"]["ports"]] == ["grpc"]


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


def test_the_inference_pool_has_the_servers_and_their_ports():
    (pool,) = of_kind("inference-pool", "InferencePool")
    assert pool["spec"]["appProtocol"] == "kubernetes.io/h2c"
    labels = pool["spec"]["selector"]["matchLabels"]
    found = servers("inference-pool")
    assert found
    for pod, container in found:
        assert labels.items() <= pod["metadata"]["labels"].items()
        assert {port["number"] for port in pool["spec"]["targetPorts"]} <= {port["containerPort"] for port in container["ports"]}
    (policy,) = [each for each in of_kind("inference-pool", "NetworkPolicy") if each["metadata"]["name"] == "dejavud-gateway"]
    assert {port["port"] for port in policy["spec"]["ingress"][0]["ports"]} == {"grpc", "metrics"}


def test_the_gateway_finds_the_servers_and_no_more():
    (pod, daemon), = servers("gateway")
    gateway, = (each for name, each in pods("gateway") if name == GATEWAY)
    container, = gateway["spec"]["containers"]
    arguments = container["args"]
    selected = dict(each.split("=") for each in arguments[arguments.index("--selector") + 1:] if not each.startswith("--"))
    assert [selected.items() <= each["metadata"]["labels"].items() for _, each in pods("gateway")].count(True) == 1
    assert selected.items() <= pod["metadata"]["labels"].items()
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    grpc_port, = (port["containerPort"] for port in daemon["ports"] if port["name"] == "grpc")
    assert {f"--service-discovery-port={grpc_port}", f"--port={ports['https']}", f"--health-check-port={ports['gw-health']}",
            f"--prometheus-port={ports['gw-metrics']}"} < set(arguments)
    assert {container[probe]["httpGet"]["port"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")} == {"gw-health"}
    # The daemon lets it in, it may go there, and the API shows it pods alone.
    policies = {document["metadata"]["name"]: document["spec"] for document in of_kind("gateway", "NetworkPolicy")}
    client = policies["dejavud"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"]
    assert client.items() <= gateway["metadata"]["labels"].items()
    out = policies["dejavud-gateway"]["egress"]
    assert out[0]["to"][0]["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert [port["port"] for port in out[0]["ports"]] == [grpc_port]
    role, = of_kind("gateway", "Role")
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]
    binding, = of_kind("gateway", "RoleBinding")
    assert (binding["roleRef"]["name"], binding["subjects"][0]["name"]) == (role["metadata"]["name"], gateway["spec"]["serviceAccountName"])


def test_the_gateway_outlives_a_daemon_that_drains(tmp_path):
    """It asks for health while a daemon that drains still takes requests, and waits as long as requests may run."""
    (pod, daemon), = servers("gateway")
    drain = settings("gateway", daemon, tmp_path)["drain"]
    gateway, = (each for name, each in pods("gateway") if name == GATEWAY)
    container, = gateway["spec"]["containers"]
    value = lambda flag: int(next(each for each in container["args"] if each.startswith(flag + "=")).split("=")[1])
    assert value("--health-check-interval-secs") * value("--health-failure-threshold") < drain["linger_ms"] / 1000
    grace = value("--shutdown-grace-period-secs")
    assert grace >= drain["timeout_s"]
    assert gateway["spec"]["terminationGracePeriodSeconds"] >= container["lifecycle"]["preStop"]["sleep"]["seconds"] + grace + 10


def test_the_gateways_versions_are_the_tested_ones():
    tested = (ROOT / "tests/python/protocols-requirements.txt").read_text().splitlines()
    wanted = [line for line in (DEPLOY / "gateway/requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert set(wanted) <= set(tested)
    smg, = (line for line in wanted if line.startswith("smg=="))
    assert f"pip install {smg}`" in (ROOT / "docs/operations/gateway.md").read_text()
