"""Tiers, reports and shadow checks of the daemon with the predictor of the embedded model, and with one spoiled on purpose."""
import json
import random
import struct
import subprocess

import pytest

from conftest import BIN, MODEL, PATIENCE_S

PREDICTED = ("high", "balanced", "fast")
IDS = [2, 100, 200, 300]


def tier_of(api, name):
    return api.pb.Tier.Value(f"TIER_{name.upper()}")


def generate(daemon, tier, tokens, shadow_every=0, ids=IDS, **sparsity):
    request = daemon.request(ids, tokens)
    request.sparsity.tier = tier_of(daemon.api, tier)
    request.sparsity.shadow_every = shadow_every
    for key, value in sparsity.items():
        setattr(request.sparsity, key, value)
    return daemon.stub.Generate(request, timeout=PATIENCE_S)


def info_of(daemon):
    return daemon.stub.GetServerInfo(daemon.api.pb.GetServerInfoRequest(), timeout=PATIENCE_S).sparsity


def cli(daemon, *flags):
    command = [BIN / "dejavu-cli", "--server", daemon.address, "generate", "--token-ids", ",".join(map(str, IDS)), "--ignore-eos",
               "--json", *flags]
    return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE_S).stdout)


def test_the_server_tells_its_tiers_and_predictor(daemon, api):
    info = info_of(daemon)
    assert list(info.available_tiers) == [tier_of(api, name) for name in ("dense", "exact", *PREDICTED)]
    assert info.default_tier == tier_of(api, "exact")
    assert info.predictor == str(MODEL / "predictor.safetensors") and info.predictor_tap == "attention-norm"
    assert 0 < info.predictor_bytes < (MODEL / "model.safetensors").stat().st_size / 10
    assert not info.exact_layers


@pytest.mark.parametrize("tier", PREDICTED)
def test_a_reply_reports_its_tier_and_what_was_read(daemon, api, tier):
    plain = generate(daemon, tier, 24)
    assert plain.prompt.tier == tier_of(api, tier)
    report = plain.finish.sparsity
    assert report.tier == tier_of(api, tier) and report.decode_tokens == 23
    assert 0 < report.mlp_active <= report.mlp_selected < 0.3
    assert report.mlp_density == pytest.approx((report.mlp_selected + report.mlp_active) / 2)
    assert 0 < report.mlp_density < 0.2
    assert report.mlp_union_density == pytest.approx(report.mlp_density)  # alone
    assert report.head_density == 1 and report.fallback_share == 0
    assert not report.HasField("shadow")

    before = info_of(daemon).shadow_tokens
    checked = generate(daemon, tier, 24, shadow_every=1)
    assert list(checked.token_ids) == list(plain.token_ids)
    shadow = checked.finish.sparsity.shadow
    assert shadow.tokens == 23 and info_of(daemon).shadow_tokens == before + 23
    assert 0.7 < shadow.top1_agreement <= 1 and 0 < shadow.kl_nats < 0.2
    assert 0.5 < shadow.recall <= 1 and 0.2 < shadow.precision <= 1 and 0 < shadow.missed_mass < 0.2


def test_the_cli_reports_the_same(daemon):
    result = cli(daemon, "--max-new-tokens", "41", "--tier", "balanced", "--shadow-every", "4")
    assert result["tier"] == "balanced" and result["decode_tokens"] == 40
    assert 0 < result["mlp_density"] < 0.2 and result["head_density"] == 1 and result["fallback_share"] == 0
    assert result["shadow"]["tokens"] == 10
    assert 0.5 < result["shadow"]["top1_agreement"] <= 1 and 0 < result["shadow"]["missed_mass"] < 0.3
    quiet = cli(daemon, "--max-new-tokens", "41", "--tier", "balanced", "--shadow-every", "0", "--deterministic")
    assert quiet["shadow"] is None and quiet["token_ids"] == result["token_ids"]


def spoil(path, layers):
    """The shipped predictor with a random stage B in those layers."""
    data = bytearray((MODEL / "predictor.safetensors").read_bytes())
    header_bytes = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8:8 + header_bytes])
    for layer in layers:
        begin, end = header[f"layers.{layer}.neurons.b"]["data_offsets"]
        data[8 + header_bytes + begin:8 + header_bytes + end] = random.Random(layer).randbytes(end - begin)
    path.write_bytes(data)
    return path


def test_layers_with_a_spoiled_predictor_go_exact_in_a_running_server(start, api, tmp_path):
    layers = [2, 6]
    daemon = start("--predictor", spoil(tmp_path / "spoiled.safetensors", layers))
    first = generate(daemon, "balanced", 81, shadow_every=1).finish.sparsity
    assert 0 < first.fallback_share < 2 / 8
    info = info_of(daemon)
    assert [(layer.tier, layer.layer) for layer in info.exact_layers] == [(tier_of(api, "balanced"), i) for i in layers]
    assert info.fallbacks == 2 and info.recoveries == 0
    assert daemon.log().count("it runs exact until they pass") == 2

    after = generate(daemon, "balanced", 81, shadow_every=1).finish.sparsity
    assert after.fallback_share == pytest.approx(2 / 8)
    assert after.shadow.top1_agreement > 0.9 and after.shadow.kl_nats < first.shadow.kl_nats
    assert after.mlp_selected > 2 / 8
    assert generate(daemon, "high", 8).finish.sparsity.fallback_share == 0  # nobody has looked at that tier


def test_a_predictor_of_another_model_stops_the_start_with_the_reason(tmp_path):
    spoiled = tmp_path / "other.safetensors"
    data = (MODEL / "predictor.safetensors").read_bytes()
    spoiled.write_bytes(data.replace(b"sha256:", b"sha256;", 1))
    done = subprocess.run([BIN / "dejavud", "--model", MODEL, "--listen", "127.0.0.1:0", "--predictor", spoiled],
                          capture_output=True, timeout=PATIENCE_S)
    assert done.returncode != 0
    assert b"was calibrated for other weights" in done.stderr
