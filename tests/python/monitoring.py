"""What deploy/monitoring and docs/operations say, for the tests, and a real Prometheus to ask."""
import collections
import contextlib
import json
import pathlib
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARDS = DEPLOY / "monitoring/dashboards"
RULES = DEPLOY / "monitoring/rules"
METRICS = ROOT / "docs/operations/metrics.md"
RUNBOOKS = ROOT / "docs/operations/runbooks.md"
PATIENCE_S = 60

# What Grafana puts in the place of its variables. `.*` is what "All" is set to.
FILLED_IN = {"$__rate_interval": "1m", "$__interval": "15s", "$__range": "1h",
             "$namespace": ".*", "$pod": ".*", "$model": ".*", "$tier": ".*"}

ELSEWHERE = {"GPU", "ranks", "TLS", "tenants", "pickers"}  # what the daemon of the tests does not have, or has under other names


# labels: its own, without `model`. only: "GPU", "ranks", ..., or empty where every daemon exports it.
class Metric(collections.namedtuple("Metric", "name type labels model only")):
    elsewhere = property(lambda self: self.only in ELSEWHERE)


# needs: the conditions (Metric.only) of the metrics in it.
class Expression(collections.namedtuple("Expression", "dashboard panel text needs")):
    elsewhere = property(lambda self: not ELSEWHERE.isdisjoint(self.needs))


def documented_metrics():
    """Name to Metric, of docs/operations/metrics.md. Histograms by their family's name."""
    metrics = {}
    for line in METRICS.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 6 or not cells[0].startswith("`"):
            continue
        name, labels = cells[0].strip("`"), set(re.findall(r"\w+", cells[2]))
        assert name not in metrics, f"{name} twice"
        metrics[name] = Metric(name, cells[1], labels - {"none"}, "none" not in labels, cells[5])
    return metrics


def documented_label_values():
    """Label to its values, of those that have a fixed set."""
    section = METRICS.read_text().split("## Labels")[1].split("##")[0]
    return {label: set(values.split(", ")) for label, values in re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.M)}


def family(name, metrics):
    """The documented metric that a sample or selector of this name belongs to, or None."""
    if name in metrics:
        return metrics[name]
    found = metrics.get(re.sub(r"_(bucket|sum|count)$", "", name))
    return found if found and found.type == "histogram" else None


def selectors(expression):
    """(metric, matchers) of every vector selector, in the PromQL that our files use. Matchers: (label, operator, value)."""
    strings = []

    def keep(match):
        strings.append(match.group(1))
        return f'"{len(strings) - 1}"'

    text = re.sub(r'"((?:[^"\\]|\\.)*)"', keep, expression)
    text = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", text)
    text = re.sub(r"\[[^]]*\]", " ", text)
    found = []
    for name, call, braces in re.findall(r"(?<![\w:.\"])([a-zA-Z_:][\w:]*)\s*(\(?)(?:\{([^}]*)\})?", text):
        if call or name in ("and", "or", "unless", "bool", "offset"):
            continue
        found.append((name, [(label, operator, strings[int(i)])
                             for label, operator, i in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"(\d+)"', braces)]))
    return found


def dashboards():
    """Name to content."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}


def dashboard_expressions(**variables):
    """Every expression of every panel, with Grafana's variables filled in: as in FILLED_IN, or as in `variables`."""
    metrics = documented_metrics()
    filled_in = FILLED_IN | {f"${name}": value for name, value in variables.items()}
    expressions = []
    for name, dashboard in dashboards().items():
        for panel in dashboard["panels"]:
            for target in panel.get("targets", []):
                text = target["expr"]
                for variable, value in filled_in.items():
                    text = text.replace(variable, value)
                assert "$" not in text, text
                needs = {family(metric, metrics).only for metric, _ in selectors(text) if family(metric, metrics)} - {""}
                expressions.append(Expression(name, panel["title"], text, needs))
    return expressions


class Prometheus:
    """A running one. `query` returns the result of an instant query, `get` the data of any path of its API."""

    def __init__(self, process, address, log):
        self.process = process
        self.address = address
        self.log = log

    def get(self, path, **parameters):
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE_S) as reply:
                answer = json.load(reply)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters or path}: {error.read().decode(errors='replace')}") from error
        assert answer["status"] == "success", answer
        assert not answer.get("warnings"), answer
        return answer["data"]

    def query(self, expression, **parameters):
        return self.get("query", query=expression, **parameters)["result"]

    def ready(self):
        try:
            with urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=5) as reply:
                return reply.status == 200
        except OSError:
            return False

    def label_value(self, metric, label):
        """Of a metric that has one series, once it has."""
        (series,) = self.query_until(metric, bool)
        return series["metric"][label]

    def query_until(self, expression, holds):
        """Asks until the result is as wanted, and returns it."""
        deadline = time.monotonic() + PATIENCE_S
        while not holds(result := self.query(expression)):
            assert time.monotonic() < deadline, f"{expression}: {result}"
            time.sleep(0.05)
        return result

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(timeout=PATIENCE_S)
        finally:
            self.process.kill()


def free_port():
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_prometheus(folder, targets, rules=None, scrape_interval="50ms"):
    """Prometheus on loopback, with its data in `folder`, scraping `targets` (HOST:PORT) as job "dejavud". `rules`: files.

    Prometheus takes no port 0, so another process may take the free port first: then it tries another.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "prometheus.json"  # JSON is YAML
    config.write_text(json.dumps({
        "global": {"scrape_interval": scrape_interval, "scrape_timeout": scrape_interval, "evaluation_interval": "1s"},
        "rule_files": [str(path) for path in rules or []],
        "scrape_configs": [{"job_name": "dejavud", "static_configs": [{"targets": list(targets)}]}],
    }))
    for attempt in range(5):
        address = f"127.0.0.1:{free_port()}"
        data = folder / f"data{attempt}"
        shutil.rmtree(data, ignore_errors=True)
        log = folder / "prometheus.log"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={data}", f"--web.listen-address={address}",
                 "--storage.tsdb.retention.time=1d", "--storage.tsdb.retention.size=256MB", "--log.level=warn"],
                stdout=output, stderr=subprocess.STDOUT)
        prometheus = Prometheus(process, address, log)
        deadline = time.monotonic() + PATIENCE_S
        while process.poll() is None:
            if prometheus.ready():
                return prometheus
            if time.monotonic() > deadline:
                prometheus.stop()
                raise AssertionError(log.read_text(errors="replace"))
            time.sleep(0.05)
        if "address already in use" not in log.read_text(errors="replace"):
            break
    raise AssertionError(log.read_text(errors="replace"))
