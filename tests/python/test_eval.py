"""dejavu-eval as scripts use it: what it writes, and its exit codes."""
import json
import math
import os
import shutil
import signal
import subprocess

import pytest

from conftest import BIN, MODEL, PARITY, PATIENCE_S, ROOT

TEXT = ROOT / "tests/testdata/text/evaluation-excerpt.txt"
KEYS = {"tier", "perplexity", "perplexity_change", "top1_agreement", "kl_nats", "mlp_density", "head_density", "recall",
        "precision", "missed_mass", "mlp_byte_share", "weight_bytes_per_token", "byte_ceiling"}


def run(*arguments, model=MODEL, text=TEXT):
    command = [BIN / "dejavu-eval", "--model", model, "--text", text, *arguments]
    return subprocess.run(command, capture_output=True, timeout=PATIENCE_S)


def expect_failure(done, code, *reasons):
    assert done.returncode == code, done.stderr.decode()
    assert done.stdout == b""
    for reason in reasons:
        assert reason in done.stderr.decode()


def test_the_table_and_the_json_file_agree(tmp_path):
    report = tmp_path / "report.json"
    done = run("--predictor", "none", "--max-tokens", "900", "--json", report)
    assert done.returncode == 0, done.stderr.decode()
    result = json.loads(report.read_text())
    assert os.listdir(tmp_path) == ["report.json"]
    assert set(result) == {"weight_dtype", "tokens", "tiers"}
    assert result["tokens"] == 900 - math.ceil(900 / 256)
    assert [t["tier"] for t in result["tiers"]] == ["dense", "exact"]
    dense, exact = result["tiers"]
    for tier in (dense, exact):
        assert KEYS <= set(tier)
        assert len(tier["layers"]) == 8
    assert 30 < dense["perplexity"] < 150
    assert abs(exact["perplexity_change"]) < 1e-5 and exact["top1_agreement"] == 1
    assert dense["mlp_byte_share"] == 1 and 0.5 < exact["mlp_byte_share"] < 0.56

    heading, table = done.stdout.decode().split("\n\n")
    assert str(MODEL) in heading and str(TEXT) in heading
    assert f"{result['tokens']} tokens" in heading and "window 256" in heading and "batch 1" in heading
    rows = [line.split() for line in table.splitlines()]
    assert [row[0] for row in rows] == ["tier", "dense", "exact"]
    assert float(rows[2][1]) == pytest.approx(exact["perplexity"], abs=1e-4)


def test_a_union_needs_and_tells_of_a_batch(tmp_path):
    flags = ["--tiers", "exact", "--predictor", "none", "--window", "64", "--batch", "4"]
    reports = []
    for union in ([], ["--union"]):
        report = tmp_path / "report.json"
        done = run(*flags, "--max-tokens", "512", "--json", report, *union)
        assert done.returncode == 0, done.stderr.decode()
        assert b"batch 4" in done.stdout
        reports.append(json.loads(report.read_text()))
    own, union = reports
    assert own["tokens"] == union["tokens"] == 8 * 63
    assert own["tiers"][0]["perplexity"] == pytest.approx(union["tiers"][0]["perplexity"], rel=1e-9)
    assert own["tiers"][0]["mlp_active"] < union["tiers"][0]["mlp_active"]
    expect_failure(run(*flags, "--max-tokens", "255", "--union"), 1, "needs 256")
    expect_failure(run("--union"), 2, "--batch")


@pytest.mark.parametrize("arguments", [
    ["--tiers", "best"], ["--tiers", "EXACT"], ["--tiers", ""], ["--window", "1"], ["--batch", "0"],
    ["--max-tokens", "-1"], ["--threads", "-1"], ["--nothing"], ["more"],
])
def test_wrong_usage_is_exit_code_2(arguments):
    expect_failure(run(*arguments), 2)


def test_without_a_model_or_a_text_usage_is_wrong():
    for arguments in (["--model", MODEL], ["--text", TEXT], []):
        assert subprocess.run([BIN / "dejavu-eval", *arguments], capture_output=True).returncode == 2


def test_help_and_version_are_exit_code_0():
    assert b"--union" in run("--help").stdout
    assert run("--version").stdout.startswith(b"dejavu-eval ")
    assert run("--help").returncode == run("--version").returncode == 0


def test_what_is_missing_or_no_text_is_exit_code_1(tmp_path):
    expect_failure(run(text=tmp_path / "nowhere.txt"), 1, "nowhere.txt")
    expect_failure(run(text=tmp_path), 1, str(tmp_path))
    expect_failure(run(model=tmp_path / "nowhere"), 1, "nowhere")
    expect_failure(run(model=PARITY / "pre-norm-hd64"), 1, "pre-norm-hd64", "has no tokenizer")
    expect_failure(run("--predictor", tmp_path / "nowhere.safetensors"), 1, "nowhere.safetensors")
    expect_failure(run("--json", tmp_path / "nowhere/report.json"), 1, "report.json")
    expect_failure(run("--window", "513"), 1, "513", "512")
    expect_failure(run("--max-tokens", "1"), 1, "at least 2")
    for name, content in {"latin1.txt": b"caf\xe9 noir", "empty.txt": b""}.items():
        (tmp_path / name).write_bytes(content)
    expect_failure(run(text=tmp_path / "latin1.txt"), 1, "not valid UTF-8 at byte 3")
    expect_failure(run(text=tmp_path / "empty.txt"), 1, "1 tokens", "at least 2")


def test_a_tier_that_cannot_be_served_is_exit_code_1(tmp_path):
    done = run("--predictor", "none", "--tiers", "dense,fast", "--json", tmp_path / "report.json")
    expect_failure(done, 1, "tier fast needs a predictor")
    assert not os.listdir(tmp_path)


def test_the_predictor_beside_the_model_is_taken_unless_it_is_none(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    (model / "predictor.safetensors").write_bytes(b"not one")
    expect_failure(run(model=model), 1, "predictor.safetensors")
    assert run("--predictor", "none", "--max-tokens", "20", model=model).returncode == 0


def test_ctrl_c_is_exit_code_130(tmp_path):
    text = tmp_path / "long.txt"
    text.write_bytes(TEXT.read_bytes() * 20)
    report = tmp_path / "report.json"
    command = [BIN / "dejavu-eval", "--model", MODEL, "--text", text, "--json", report]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr.readline().endswith(b"left\n")  # the progress, every few seconds
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == b""
        assert process.wait(timeout=PATIENCE_S) == 130
    assert not report.exists()


def test_speculation_counts_what_tiers_and_lookups_guess_right(tmp_path):
    flags = ["--speculation", "--tiers", "high,fast", "--draft-tokens", "1,3", "--window", "64", "--max-tokens", "300"]
    counts = []
    for batch in ("1", "2"):
        report = tmp_path / "report.json"
        done = run(*flags, "--batch", batch, "--json", report)
        assert done.returncode == 0, done.stderr.decode()
        result = json.loads(report.read_text())
        assert result["windows"] == 4 and result["new_tokens"] == 32
        names = [(w["tier"], w["mode"], w.get("drafts"), w.get("draft_tokens")) for w in result["ways"]]
        assert names == [(tier, *way) for tier in ("dense", "exact") for way in
                         [("off", None, None), ("auto", None, None),
                          *[("always", source, k) for k in (1, 3) for source in ("high", "fast", "lookup")]]]
        always = [w for w in result["ways"] if w["mode"] == "always"]
        for way in always:
            if way["drafts"] == "lookup":
                continue
            # Each of the 32 tokens but the first is one of a round, or the last one, behind which nothing is drafted.
            assert 4 * 30 / (way["draft_tokens"] + 1) <= way["rounds"] <= 4 * 31
            assert way["rounds"] <= way["drafted"] <= way["draft_tokens"] * way["rounds"]
            assert 0.5 * way["drafted"] < way["accepted"] <= way["drafted"]
            assert way["tokens_per_round"] == pytest.approx(1 + way["accepted"] / way["rounds"], rel=0.02)
        counts.append([(w["rounds"], w["drafted"], w["accepted"]) for w in always])
        # What checks are of DENSE and of EXACT gives the same tokens.
        assert counts[-1][:6] == counts[-1][6:]
        table = done.stdout.decode().split("\n\n")[1].splitlines()
        assert table[0].split()[0] == "way" and len(table) == 1 + len(result["ways"])
    assert os.listdir(tmp_path) == ["report.json"]


def test_speculation_needs_a_whole_window():
    expect_failure(run("--speculation", "--window", "128", "--batch", "2", "--max-tokens", "200"), 1,
                   "the text has 200 tokens", "2 windows of 128 side by side need 256")
    expect_failure(run("--speculation", "--union", "--batch", "2"), 2, "--union")
    expect_failure(run("--speculation", "--draft-tokens", "17"), 2)
    expect_failure(run("--speculation", "--tiers", "exact"), 1, "tier exact cannot draft", "high, balanced, fast")
    expect_failure(run("--speculation", "--tiers", "fast", "--predictor", "none"), 1, "tier fast cannot draft", "no predictor")
