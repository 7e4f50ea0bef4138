"""What dejavu-loadtest tells of its runs: the page in a real browser, the table, and the server's figures beside its own."""
import copy
import json
import pathlib
import re
import subprocess
import sys

import pytest

from conftest import BIN, PATIENCE_S, ROOT

LOADTEST = BIN / "dejavu-loadtest"


def loadtest(*arguments):
    return subprocess.run([LOADTEST, *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE_S)


def run(daemon, folder, name, *flags):
    path = folder / f"{name}.json"
    done = loadtest("run", "--server", daemon.address, "--metrics", f"http://{daemon.metrics_address}/metrics", "--label", name,
                    "--json", path, "--quiet", "--output-tokens", 32, *flags)
    assert done.returncode in (0, 4), done.stderr  # 4: a machine under load may not keep the generator's times
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module")
def closed(daemon, folder):
    for _ in range(3):
        result = run(daemon, folder, "closed, 8", "--concurrency", 8, "--requests", 64, "--tier", "exact")
        if all(check["agrees"] for check in result["server"]["crosscheck"]):
            break  # or this machine stood still between the server's clock and the client's
    return result


@pytest.fixture(scope="module")
def open_loop(daemon, folder):
    """Valid, whatever this machine is doing: what is made of it is looked at here, not what it measured."""
    result = run(daemon, folder, "open", "--rate", 20, "--requests", 40, "--tier", "dense=1,balanced=1", "--goodput", "ttft:100000")
    return {**result, "valid": True, "invalid_because": [], "failed": 0}


def test_server_and_client_count_the_same_and_their_histograms_agree_within_a_bucket(closed):
    checks = {check["what"]: check for check in closed["server"]["crosscheck"]}
    for what in ("requests, OK", "prompt tokens", "output tokens"):
        assert checks[what]["agrees"] and checks[what]["client"] == checks[what]["server"] > 0, checks[what]
    assert checks["requests, OK"]["client"] == 64
    for what in ("whole request, p50, ms", "whole request, p90, ms", "time to first token, p50, ms"):
        assert checks[what]["agrees"], checks[what]
    assert {f"between two tokens, {p}, ms" for p in ("p50", "p90", "p99")} <= checks.keys()


def report(folder, name, documents):
    source, page = folder / f"{name}.json", folder / f"{name}.html"
    source.write_text(json.dumps(documents))
    done = loadtest("report", "--html", page, source)
    assert done.returncode == 0, done.stderr
    return page, done.stdout


def browse(page, folder):
    """The page's DOM after its script has run, which must say nothing on the console and load nothing but the page."""
    requests = folder / "net-log.json"
    shown = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
         f"--user-data-dir={folder / 'chromium'}", f"--log-net-log={requests}", "--virtual-time-budget=4000", "--dump-dom",
         page.as_uri()], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert "CONSOLE" not in shown.stderr, shown.stderr
    # What pages ask for bears this number ("blink_resource_loader"); the browser itself asks its makers for this and that.
    asked = re.findall(r'"traffic_annotation":101845102,"url":"((?!data:)[^"]*)"', requests.read_text())
    assert not asked
    return shown.stdout.split("<script id=\"data\"")[0]


def test_the_page_of_several_runs_opens_without_errors_and_loads_nothing(open_loop, closed, folder):
    beyond = {**copy.deepcopy(open_loop), "offered_rate": 2 * open_loop["offered_rate"], "goodput_share": 0.5}
    page, _ = report(folder, "several", [beyond, open_loop, closed])
    assert "http:" not in re.sub(r'(?s)<script id="data".*?</script>', "", page.read_text())
    dom = browse(page, folder)
    # Loops stand in different tables, and it is said why.
    assert "2 runs in an open loop and 1 in a closed loop" in dom
    assert "Open-loop runs" in dom and "Closed-loop runs" in dom
    assert "50 % of the requests met the objectives; 99 % are wanted" in dom
    assert len(re.findall("; the knee", dom)) >= 4  # marked in each chart over the rate
    # Below them is one run: the one at the knee.
    assert "<b>Open loop, Poisson arrivals, 20 requests per second.</b>" in dom and "counts from the moment the request was due" in dom
    assert "INVALID" not in dom
    for chart in ("Timeline of latency", "Distribution of latency", "Latency against density", "Server and client"):
        assert chart in dom
    assert dom.count("<circle") > 60


def test_the_page_says_what_a_closed_loop_leaves_out_and_that_a_run_is_invalid(closed, folder):
    invalid = {**copy.deepcopy(closed), "valid": False, "invalid_because": ["three <b>reasons</b>"], "label": "</script><b id=hostile>"}
    page, text = report(folder, "invalid", invalid)
    assert text.startswith("INVALID") and "closed loop, 8 at a time" in text
    dom = browse(page, folder)
    assert "<b>INVALID: the generator did not do what it was told." in dom
    assert "three &lt;b&gt;reasons&lt;/b&gt;" in dom
    assert "<b>Closed loop, 8 requests at a time.</b>" in dom and "do not read them as what users meet" in dom
    assert "id=\"hostile\"" not in dom


def test_a_stall_is_seen_in_the_timeline(open_loop, folder):
    stalled = copy.deepcopy(open_loop)
    for i, entry in enumerate(stalled["timeline"]):
        entry.update(running=3, tokens=0 if 4 <= i < 9 else 5)
    page, _ = report(folder, "stalled", stalled)
    assert "requests were under way and no token came: 0.4–0.9 s" in browse(page, folder)


def test_the_table_has_a_row_for_every_series_at_its_knee(open_loop, closed, folder):
    documents = [{**open_loop, "label": label, "offered_rate": rate, "goodput_share": share}
                 for label, rate, share in (("dense", 10, 1), ("dense", 30, 0.9), ("dense", 20, 1), ("fast", 10, 0))]
    source = folder / "table.json"
    source.write_text(json.dumps([*documents, closed]))
    done = loadtest("report", "--markdown", source)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["dense", "20"], ["fast", "none"]]
    assert rows[0][-1] == "90 % of the requests met the objectives; 99 % are wanted"
    assert all(len(row) == len(rows[0]) for row in rows)


def test_what_is_no_result_is_refused_by_its_name(folder):
    other = folder / "other.json"
    for content in ("{}", "[1]", "no json"):
        other.write_text(content)
        done = loadtest("report", other)
        assert done.returncode != 0 and str(other) in done.stderr
    done = loadtest("report", folder / "missing.json")
    assert done.returncode != 0 and "missing.json" in done.stderr


def test_a_sweep_ends_in_a_table_and_a_page(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "loadtest/sweep.py", "--bin", BIN, "--quick", "--seconds", "0.5", "--tiers", "dense,none",
         "--batches", "2", "--output", tmp_path, "--", "--device", "cpu"], capture_output=True, text=True,
        timeout=5 * PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\| dense, batch 2 \|", done.stdout, re.M)
    results = json.loads((tmp_path / "opt-8m-books/results.json").read_text())
    rates = [result["request_rate"] for result in results]
    assert results and all(result["loop"] == "open" for result in results)
    if rates[-1] < rates[0]:  # a busy machine did not hold even the first: then a third of it is tried
        assert len(rates) == 2 and rates[1] == pytest.approx(rates[0] / 3, rel=0.01) and results[0]["falls_short"]
    else:  # held until one was not, or all of them
        assert rates == sorted(rates) and all(not result["falls_short"] for result in results[:-1])
    assert (tmp_path / "opt-8m-books/page.html").exists()
