#!/usr/bin/env python3
"""A decode step of Transformers' OPT on this machine's GPU, in bf16 with random weights: eager, and with a static cache
recorded as a CUDA graph. Needs torch and transformers, which nobody installs for it; nothing is downloaded. Writes one
JSON object. Exits with 3, and a line that says why, where the two are not there or torch sees no GPU."""
import argparse
import json
import pathlib
import sys
import warnings

ABSENT = 3
WARM_UP, STEPS = 5, 40


class Peer:
    def __init__(self, torch, transformers, options):
        self.torch, self.transformers, self.options = torch, transformers, options
        self.config = transformers.OPTConfig(
            hidden_size=options.hidden, word_embed_proj_dim=options.hidden, ffn_dim=4 * options.hidden,
            num_hidden_layers=options.layers, num_attention_heads=options.hidden // options.head_dim,
            vocab_size=options.vocabulary, max_position_embeddings=2048, dropout=0.0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(options.device):
            self.model = transformers.OPTForCausalLM(self.config).eval()

    def prompt(self, batch):
        return self.torch.randint(4, self.options.vocabulary, (batch, self.options.context),
                                  device=self.options.device)

    def step(self, tokens, cache, **more):
        """The next tokens, which take the place of `tokens` [batch, 1]."""
        logits = self.model(tokens, past_key_values=cache, use_cache=True, **more).logits
        tokens.copy_(logits[:, -1:].argmax(-1))

    def ms(self, step):
        """Of a step, by the GPU's clock."""
        cuda = self.torch.cuda
        for _ in range(WARM_UP):
            step()
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record()
        for _ in range(STEPS):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / STEPS

    def eager(self, batch, measure):
        prompt = self.prompt(batch)
        cache = self.model(prompt, use_cache=True, logits_to_keep=1).past_key_values
        tokens = prompt[:, -1:].clone()
        return measure(lambda: self.step(tokens, cache))

    def recorded(self, batch, record, measure):
        """A static cache moves on with every replay and needs room for it. The mask and the position stay those of the
        first step: what they cost is the same."""
        torch, context = self.torch, self.options.context
        length = context + 2 * WARM_UP + STEPS
        cache = self.transformers.StaticCache(config=self.config, max_cache_len=length, max_batch_size=batch,
                                              device=self.options.device, dtype=torch.bfloat16)
        prompt = self.prompt(batch)
        self.model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens = prompt[:, -1:].clone()
        mask = (torch.arange(length, device=self.options.device) <= context).expand(batch, 1, 1, length)
        positions = torch.full((batch, 1), context, device=self.options.device)
        step = record(lambda: self.step(tokens, cache, attention_mask=mask, position_ids=positions))
        return measure(step)

    def record(self, step):
        cuda = self.torch.cuda
        aside = cuda.Stream()
        aside.wait_stream(cuda.current_stream())
        with cuda.stream(aside):  # what is made at first must not be recorded
            for _ in range(WARM_UP - 1):
                step()
        cuda.current_stream().wait_stream(aside)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            step()
        return graph.replay


def main():
    parser = argparse.ArgumentParser(prog="peer", description=__doc__)
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=50272)
    parser.add_argument("--batch", default="1,4,16")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--json", type=pathlib.Path, required=True)
    options = parser.parse_args()
    options.device = "cuda"
    warnings.filterwarnings("ignore")
    try:
        import torch
        import transformers
    except ImportError as error:
        print(f"peer: Transformers is left out: {sys.executable} has not what it needs ({error})")
        return ABSENT
    if not torch.cuda.is_available():
        print(f"peer: Transformers is left out: torch {torch.__version__} sees no GPU")
        return ABSENT

    rows = []
    with torch.no_grad():
        peer = Peer(torch, transformers, options)
        for batch in map(int, options.batch.split(",")):
            row = {"batch": batch, "context": options.context}
            row["eager_ms"] = peer.eager(batch, peer.ms)
            row["recorded_ms"] = peer.recorded(batch, peer.record, peer.ms)
            rows.append(row)
            print(f"batch {batch}: {row['eager_ms']:.2f} ms eager, {row['recorded_ms']:.2f} ms recorded", flush=True)
    options.json.write_text(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__,
                                        "hidden": options.hidden, "layers": options.layers, "rows": rows}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
