"""What docs/operations says of exit codes, refusals and overlays, against the sources and the manifests."""
import os
import re

import grpc
import jsonschema
import kubernetes_validate

from conftest import ROOT
from documents import page, pages
from manifests import FETCH, KUBERNETES, SCHEMAS, dejavud, render, templates

RESTARTS = page("docs/operations/restarts.md")
DEPLOY_PAGE = page("docs/operations/deploy.md")


def table(heading):
    """The first column of the table whose header begins so."""
    column, = RESTARTS.tables(heading)
    return column


def exit_codes(folder):
    """Those of the enumeration in this folder's sources."""
    text = "".join(path.read_text() for path in sorted((ROOT / folder).glob("*.h")) + sorted((ROOT / folder).glob("*.cc")))
    body, = re.findall(r"enum ExitCode \{(.*?)\}", text, re.S)
    return {int(code) for code in re.findall(r"k\w+ = (\d+)", body)}


def test_operations_lists_every_exit_code():
    codes = exit_codes("server/daemon")
    usage = dejavud("--no-such-flag").returncode
    killed = 128 + 9
    assert {int(code) for code in table("dejavud")} == codes | {usage, killed}
    assert table("fetch-model") == re.findall(r"(\d) [A-Za-z]", re.search(r"# Exit codes: (.*)", FETCH.read_text())[1])
    # What other pages say of the programs is the same.
    listed = {frozenset(map(int, column)) for page in pages() for column in page.tables("Exit code")}
    client = frozenset(exit_codes("loadtest/cli"))
    assert client in listed and listed <= {client, frozenset(codes | {usage})}


def test_operations_lists_every_refusal():
    sources = [path.read_text() for path in [*(ROOT / "server").rglob("*.cc"), ROOT / "engine/refusal.cc"]]
    words = {word for text in sources for word in re.findall(r'"([A-Z][A-Z_]{4,})"', text)}
    codes = {code.name for code in grpc.StatusCode}
    assert set(table("Reason")) == words - codes - {"FEATURE", "SERVER_STATE_"} - {"READY", "BYTES"}  # KServe's words
    messages = {message for text in sources for message in re.findall(r'UnavailableRetry\(\s*"([^"]+)"', text)}
    assert set(table("Message")) == messages


def lay_out(folder, *replacements):
    """The overlay that deploy.md shows, rendered in `folder` from these manifests."""
    shown, = (block.text for block in DEPLOY_PAGE.blocks if block.text.startswith("apiVersion: kustomize"))
    text = shown.replace("sha256:...", "sha256:" + "0" * 64)
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
