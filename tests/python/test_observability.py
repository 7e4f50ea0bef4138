"""What an operator sees: the daemon, a real Prometheus that scrapes it, and a load whose every answer is counted here, too."""
import collections
import concurrent.futures
import contextlib
import http.client
import random
import re
import socket
import subprocess
import threading
import time
import urllib.request

import grpc
import pytest

import monitoring
from conftest import PATIENCE_S

TIERS = ["dense", "exact", "high", "balanced", "fast"]


def scrape(daemon):
    with urllib.request.urlopen(f"http://{daemon.metrics_address}/metrics", timeout=PATIENCE_S) as reply:
        assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return reply.read().decode()


def samples(text):
    """{(name, ((label, value), ...)): number}."""
    found = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        name, labels, value = re.fullmatch(r'([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)', line).groups()
        pairs = tuple(sorted(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels or "")))
        found[name, pairs] = float(value)
    return found


def total(found, name, **labels):
    return sum(value for (n, pairs), value in found.items()
               if n == name and all((key, want) in pairs for key, want in labels.items()))


class Load:
    """Varied requests, some of which fail on purpose; what became of each is counted as the client saw it."""

    def __init__(self, daemon, seed=1):
        self.daemon, self.random, self.lock = daemon, random.Random(seed), threading.Lock()
        self.calls = collections.Counter()  # (method, code)
        self.generated = self.shadowed = 0

    def _one(self, kind, tier, urgency, length, tokens, seed):
        pb, stub = self.daemon.api.pb, self.daemon.stub
        request = self.daemon.request([2] + [5 + (seed * 7 + i) % 900 for i in range(length)], tokens)
        request.sparsity.tier = tier
        request.sparsity.shadow_every = 3
        request.scheduling.urgency = urgency
        request.sampling.temperature = 0.8 * (seed % 2)
        request.sampling.seed = seed
        metadata = (("x-tenant", f"tenant-{seed % 50}"),)
        method, generated = "Generate", 0
        try:
            if kind == "stream":
                method = "GenerateStream"
                for chunk in stub.GenerateStream(request, metadata=metadata, timeout=PATIENCE_S):
                    generated += len(chunk.token_ids)
            elif kind == "score":
                method = "Score"
                score = pb.ScoreRequest()
                score.token_ids.ids.extend(request.token_ids.ids)
                stub.Score(score, metadata=metadata, timeout=PATIENCE_S)
            else:
                if kind == "invalid":
                    request.sampling.temperature = -1
                generated = len(stub.Generate(request, metadata=metadata, timeout=PATIENCE_S).token_ids)
            code = "OK"
        except grpc.RpcError as error:
            code = error.code().name
        with self.lock:
            self.calls[method, code] += 1
            self.generated += generated

    def run(self, requests, threads=8):
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            futures = []
            for _ in range(requests):
                draw = self.random
                futures.append(pool.submit(
                    self._one, draw.choices(["unary", "stream", "score", "invalid"], [60, 30, 5, 5])[0],
                    draw.randint(1, 5), draw.randint(1, 3), draw.randint(1, 40), draw.randint(2, 6),
                    draw.randrange(1 << 30)))
            for future in futures:
                future.result()


@pytest.fixture(scope="module")
def watched(api, tmp_path_factory):
    """A daemon under load with a Prometheus beside it: (daemon, prometheus, load)."""
    from conftest import Daemon
    daemon = Daemon(api, tmp_path_factory.mktemp("watched"), "--metrics-per-layer=true", "--metrics-slo-ttft-ms", "500",
                    "--metrics-slo-itl-ms", "50", "--scheduler-max-waiting-requests", "4096")
    prometheus = monitoring.start_prometheus(tmp_path_factory.mktemp("prometheus"), [daemon.metrics_address],
                                             scrape_interval="200ms")
    load = Load(daemon)
    load.run(500)
    yield daemon, prometheus, load
    prometheus.stop()
    daemon.stop()


def test_counts_are_those_of_the_clients(watched):
    daemon, _, load = watched
    daemon.expect_idle()
    calls = lambda found: sum(total(found, "dejavu_requests_total", method=m) for m in ("Generate", "GenerateStream", "Score"))
    deadline = time.monotonic() + PATIENCE_S
    while calls(found := samples(scrape(daemon))) < sum(load.calls.values()):  # counted after the client has heard
        assert time.monotonic() < deadline, calls(found)
        time.sleep(0.01)
    for (method, code), count in load.calls.items():
        assert total(found, "dejavu_requests_total", method=method, code=code) == count, (method, code)
    assert total(found, "dejavu_requests_total", method="Generate") == sum(
        count for (method, _), count in load.calls.items() if method == "Generate")
    assert total(found, "dejavu_generated_tokens_total") == load.generated
    firsts = total(found, "dejavu_time_to_first_token_seconds_count")
    assert firsts == sum(count for (method, code), count in load.calls.items() if method != "Score" and code == "OK")
    assert total(found, "dejavu_inter_token_latency_seconds_count") == load.generated - firsts
    assert total(found, "dejavu_requests_running") == 0
    assert total(found, "dejavu_engine_state", state="serving") == 1


def test_promtool_has_nothing_to_say(watched):
    daemon, _, _ = watched
    checked = subprocess.run(["promtool", "check", "metrics"], input=scrape(daemon), capture_output=True, text=True)
    # vLLM's names have a colon, which is for rules; pickers want it so.
    said = [line for line in (checked.stdout + checked.stderr).splitlines() if not line.startswith("vllm:")]
    assert said == []


def test_endpoint_pickers_find_vllms_names(watched):
    daemon, _, _ = watched
    found = samples(scrape(daemon))
    same = {"vllm:num_requests_running": "dejavu_requests_running", "vllm:num_requests_waiting": "dejavu_requests_waiting",
            "vllm:kv_cache_usage_perc": "dejavu_kv_utilization_ratio", "vllm:prefix_cache_queries_total": "dejavu_prefix_cache_query_tokens_total",
            "vllm:prefix_cache_hits_total": "dejavu_prefix_cache_hit_tokens_total"}
    for theirs, ours in same.items():
        assert total(found, theirs, model_name="opt-8m-books") == total(found, ours), theirs
    (labels,) = [dict(pairs) for name, pairs in found if name == "vllm:cache_config_info"]
    assert labels["block_size"] == "16" and int(labels["num_gpu_blocks"]) == daemon.load().kv_blocks_total


def test_what_is_exported_is_what_is_documented(watched):
    daemon, _, _ = watched
    text = scrape(daemon)
    exported = set(re.findall(r"^# TYPE (\S+)", text, re.M))
    documented = monitoring.documented_metrics()
    elsewhere = {name for name, about in documented.items() if about.elsewhere}
    assert exported <= set(documented), exported - set(documented)
    assert set(documented) - elsewhere <= exported, set(documented) - elsewhere - exported
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)", text, re.M))
    for name in exported:
        assert documented[name].type == kinds[name], name
        labels = {label for (n, pairs), _ in samples(text).items() if re.fullmatch(name + "(_bucket|_sum|_count)?", n)
                  for label, _ in pairs} - {"le"}
        assert labels <= set(documented[name].labels) | {"model"}, name


def test_every_dashboard_expression_answers_with_data(watched):
    daemon, prometheus, load = watched
    load.run(300)  # so that rates have something to say
    empty = []
    for expression in monitoring.dashboard_expressions(model=prometheus.label_value("dejavu_build_info", "model")):
        if expression.elsewhere:
            prometheus.query(expression.text)
        elif not prometheus.query_until(expression.text, bool):
            empty.append(expression.text)
    assert not empty, "\n".join(empty)


def test_cardinality_does_not_grow_with_requests(watched):
    daemon, _, load = watched
    load.run(500)
    before = set(samples(scrape(daemon)))
    load.run(4500)
    after = set(samples(scrape(daemon)))
    assert after == before, sorted(after - before)[:10]


def test_histograms_have_the_means_that_clients_measure(start, api):
    daemon = start(model="synthetic:opt-125m")
    firsts, gaps = [], []
    for seed in range(12):
        request = daemon.request([2] + [7 + (seed * 13 + i) % 900 for i in range(200)], 40)
        request.scheduling.prefix_cache = False
        sent = time.perf_counter()
        times = [time.perf_counter() for chunk in daemon.stub.GenerateStream(request, timeout=PATIENCE_S)
                 if len(chunk.token_ids) > 0]
        firsts.append(times[0] - sent)
        gaps.append((times[-1] - times[0]) / 39)
    found = samples(scrape(daemon))

    def mean(name):
        return total(found, f"{name}_sum") / total(found, f"{name}_count")

    assert mean("dejavu_time_to_first_token_seconds") == pytest.approx(sum(firsts) / len(firsts), rel=0.1)
    assert mean("dejavu_inter_token_latency_seconds") == pytest.approx(sum(gaps) / len(gaps), rel=0.1)


def test_edges_are_those_of_the_configuration(start):
    daemon = start("--metrics-edges", "inter_token_latency_seconds=0.01,0.1;batch_size=1,16")
    daemon.stub.Generate(daemon.request([2, 100], 4), timeout=PATIENCE_S)
    found = samples(scrape(daemon))
    edges = {dict(pairs)["le"] for name, pairs in found if name == "dejavu_inter_token_latency_seconds_bucket"}
    assert edges == {"0.01", "0.1", "+Inf"}


def test_a_scrape_is_answered_beside_connections_that_say_nothing_or_little(start):
    """More of them than the port has places: those that have been silent longest make room."""
    daemon = start()
    host, port = daemon.metrics_address.split(":")
    with contextlib.ExitStack() as stack:
        silent = []
        for i in range(100):
            silent.append(stack.enter_context(socket.create_connection((host, int(port)), timeout=PATIENCE_S)))
            if i % 2:
                silent[-1].sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nX-Slow: ")  # and never an end
        kept = http.client.HTTPConnection(host, int(port), timeout=PATIENCE_S)
        for _ in range(3):
            scrape(daemon)
            kept.request("GET", "/metrics")
            assert kept.getresponse().read().startswith(b"# HELP")
        assert total(samples(scrape(daemon)), "dejavu_connections_closed_total", reason="made_room") > 0
        kept.close()


def test_states_and_other_paths(start, api):
    daemon = start()
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://{daemon.metrics_address}/metrics/x", timeout=PATIENCE_S)
    assert refused.value.code == 404
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://{daemon.metrics_address}/metrics", data=b"x", timeout=PATIENCE_S)
    assert refused.value.code == 405
