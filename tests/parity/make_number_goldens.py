#!/usr/bin/env python3
"""Golden vectors of checkpoints whose numbers go beyond float16, made with Hugging Face Transformers.

    python3 tests/parity/make_number_goldens.py tests/testdata/opt

Needs torch, transformers and safetensors from PyPI; run by hand. Writes OUT/large-key-bias with a golden.safetensors as
tests/engine/golden.h has it. Its logits are computed in float64 from the stored weights: a bias of the keys adds the same to
every score of a query, and in float32 the softmax would take it out again with what it has rounded away.
"""
import pathlib
import shutil
import sys

import torch
from safetensors.torch import save_file
from transformers import OPTConfig, OPTForCausalLM

SEED = 11


def make(out):
    torch.manual_seed(SEED)
    config = OPTConfig(hidden_size=32, num_attention_heads=2, ffn_dim=64, num_hidden_layers=2, vocab_size=128,
                       max_position_embeddings=32, word_embed_proj_dim=32, dropout=0.0, attention_dropout=0.0, init_std=0.3)
    model = OPTForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            if name.endswith("k_proj.bias"):
                parameter.add_(torch.where(torch.rand_like(parameter) < 0.5, -1e5, 1e5))
    model = model.to(torch.bfloat16)
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)

    model = model.double()
    golden, generator = {}, torch.Generator().manual_seed(SEED + 1)
    for k, length in enumerate((1, 7, 16)):
        prompt = torch.cat([torch.tensor([2]), torch.randint(4, config.vocab_size, (length - 1,), generator=generator)])
        with torch.no_grad():
            golden[f"logits.{k}"] = model(prompt[None]).logits[0].float()
            sequence, margins = prompt, []
            for _ in range(16):
                top = model(sequence[None]).logits[0, -1].topk(2)
                margins.append(float(top.values[0] - top.values[1]))
                sequence = torch.cat([sequence, top.indices[:1]])
        golden[f"prompt.{k}"] = prompt
        golden[f"greedy.{k}"] = sequence[length:].clone()
        golden[f"margin.{k}"] = torch.tensor(margins, dtype=torch.float32)
    save_file(golden, out / "golden.safetensors")


if __name__ == "__main__":
    make(pathlib.Path(sys.argv[1]) / "large-key-bias")
