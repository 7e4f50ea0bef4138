"""dejavud --plan: what fits where, calculated."""
import json
import os
import subprocess

import pytest

from conftest import BIN, MODEL, PATIENCE_S


def plan(*args, form="--plan"):
    return subprocess.run([BIN / "dejavud", form, *args], capture_output=True, text=True, timeout=PATIENCE_S, env=os.environ)


def test_a_plan_for_people():
    run = plan("--model", "opt-175b", "--weights", "fp16", "--plan-devices", "8", "--plan-device", "a100-80")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("opt-175b, float16 weights, float16 keys and values, on 8 x a100-80\n")
    assert "12 of 96 heads, 6144 of 49152 neurons, 6284 of 50272 tokens" in run.stdout
    assert "2039 GB/s x 0.85, 193 all-reduces of 10 us (1.93 ms)" in run.stdout
    assert "published for OPT-66b" in run.stdout
    assert run.stdout.endswith("It fits.\n")


def test_a_plan_for_programs():
    run = plan("--model", "opt-13b", "--weights", "int8", "--plan-devices", "2", "--plan-memory-gib", "24",
               "--plan-bandwidth-gbs", "900", "--plan-bandwidth-share", "0.8", "--plan-all-reduce-us", "25",
               "--plan-context", "100", "--scheduler-max-batch", "4", "--sparsity-lowest-tier", "high", form="--plan=json")
    assert (run.returncode, run.stderr) == (0, "")
    found = json.loads(run.stdout)
    assert (found["model"], found["weights"], found["devices"], found["fits"]) == ("opt-13b", "int8", 2, True)
    assert [tier["tier"] for tier in found["tiers"]] == ["dense", "exact", "high"]
    for tier in found["tiers"]:
        assert [batch["batch"] for batch in tier["batches"]] == [1, 2, 4]
        for batch in tier["batches"]:
            read = batch["weight_bytes_per_step"] + 100 * batch["batch"] * found["kv"]["token_bytes"]
            assert batch["inter_token_ms"] == pytest.approx(read / 900e6 / 0.8 + 81 * 0.025, rel=1e-6)


def test_a_directory():
    run = plan("--model", MODEL, "--plan-device", "cpu", "--plan-memory-gib", "2", "--plan-bandwidth-gbs", "40", form="--plan=json")
    assert (run.returncode, run.stderr) == (0, "")
    assert json.loads(run.stdout)["assumed"]["synthetic"] is False


def test_what_does_not_fit_says_what_would():
    where = ("--model", "opt-30b", "--plan-device", "a100-40")
    run = plan(*where)
    assert run.returncode == 1
    assert "It does not fit" in run.stdout and "--plan-devices 2" in run.stdout and "--weights int8" in run.stdout
    run = plan(*where, form="--plan=json")
    assert run.returncode == 1
    found = json.loads(run.stdout)
    assert not found["fits"] and found["reason"]
    for other in found["would_fit"]:
        assert plan(*where, *other["flags"].split()).returncode == 0


@pytest.mark.parametrize("code, reason, arguments", [
    (2, "--plan needs --plan-device or --plan-memory-gib", ["--plan", "--model", "opt-1.3b"]),
    (2, "--plan-device cpu needs --plan-bandwidth-gbs",
     ["--plan", "--model", "opt-1.3b", "--plan-device", "cpu", "--plan-memory-gib", "8"]),
    (2, "--plan-devices requires --plan", ["--model", "opt-1.3b", "--plan-devices", "2"]),
    (2, "a11 not in", ["--plan", "--model", "opt-1.3b", "--plan-device", "a11"]),
    (2, "yaml not in", ["--plan=yaml", "--model", "opt-1.3b", "--plan-device", "a10"]),
    (2, "65 not in range", ["--plan", "--model", "opt-1.3b", "--plan-device", "a10", "--plan-devices", "65"]),
    (2, "no model", ["--plan", "--plan-device", "a10"]),
    (1, "there is no such directory", ["--plan", "--model", "opt-1t", "--plan-device", "a10"]),
])
def test_nonsense_is_refused(code, reason, arguments):
    run = subprocess.run([BIN / "dejavud", *arguments], capture_output=True, text=True, timeout=PATIENCE_S, env=os.environ)
    assert run.returncode == code and run.stdout == ""
    assert reason in run.stderr
