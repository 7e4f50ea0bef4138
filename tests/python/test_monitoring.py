"""Dashboards, rules, their tests, runbooks and the list of metrics, against each other and a real Prometheus without data."""
import re
import subprocess
import sys

import pytest

from monitoring import (DEPLOY, METRICS, ROOT, RULES, RUNBOOKS, dashboard_expressions, dashboards, documented_label_values,
                        documented_metrics, family, selectors, start_prometheus)

RULE_FILES = [RULES / "recording.yaml", RULES / "alerts.yaml"]
RULE_TESTS = sorted((RULES / "tests").glob("*.yaml"))
# What Prometheus adds to a series, or Kubernetes.
TARGET_LABELS = {"namespace", "pod", "job", "instance"}


def promtool(*arguments):
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory):
    """It scrapes nobody: port 9 of loopback."""
    running = start_prometheus(tmp_path_factory.mktemp("prometheus"), ["127.0.0.1:9"], RULE_FILES, "10s")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def rules(prometheus):
    """All rules, as Prometheus has read them."""
    return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def alerts(rules):
    return {rule["name"]: rule for rule in rules if rule["type"] == "alerting"}


def test_promtool_accepts_the_rules():
    result = promtool("check", "rules", *RULE_FILES)
    assert result.returncode == 0, result.stdout + result.stderr


def test_rules_do_what_their_tests_say():
    result = promtool("test", "rules", *RULE_TESTS)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_has_a_case_that_fires_and_one_that_does_not(alerts):
    fires, silent = set(), set()
    for case in [case for path in RULE_TESTS for case in re.split(r"\n  - name: ", path.read_text())[1:]]:
        name = case.split()[0]
        asked = re.findall(r"alertname: (\w+)", case)
        assert asked == [name], case
        if re.search(r"exp_alerts: \[\]", case):
            assert " is silent" in case.splitlines()[0], case
            silent.add(name)
        else:
            assert re.search(r"exp_alerts:\n +- exp_labels: \{", case) and " fires" in case.splitlines()[0], case
            fires.add(name)
    assert fires == set(alerts)
    assert silent == set(alerts)


def test_every_alert_says_what_it_is_and_has_a_runbook(alerts):
    text = RUNBOOKS.read_text()
    sections = {title: body for title, body in re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.M | re.S)}
    assert set(sections) == set(alerts)
    for name, alert in alerts.items():
        assert alert["labels"]["severity"] in ("critical", "warning"), name
        assert alert["annotations"]["summary"] and alert["annotations"]["description"], name
        assert alert["annotations"]["runbook_url"] == f"docs/operations/runbooks.md#{name.lower()}"
        for part in ("**Means.**", "**Look at.**", "**Do.**"):
            assert sections[name].count(part) == 1, f"{name} {part}"


def test_runbooks_name_only_what_there_is(alerts):
    text = " ".join(RUNBOOKS.read_text().split())
    panels = {f"{name.capitalize()}: {panel['title']}" for name, content in dashboards().items() for panel in content["panels"]
              if panel["type"] != "row"}
    named = set(re.findall(r"(?<!\*)\*((?:Service|Sparsity|Engine): [^*]+)\*", text))
    assert named and named <= panels, named - panels
    admin = (ROOT / "proto/dejavu/v1/admin.proto").read_text()
    for method in re.findall(r"`admin (\w+)`", text):
        assert re.search(rf"rpc {method}\(", admin), method
    options = "".join(path.read_text() for path in sorted((ROOT / "config").glob("*.cc")))
    for option in re.findall(r"`((?:admin|drain|kv|limits|log|metrics|scheduler|sparsity|trace)\.\w+)", text):
        assert option.endswith("slo_") or f'"{option}"' in options, option
    for link in re.findall(r"\]\(#(\w+)\)", text):
        assert link in {name.lower() for name in alerts}, link


def test_dashboards_are_what_the_generator_writes():
    result = subprocess.run([sys.executable, DEPLOY / "monitoring/make_dashboards.py", "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["service", "sparsity", "engine"])
def test_dashboards_are_as_grafana_wants_them(name):
    content = dashboards()[name]
    assert content["schemaVersion"] >= 38
    assert [v["name"] for v in content["templating"]["list"]] == ["datasource", "namespace", "pod", "model", "tier"]
    panels = content["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    titles = [panel["title"] for panel in panels]
    assert len(set(titles)) == len(titles)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["description"] and panel["targets"], panel["title"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            for metric, matchers in selectors(target["expr"]):
                assert ("namespace", "=~", "$namespace") in matchers and ("pod", "=~", "$pod") in matchers, f"{panel['title']}: {metric}"


def check_selectors(expression, own_rules=()):
    metrics, values = documented_metrics(), documented_label_values()
    assert selectors(expression) or "vector(" in expression, expression
    for name, matchers in selectors(expression):
        if name in own_rules or name == "up":
            continue
        metric = family(name, metrics)
        assert metric, f"{name} is not in {METRICS.name}: {expression}"
        if metric.type == "histogram":
            assert name != metric.name, f"{name} is a histogram: {expression}"
        allowed = metric.labels | TARGET_LABELS | ({"model"} if metric.model else set())
        for label, operator, value in matchers:
            assert label in allowed, f"{name} has no label {label}: {expression}"
            if label in values and value != ".*":
                assert set(value.split("|")) <= values[label], f"{name} {label} {value}"
        if name != metric.name and name.endswith("_bucket"):
            assert "le" in expression, expression


def test_expressions_name_only_documented_metrics(rules):
    recorded = {rule["name"] for rule in rules if rule["type"] == "recording"}
    assert len(dashboard_expressions()) > 100
    for expression in dashboard_expressions():
        check_selectors(expression.text)
    for rule in rules:
        check_selectors(rule["query"], recorded)


def test_dashboards_show_every_metric():
    metrics = documented_metrics()
    shown = {family(name, metrics).name for e in dashboard_expressions() for name, _ in selectors(e.text)}
    assert shown == {name for name, about in metrics.items() if about.only != "pickers"}  # these repeat others


def test_prometheus_understands_every_expression(prometheus, rules):
    for expression in dashboard_expressions():
        prometheus.query(expression.text)
    for rule in rules:
        prometheus.query(rule["query"])


def test_variables_ask_for_labels_that_there_are():
    metrics = documented_metrics()
    for content in dashboards().values():
        for variable in content["templating"]["list"][1:]:
            selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"]).groups()
            check_selectors(re.sub(r"\$\w+", ".*", selector))
            name = selectors(selector)[0][0]
            assert label in family(name, metrics).labels | TARGET_LABELS | {"model"}


def test_the_list_follows_prometheus_conventions(tmp_path):
    """promtool's own lint over one made sample of each metric."""
    lines = []
    for metric in documented_metrics().values():
        assert metric.type in ("counter", "gauge", "histogram")
        assert metric.only in ("", "GPU", "ranks", "predictor", "TLS", "targets", "per layer", "tenants", "pickers"), metric
        assert (metric.type == "counter") == metric.name.endswith("_total"), metric.name
        if metric.only == "pickers":
            continue  # vLLM's names have a colon, which is for rules
        lines += [f"# HELP {metric.name} Text.", f"# TYPE {metric.name} {metric.type}"]
        if metric.type == "histogram":
            lines += [f'{metric.name}_bucket{{le="+Inf"}} 0', f"{metric.name}_sum 0", f"{metric.name}_count 0"]
        else:
            lines.append(f"{metric.name} 0")
    result = subprocess.run(["promtool", "check", "metrics"], input="\n".join(lines) + "\n", capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_every_documented_label_with_fixed_values_is_used():
    used = set().union(*(metric.labels for metric in documented_metrics().values()))
    assert set(documented_label_values()) <= used
    assert used - set(documented_label_values()) == {
        "version", "compiler", "dtype", "layers", "ranks", "device", "predictor", "synthetic", "method", "layer", "gpu",
        "tenant", "model_name", "block_size", "num_gpu_blocks"}
