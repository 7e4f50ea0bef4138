"""lm-evaluation-harness of PyPI through the gateway: its score is that of Transformers. Run by ./run protocols."""
import json
import os
import pathlib
import re
import subprocess
import sys

import yaml

from conftest import PATIENCE_S, ROOT
from stock_gateway import gateway, model  # noqa: F401: fixtures

TASK = ROOT / "tests/testdata/lm-eval/next-word.yaml"
DATA = TASK.with_suffix(".jsonl")


def evaluate(gateway, model, folder):
    """The score, and the documents with what was answered."""
    (folder / "next-word.yaml").write_text(TASK.read_text().replace("NEXT_WORD_DATA", str(DATA)))
    arguments = f"model={model},base_url={gateway.url}/v1/completions,num_concurrent=4,tokenizer_backend=None,tokenized_requests=False"
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        [pathlib.Path(sys.executable).parent / "lm_eval", "--model", "local-completions", "--model_args", arguments, "--tasks", "dejavu_next_word",
         "--include_path", folder, "--output_path", folder / "out", "--log_samples", "--batch_size", "1"],
        env={**os.environ, **offline}, capture_output=True, text=True, timeout=4 * PATIENCE_S)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (results,) = (folder / "out").rglob("results_*.json")
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    score = json.loads(results.read_text())["results"]["dejavu_next_word"]["exact_match,first-word"]
    return score, [json.loads(line) for line in samples.read_text().splitlines()]


def test_a_task_has_the_score_that_transformers_has(gateway, model, tmp_path):  # noqa: F811
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    pattern = yaml.safe_load(TASK.read_text())["filter_list"][0]["filter"][0]["regex_pattern"]
    right = [bool(found := re.search(pattern, row["reference"])) and found[1] == row["word"] for row in rows]
    assert 0 < sum(right) < len(rows)
    score, samples = evaluate(gateway, model, tmp_path)
    assert [sample["resps"][0][0] for sample in sorted(samples, key=lambda sample: sample["doc_id"])] == [row["reference"] for row in rows]
    assert score == sum(right) / len(rows)
