"""dejavu-bench as scripts use it: what it writes, and its exit codes. Nothing is asserted about how long anything takes."""
import json
import os
import shutil
import subprocess

import pytest

from conftest import BIN, MODEL, MPI_ENVIRONMENT, PATIENCE_S, mpirun

SYNTHETIC = "synthetic:opt-tiny"
ROW_KEYS = {"model", "synthetic", "dtype", "batch", "context", "tier", "ms_per_step", "weight_bytes_per_step", "gb_per_s",
            "bandwidth_share", "ceiling_share", "mlp_density"}
SIZE = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}


def run(*arguments):
    return subprocess.run([BIN / "dejavu-bench", *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE_S)


def measure(tmp_path, *arguments):
    report = tmp_path / "report.json"
    done = run(*arguments, "--json", report)
    assert done.returncode == 0, done.stderr
    return json.loads(report.read_text()), done.stdout


def dense_bytes(config, dtype, batch, position_size):
    """What a dense step reads, from the shape alone: matrices, a factor for each of their rows in int8, float32 vectors."""
    h, f, size = config["hidden_size"], config["ffn_dim"], SIZE[dtype]
    matrix = lambda rows, cols: rows * cols * size + (4 * rows if dtype == "int8" else 0)
    attention = matrix(3 * h, h) + matrix(h, h) + 4 * 4 * h
    mlp = matrix(f, h) + matrix(f, h) + 4 * (f + h)
    norms = 2 * 2 * 4 * h
    embedded = batch * (matrix(1, h) + h * position_size)
    return config["num_hidden_layers"] * (attention + mlp + norms) + 2 * 4 * h + matrix(config["vocab_size"], h) + embedded


def test_bandwidth(tmp_path):
    result, text = measure(tmp_path, "bandwidth", "--threads", 1, "--repeats", 2, "--buffer-mib", 64)
    assert result["threads"] == 1
    assert 0 < result["read_gb_per_s"] <= result["best_read_gb_per_s"]
    assert "1 threads" in text and "checksum right" in text


def test_barriers(tmp_path):
    result, text = measure(tmp_path, "barriers", "--model", SYNTHETIC, "--threads", 2, "--neighbours", 1, "--context", 4,
                           "--seconds", 0.05, "--repeats", 1)
    rows = result["rows"]
    assert [row["setting"] for row in rows] == ["alone", "1 busy neighbour", f"{result['processors'] + 1} threads",
                                                "two processes of this"]
    assert all(row["ms_per_step"] > 0 and 0 <= row["waiting_share"] <= 1 and row["fair"] >= 1 for row in rows)
    assert rows[0]["fair"] == rows[0]["over_fair"] == 1 and all(row["setting"] in text for row in rows)


@pytest.mark.parametrize("arguments", [("bandwidth",), ("launches", "--model", SYNTHETIC, "--context", 8), ("decode", "--model", SYNTHETIC), ("serve", "--model", SYNTHETIC)])
def test_says_what_a_gpu_would_need(arguments, monkeypatch):
    monkeypatch.setenv("DEJAVU_CUDA_MODULE", "/nowhere/libdejavu_cuda.so")
    done = run(*arguments, "--device", "cuda")
    assert done.returncode == 1
    assert "no CUDA module" in done.stderr and "/nowhere/libdejavu_cuda.so" in done.stderr


def test_calculates_what_a_gpu_would_launch(tmp_path):
    config = {"hidden_size": 256, "ffn_dim": 1024, "num_hidden_layers": 4, "vocab_size": 512}
    result, text = measure(tmp_path, "launches", "--calculate", "--model", SYNTHETIC, "--batch", "1,4", "--context", 64,
                           "--tier", "dense,exact,balanced")
    read = lambda tier, batch, key: sum(r[key] * r["launches_per_step"] for r in result["rows"]
                                        if (r["tier"], r["batch"]) == (tier, batch))
    for batch in (1, 4):
        assert read("dense", batch, "weight_bytes") == pytest.approx(dense_bytes(config, "bf16", batch, 2))
        assert read("dense", batch, "listed_bytes") == 0 < read("exact", batch, "listed_bytes")
        assert read("dense", batch, "weight_bytes") > read("exact", batch, "weight_bytes") > read("balanced", batch, "weight_bytes")
        assert read("dense", batch, "kv_bytes") == 2 * 2 * 4 * 256 * 64 * batch
    for step in result["steps"]:
        rows = [r for r in result["rows"] if (r["tier"], r["batch"]) == (step["tier"], step["batch"])]
        assert step["launches"] == sum(r["launches_per_step"] for r in rows)
        assert step["launches_per_layer"] == sum(r["launches_per_step"] for r in rows if r["launches_per_step"] >= 4) / 4
        assert step["us_at_ceiling"] == pytest.approx(step["bytes"] / 4555e3)
        assert "us" not in step
    assert "calculated" in text and "nothing was run" in text


def test_launches_are_a_gpus_alone():
    done = run("launches", "--model", SYNTHETIC)
    assert done.returncode == 2 and "--device cuda" in done.stderr
    done = run("launches", "--calculate", "--model", MODEL, "--context", 8)
    assert done.returncode == 2 and "only synthetic models" in done.stderr


def test_ops(tmp_path):
    result, text = measure(tmp_path, "ops", "--hidden", 128, "--ffn", 512, "--working-set-mib", 4, "--repeats", 1)
    rows = result["rows"]
    assert result["peak_gflop_per_s"] > 0 and result["bandwidth_gb_per_s"] > 0 and result["barrier_us"] > 0
    gathered = [r for r in rows if r["op"] == "gathered mlp"]
    assert [round(r["density"], 2) for r in gathered] == [0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0]
    dense, = [r for r in rows if r["op"] == "mlp" and r["batch"] == 1]
    assert dense["bytes"] == gathered[-1]["bytes"] == 2 * 128 * 512 * 2
    assert all("cost_over_proportional" in r for r in gathered)
    assert [r["context"] for r in rows if r["op"] == "attention"] == [128, 256, 512, 1024, 2048]
    for op in ("linear output rows", "linear input rows", "mlp"):
        assert [r["batch"] for r in rows if r["op"] == op] == [1, 16]
    for row in rows:
        assert row["us"] > 0 and row["op"] in text
        if "bytes" in row:
            assert row["gb_per_s"] > 0 and row["bandwidth_share"] > 0 and row["peak_share"] > 0


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_ops_of_other_types(tmp_path, dtype):
    result, _ = measure(tmp_path, "ops", "--hidden", 64, "--ffn", 128, "--working-set-mib", 1, "--repeats", 1, "--dtype", dtype)
    dense, = [r for r in result["rows"] if r["op"] == "mlp" and r["batch"] == 1]
    assert dense["bytes"] == 2 * 64 * 128 * SIZE[dtype]


def test_prefill(tmp_path):
    result, _ = measure(tmp_path, "prefill", "--model", MODEL, "--tokens", "4,16", "--repeats", 1)
    assert [r["tokens"] for r in result["rows"]] == [4, 16]
    for row in result["rows"]:
        assert row["tokens_per_s"] == pytest.approx(1000 * row["tokens"] / row["ms"])
        assert row["gflop_per_s"] > 0 and row["peak_share"] > 0 and not row["synthetic"]


def check_rows(result, model, synthetic, dtype):
    assert result["bandwidth_gb_per_s"] > 0 and isinstance(result["noisy"], bool)
    for row in result["rows"]:
        assert ROW_KEYS <= set(row)
        assert (row["model"], row["synthetic"], row["dtype"]) == (str(model), synthetic, dtype)
        assert row["ms_per_step"] > 0 and row["bandwidth_share"] > 0 and row["ceiling_share"] > 0
        assert row["ms_least"] <= row["ms_per_step"] <= row["ms_most"]
        assert {"predictor", "selection", "attention", "mlp", "head", "sampling", "barriers"} <= set(row["breakdown_ms"])
        if row["tier"] == "dense":
            assert row["ceiling_share"] == 1 and row["mlp_density"] == 1


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "int8"])
def test_decode_counts_the_bytes_of_every_type(tmp_path, dtype):
    result, text = measure(tmp_path, "decode", "--model", MODEL, "--dtype", dtype, "--batch", "1,3", "--context", 8,
                           "--tier", "exact", "--steps", 2, "--repeats", 1)
    check_rows(result, MODEL, False, dtype)
    config = json.loads((MODEL / "config.json").read_text())
    assert [(r["batch"], r["tier"]) for r in result["rows"]] == [(1, "dense"), (1, "exact"), (3, "dense"), (3, "exact")]
    for dense, exact in (result["rows"][:2], result["rows"][2:]):
        # Positions keep two or four bytes, whatever the matrices have.
        assert dense["weight_bytes_per_step"] in [dense_bytes(config, dtype, dense["batch"], size) for size in (2, 4)]
        assert exact["weight_bytes_per_step"] < dense["weight_bytes_per_step"]
        assert 0.5 < exact["mlp_density"] < 1
    assert "SYNTHETIC" not in text


def test_synthetic_models_are_labelled(tmp_path):
    result, text = measure(tmp_path, "decode", "--model", SYNTHETIC, "--batch", 2, "--context", "16,4", "--steps", 2,
                           "--tier", "dense,exact,balanced", "--repeats", 1)
    check_rows(result, SYNTHETIC, True, "bf16")
    assert [(r["context"], r["tier"]) for r in result["rows"]] == [
        (context, tier) for context in (16, 4) for tier in ("dense", "exact", "balanced")]
    dense, exact, balanced = result["rows"][:3]
    assert balanced["weight_bytes_per_step"] < exact["weight_bytes_per_step"] < dense["weight_bytes_per_step"]
    assert balanced["mlp_density"] < exact["mlp_density"]
    assert "SYNTHETIC" in text


def test_a_checkpoint_is_the_synthetic_model(tmp_path):
    done = run("checkpoint", "--model", SYNTHETIC, "--dtype", "bf16", "--out", tmp_path / "opt")
    assert done.returncode == 0, done.stderr
    flags = ["--batch", 1, "--context", 4, "--steps", 2, "--repeats", 1, "--tier", "balanced"]
    on_disk, _ = measure(tmp_path, "decode", "--model", tmp_path / "opt", *flags)
    in_memory, _ = measure(tmp_path, "decode", "--model", SYNTHETIC, *flags)
    for a, b in zip(on_disk["rows"], in_memory["rows"], strict=True):
        assert a["weight_bytes_per_step"] == b["weight_bytes_per_step"]


def test_serve(tmp_path):
    result, text = measure(tmp_path, "serve", "--model", SYNTHETIC, "--dtype", "int8", "--tokens", 4, "--repeats", 2)
    assert result["synthetic"] and result["engine_us_per_token"] > 0
    assert result["server_us_per_token"] >= 0  # so few tokens may all come in one message
    assert {"added_us_per_token", "added_share"} <= set(result) and "adds" in text and "apis" not in result


def test_serve_holds_other_apis_against_ours(tmp_path):
    result, text = measure(tmp_path, "serve", "--model", MODEL, "--api", "vllm,kserve", "--tokens", 8, "--repeats", 2)
    assert [row["api"] for row in result["apis"]] == ["dejavu", "kserve", "vllm"]
    for row in result["apis"]:
        assert row["api"] in text and row["cpu_us_per_token"] > 0 and row["ttft_us"] > 0
        for figure in ("us_per_token", "ttft_us", "cpu_us_per_token"):
            over = f"over_own_{figure}"
            assert row[f"{over}_least"] <= row[over] <= row[f"{over}_most"]
            assert row["api"] != "dejavu" or row[over] == row[f"{over}_most"] == 0
    assert "p99_us_beside_reader" not in result  # which other APIs do not change


def check_ranks(result, ranks):
    assert result["ranks"] == ranks and 0 <= result["others_cpu_share"] and isinstance(result["noisy"], bool)
    assert [(r["batch"], r["tier"]) for r in result["rows"]] == [(b, t) for b in (1, 3) for t in ("dense", "balanced")]
    for row in result["rows"]:
        assert row["context"] == 8 and not row["synthetic"]
        assert row["ratio_least"] <= row["ratio"] <= row["ratio_most"] and row["one_rank_ms"] > 0 and row["group_ms"] > 0
        assert row["all_reduces_per_step"] == 1 + 2 * 8  # the embedding, and two in each layer
        assert 0 < row["all_reduce_share"] < 1 and row["all_reduce_us"] > 0 and 1 <= row["imbalance"] <= ranks


RANKS = ["ranks", "--model", MODEL, "--batch", "1,3", "--context", 8, "--tier", "dense,balanced", "--steps", 2, "--repeats", 2]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_as_threads(tmp_path, ranks):
    result, text = measure(tmp_path, *RANKS, "--ranks", ranks)
    check_ranks(result, ranks)
    assert result["group"] == "threads" and f"{ranks} ranks" in text


@pytest.mark.skipif(not (BIN / "libdejavu_mpi.so").exists() or not shutil.which("mpirun"), reason="without Open MPI")
def test_ranks_as_processes(tmp_path):
    report = tmp_path / "report.json"
    done = subprocess.run([*mpirun(2), "--bind-to", "none", BIN / "dejavu-bench", *map(str, RANKS), "--json", report],
                          capture_output=True, text=True, timeout=PATIENCE_S, env={**os.environ, **MPI_ENVIRONMENT})
    assert done.returncode == 0, done.stderr
    result = json.loads(report.read_text())
    check_ranks(result, 2)
    assert result["group"] == "Open MPI" and done.stdout.count("2 processes") == 1


def test_imbalance(tmp_path):
    result, text = measure(tmp_path, "imbalance", "--model", SYNTHETIC, "--ranks", "2,3", "--batch", "1,4", "--steps", 20,
                           "--window", 8, "--tier", "exact,balanced")
    assert [(r["tier"], r["batch"], r["ranks"], r["dealing"]) for r in result["rows"]] == [
        (tier, batch, ranks, dealing) for tier in ("exact", "balanced") for batch in (1, 4) for ranks in (2, 3)
        for dealing in ("frequency", "in turn", "contiguous")]
    for row in result["rows"]:
        assert row["steps"] == 20 and 0 < row["active_share"] < 1
        assert 1 <= row["imbalance"] <= row["imbalance_by_layer"] <= row["step_most"]
        assert row["step_p50"] <= row["step_p99"] <= row["step_most"] <= row["ranks"]
    # A predictor computes fewer neurons; what a step before has left behind is not among them.
    share = lambda tier, batch: next(r["active_share"] for r in result["rows"] if (r["tier"], r["batch"]) == (tier, batch))
    assert share("balanced", 1) < share("exact", 1) < share("exact", 4)
    assert "SYNTHETIC" in text


@pytest.mark.parametrize("arguments, reason", [
    ([], "subcommand"),
    (["decode"], "--model"),
    (["decode", "--model", SYNTHETIC, "--dtype", "fp8"], "fp8"),
    (["decode", "--model", SYNTHETIC, "--batch", "0"], "--batch"),
    (["decode", "--model", SYNTHETIC, "--tier", "best"], "best"),
    (["decode", "--model", SYNTHETIC, "--context", "99999"], "99999"),
    (["decode", "--model", "synthetic:opt-7b"], "opt-7b"),
    (["decode", "--model", "/nowhere"], "/nowhere"),
    (["prefill", "--model", SYNTHETIC, "--tokens", "9999"], "9999"),
    (["ops", "--hidden", "100"], "100"),
    (["bandwidth", "--threads", "-1"], "--threads"),
    (["checkpoint", "--model", "/nowhere", "--out", "/tmp/x"], "/nowhere"),
    (["serve", "--model", SYNTHETIC, "--tokens", "1"], "--tokens"),
    (["serve", "--model", SYNTHETIC, "--api", "dejavu,triton"], "triton"),
    (["ranks", "--model", SYNTHETIC, "--ranks", "0"], "--ranks"),
    (["ranks", "--model", SYNTHETIC, "--context", "99999"], "99999"),
    (["ranks", "--model", SYNTHETIC, "--predictor", "none"], "balanced"),
    (["imbalance", "--model", MODEL, "--predictor", "none"], "balanced"),
    (["imbalance", "--model", SYNTHETIC, "--window", "99999"], "99999"),
])
def test_nonsense_is_refused(arguments, reason):
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert reason in done.stderr and done.stdout == ""


def test_a_report_that_cannot_be_written_costs_no_measurement():
    done = run("decode", "--model", SYNTHETIC, "--json", "/nowhere/report.json")
    assert done.returncode == 1 and "/nowhere/report.json" in done.stderr and done.stdout == ""


def test_a_tier_without_a_predictor_is_refused():
    done = run("decode", "--model", MODEL, "--predictor", "none", "--tier", "balanced", "--context", 4)
    assert done.returncode == 2 and "balanced" in done.stderr
