#!/usr/bin/env python3
"""The data of lm-evaluation-harness' task tests/testdata/lm-eval/next-word.yaml, with what Hugging Face Transformers makes of it.

    python3 tests/parity/make_lm_eval.py

Needs torch and transformers from PyPI; run by hand. Each line of next-word.jsonl has a prompt of the evaluation text, the word that
follows it there, and the text of the reference's most probable tokens, in float32. Prompts are left out where a runner-up is so close
that sums in another order may choose it.
"""
import json
import pathlib
import re

import torch
from transformers import AutoTokenizer, OPTForCausalLM

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = ROOT / "deploy/models/opt-8m-books"
WORDS, STRIDE, TOKENS = 24, 31, 8
CLOSE = 0.02  # in log-probability


def greedy(model, tokenizer, prompt):
    """The text, and how far its closest runner-up was."""
    ids, closest = tokenizer(prompt, return_tensors="pt").input_ids, float("inf")
    start = ids.shape[1]
    for _ in range(TOKENS):
        best = model(ids).logits[0, -1].log_softmax(-1).topk(2)
        closest = min(closest, float(best.values[0] - best.values[1]))
        ids = torch.cat([ids, best.indices[None, :1]], dim=1)
    return tokenizer.decode(ids[0, start:]), closest


@torch.no_grad()
def main():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = OPTForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    text = (ROOT / "tests/testdata/text/evaluation-excerpt.txt").read_text()
    words = list(re.finditer(r"\S+", text))
    with open(ROOT / "tests/testdata/lm-eval/next-word.jsonl", "w") as out:
        for i in range(0, len(words) - WORDS, STRIDE):
            prompt = text[words[i].start():words[i + WORDS - 1].end()]
            word = re.fullmatch(r"([A-Za-z]+)\W*", words[i + WORDS].group())
            if word is None or "\n" in prompt:
                continue
            reference, closest = greedy(model, tokenizer, prompt)
            if closest >= CLOSE and "\n" not in reference:
                out.write(json.dumps({"prompt": prompt, "word": word[1], "reference": reference}) + "\n")


if __name__ == "__main__":
    main()
