"""What deploy/kubernetes renders to, for the tests. kubectl.py says where the kubectl comes from."""
import functools
import json
import os
import subprocess

import pytest
import yaml

import kubectl
from conftest import BIN, PATIENCE_S, ROOT

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
FETCH = DEPLOY / "fetch-model.sh"
OVERLAYS = ["cpu", "edge", "gateway", "gpu", "inference-pool", "monitoring", "multi-host", "tls", "tp-8"]
SCHEMAS = {path.stem: json.loads(path.read_text()) for path in (KUBERNETES / "schemas").iterdir()}

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
        elif "fieldRef" in source:
            assert source["fieldRef"]["fieldPath"] == "metadata.namespace"
            variables[entry["name"]] = "default"
        elif "secretKeyRef" in source:
            variables[entry["name"]] = f"the key {source['secretKeyRef']['key']} of {source['secretKeyRef']['name']}"
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
