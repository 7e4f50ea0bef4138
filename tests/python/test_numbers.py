"""Keys and values beyond the range of the cache's type, as a client and an operator hear of them."""
import json
import shutil
import struct

from conftest import PARITY, PATIENCE_S, metric

BFLOAT16_1E5 = 0x47C3
SATURATED = 3  # of each position
WARNING = "beyond the range of kv.dtype"


def with_large_values(out):
    """A checkpoint with three values of a layer beyond float16, wherever they stand."""
    shutil.copytree(PARITY / "pre-norm-hd128-sharded", out)
    name = "model.decoder.layers.1.self_attn.v_proj.bias"
    path = out / json.loads((out / "model.safetensors.index.json").read_text())["weight_map"][name]
    stored = bytearray(path.read_bytes())
    header_bytes = struct.unpack_from("<Q", stored)[0]
    tensor = json.loads(stored[8:8 + header_bytes])[name]
    assert tensor["dtype"] == "BF16"
    for element in (3, 100, 255):
        struct.pack_into("<H", stored, 8 + header_bytes + tensor["data_offsets"][0] + 2 * element, BFLOAT16_1E5)
    path.write_bytes(stored)
    return out


def answers(daemon, api):
    """What a completion and a score of five tokens say."""
    ids = [2, 10, 11, 12, 13]
    finish = daemon.stub.Generate(daemon.request(ids, 4), timeout=PATIENCE_S).finish
    score = daemon.stub.Score(api.pb.ScoreRequest(token_ids=api.pb.TokenIds(ids=ids)), timeout=PATIENCE_S)
    return finish.saturated_kv_values, score.saturated_kv_values


def test_what_float16_cannot_hold_is_named_counted_and_warned_of_once(start, api, tmp_path):
    daemon = start(model=with_large_values(tmp_path / "model"))
    for _ in range(2):
        assert answers(daemon, api) == (SATURATED * (5 + 3), SATURATED * 5)  # nobody computes those of the last token
    assert metric(daemon, "dejavu_kv_saturated_values_total") == 2 * SATURATED * (8 + 5)
    assert sum(WARNING in line for line in daemon.log().splitlines()) == 1, daemon.log()


def test_float32_holds_them(start, api, tmp_path):
    daemon = start("--kv-dtype", "fp32", model=with_large_values(tmp_path / "model"))
    assert answers(daemon, api) == (0, 0)
    assert metric(daemon, "dejavu_kv_saturated_values_total") == 0
    assert WARNING not in daemon.log()
