"""dejavu-convert, and what programs make of the directories that it writes: what the checkpoint itself gives, bit by bit."""
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess

import pytest

from conftest import BIN, MODEL, PARITY, PATIENCE_S, ROOT, until

TEXT = ROOT / "tests/testdata/text/evaluation-excerpt.txt"
FILE = "dejavu.safetensors"


def convert(*arguments, **options):
    return subprocess.run([BIN / "dejavu-convert", *arguments], capture_output=True, text=True, timeout=PATIENCE_S, **options)


def converted(folder, model=MODEL, weights="int8"):
    done = convert("--model", model, "--weights", weights, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


def dejavud(model, *arguments):
    """Its end, where it does not serve."""
    return subprocess.run([BIN / "dejavud", "--model", model, *arguments], capture_output=True, text=True, timeout=PATIENCE_S)


def expect_failure(done, code, *reasons):
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    for reason in reasons:
        assert reason in done.stderr


def tiers(daemon):
    info = daemon.stub.GetServerInfo(daemon.api.pb.GetServerInfoRequest(), timeout=PATIENCE_S)
    return info.sparsity.available_tiers


def answers(daemon):
    """Tokens and log-probabilities of every tier, drawn and scored."""
    pb = daemon.api.pb
    said = []
    for tier in tiers(daemon):
        for temperature in (0.0, 1.0):
            request = daemon.request([2, 10, 20, 30], 24)
            request.sparsity.tier = tier
            request.sampling.temperature = temperature
            request.sampling.seed = 7
            request.output.top_logprobs = 2
            reply = daemon.stub.Generate(request, timeout=PATIENCE_S)
            said.append((tier, list(reply.token_ids), [str(token) for token in reply.logprobs]))
    score = pb.ScoreRequest(top_logprobs=1)
    score.token_ids.ids.extend([2, 7, 9, 40, 5])
    return said, str(daemon.stub.Score(score, timeout=PATIENCE_S).tokens)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_daemon_answers_as_with_the_checkpoint(start, tmp_path, ranks):
    flags = ["--tensor-parallel", str(ranks), "--threads", str(ranks)]
    original = answers(start(*flags, "--weights", "int8", processes=1))
    model = converted(tmp_path / "int8")
    daemon = start(*flags, model=model, processes=1)
    assert answers(daemon) == original
    info = daemon.stub.GetModelInfo(daemon.api.pb.GetModelInfoRequest(), timeout=PATIENCE_S)
    assert info.weight_dtype == "int8" and len(tiers(daemon)) == 5
    assert (str(model / FILE) in pathlib.Path(f"/proc/{daemon.process.pid}/maps").read_text()) == (ranks == 1)


@pytest.mark.parametrize("name", ["post-norm-350m-form", "odd-ffn-float32", "pre-norm-hd128-sharded", "old-key-prefix"])
@pytest.mark.parametrize("weights", ["stored", "int8"])
def test_every_form_of_checkpoint_scores_as_it_did(start, tmp_path, name, weights):
    original = answers(start("--weights", weights, model=PARITY / name, processes=1))
    model = converted(tmp_path / "converted", PARITY / name, weights)
    assert answers(start("--weights", weights, model=model, processes=1)) == original


def test_the_tools_take_it(tmp_path):
    model = converted(tmp_path / "bf16", weights="bf16")
    reports = []
    for arguments in (["--model", MODEL, "--weights", "bf16"], ["--model", model]):
        done = subprocess.run([BIN / "dejavu-eval", *arguments, "--text", TEXT, "--max-tokens", "128", "--json",
                               tmp_path / "report.json"], capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stderr
        reports.append(json.loads((tmp_path / "report.json").read_text()))
    assert reports[0] == reports[1]


def test_a_plan_of_it_is_the_checkpoints(tmp_path):
    plan = lambda path, *more: dejavud(path, *more, "--plan", "--plan-memory-gib", "4", "--plan-bandwidth-gbs", "10")
    for weights, name in (("bf16", "bfloat16"), ("int8", "int8")):
        model = converted(tmp_path / weights, weights=weights)
        original, own = plan(MODEL, "--weights", weights).stdout, plan(model).stdout
        assert f"{name} weights" in original
        assert own.replace(str(model), "MODEL") == original.replace(str(MODEL), "MODEL")
        for other in {"bf16", "int8", "fp32"} - {weights}:
            refused = plan(model, "--weights", other)
            assert refused.returncode == 1 and f"{model / FILE}: holds tensor" in refused.stderr, refused


def test_it_writes_all_that_a_model_needs_and_nothing_else(tmp_path):
    model = shutil.copytree(MODEL, tmp_path / "model")
    (model / "generation_config.json").write_text('{"eos_token_id": 2}')
    (model / "notes.txt").write_text("not part of it")
    done = convert("--model", model, "--weights", "int8", "--out", f"{tmp_path}/out/")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/out/: 0.01 GB of int8 weights\n"
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]
    kept = {path.name for path in model.iterdir()} - {"model.safetensors", "notes.txt"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == kept | {FILE}
    for name in kept:
        assert (model / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    again = converted(tmp_path / "again", tmp_path / "out", "stored")
    assert (again / FILE).read_bytes() == (tmp_path / "out" / FILE).read_bytes()


def test_what_is_there_is_kept_unless_force_is_asked_for_a_converted_model(tmp_path):
    model = converted(tmp_path / "model")
    inode = (model / FILE).stat().st_ino
    expect_failure(convert("--model", MODEL, "--out", model), 1, f"{model}: is there already", "--force")
    assert (model / FILE).stat().st_ino == inode
    with open(model / FILE, "rb") as held:  # as a daemon holds it
        before = held.read()
        done = convert("--model", MODEL, "--weights", "bf16", "--out", model, "--force")
        assert done.returncode == 0, done.stderr
        held.seek(0)
        assert held.read() == before != (model / FILE).read_bytes()
    other = tmp_path / "other"
    other.mkdir()
    (other / "letters").write_text("dear")
    (tmp_path / "link").symlink_to(model)
    for path in (other, other / "letters", tmp_path / "link"):
        expect_failure(convert("--model", MODEL, "--out", path, "--force"), 1, f"{path}: is there", "only converted models")
    assert sorted(os.listdir(tmp_path)) == ["link", "model", "other"] and os.listdir(other) == ["letters"]


def test_a_failure_says_why_and_leaves_nothing(tmp_path):
    out = tmp_path / "out"
    few_bytes = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    # Python ignores SIGXFSZ, and so does its child: writes fail as on a full disk.
    expect_failure(convert("--model", MODEL, "--out", out, preexec_fn=few_bytes, restore_signals=False), 1,
                   FILE, "cannot be written: File too large; it needs 1")
    expect_failure(convert("--model", tmp_path / "none", "--out", out), 1, str(tmp_path / "none/config.json"))
    expect_failure(convert("--model", "synthetic:opt-tiny", "--out", out), 1, "synthetic:opt-tiny", "dejavu-bench checkpoint")
    expect_failure(convert("--model", MODEL, "--out", tmp_path / "no/where"), 1, "no/where", "cannot be written")
    expect_failure(convert("--model", MODEL, "--out", ""), 1, "--out is empty")
    cut = shutil.copytree(MODEL, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((MODEL / "model.safetensors").read_bytes()[:-1])
    expect_failure(convert("--model", cut, "--out", out), 1, str(cut / "model.safetensors"))
    misfit = shutil.copytree(PARITY / "pre-norm-hd64", tmp_path / "misfit")
    shutil.copy(MODEL / "predictor.safetensors", misfit)
    expect_failure(convert("--model", misfit, "--out", out), 1, str(misfit / "predictor.safetensors"))
    assert sorted(os.listdir(tmp_path)) == ["cut", "misfit"]


def test_ctrl_c_leaves_all_or_nothing(tmp_path):
    process = subprocess.Popen([BIN / "dejavu-convert", "--model", MODEL, "--weights", "int8", "--out", tmp_path / "out"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: process.poll() is not None or os.listdir(tmp_path))
    process.send_signal(signal.SIGINT)
    assert (process.wait(timeout=PATIENCE_S), os.listdir(tmp_path)) in ((130, []), (0, ["out"]))


@pytest.mark.parametrize("arguments", [["--model", MODEL], ["--out", "x"], ["--model", MODEL, "--out", "x", "--weights", "int4"],
                                       ["--nothing"]])
def test_wrong_usage_is_exit_code_2(arguments):
    expect_failure(convert(*arguments), 2)


def test_help_and_version_are_exit_code_0():
    assert "--force" in convert("--help").stdout
    assert convert("--version").stdout.startswith("dejavu-convert ")
    assert convert("--help").returncode == convert("--version").returncode == 0


def test_a_daemon_refuses_a_damaged_file_and_another_type_by_name(tmp_path):
    model = converted(tmp_path / "model")
    path = model / FILE
    whole = path.read_bytes()
    refused = lambda *flags: dejavud(model, "--listen", "127.0.0.1:0", "--metrics-listen", "", *flags)
    for contents, reason in ((whole[:-1], "claims bytes"), (whole[:4000], "claims a header"), (b"", "too few"),
                             (whole.replace(b"layers.0.up.bias", b"layers.0.up.bia5", 1), "header is damaged"),
                             (whole.replace(b'"version":"1"', b'"version":"9"', 1), "convert the model again")):
        path.unlink()
        path.write_bytes(contents)
        done = refused()
        assert done.returncode == 1 and f"{path}: " in done.stderr and reason in done.stderr, done
    path.write_bytes(whole)
    done = refused("--weights", "bf16")
    assert done.returncode == 1 and f"{path}: holds tensor token_embedding.weight as int8" in done.stderr, done
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_attention_heads": 2}))
    done = refused()
    assert done.returncode == 1 and f"{path}: is of opt, " in done.stderr and "heads 2" in done.stderr, done
