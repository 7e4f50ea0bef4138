"""Checkpoints and configs: what OPTForCausalLM computes from them, and where its generate() ends."""
import json
import pathlib
import shutil
import tempfile

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM
from transformers.utils import logging

import compat

logging.set_verbosity_error()
logging.disable_progress_bar()

PROMPT = [2, 17, 5, 33, 48, 9, 60, 21]
NEW_TOKENS = 10
# Whatever generation_config.json says of sampling: here a request says that.
PLAIN = dict(do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0, min_new_tokens=0, suppress_tokens=None, bad_words_ids=None,
             forced_eos_token_id=None, sequence_bias=None)

SMALL = dict(vocab_size=64, hidden_size=16, num_attention_heads=2, ffn_dim=20, num_hidden_layers=2, max_position_embeddings=20,
             dropout=0.0, bos_token_id=2, eos_token_id=2, pad_token_id=1)


def tiny(**changes):
    """A model in float16 values whose attention is not uniform and whose greedy choices are no ties."""
    torch.manual_seed(19)
    model = OPTForCausalLM(OPTConfig(init_std=0.3, **(SMALL | changes))).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * (0.1 if "norm" in name else 0.2))
    return model.half()


def save(model, directory):
    model.config.dtype = torch.float16
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)


@compat.base
def opt(directory):
    save(tiny(), directory)


@compat.base
def opt_350m(directory):
    save(tiny(word_embed_proj_dim=8, do_layer_norm_before=False), directory)


def reference(directory):
    """In float32 from the stored weights. `last`: log-probabilities after the prompt. `generated`: up to an end token."""
    model, loading = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"random values for {len(missing)} missing tensors: {', '.join(missing[:2])}")
    model.eval()
    with torch.no_grad():
        ids, greedy = torch.tensor([PROMPT]), []
        logits = model(ids).logits[0]
        logprobs = logits.log_softmax(-1)
        given = [logprobs[i, PROMPT[i + 1]].item() for i in range(len(PROMPT) - 1)]
        for _ in range(NEW_TOKENS):
            best = model(torch.tensor([PROMPT + greedy])).logits[0, -1].topk(2)
            if best.values[0] - best.values[1] < 0.02:
                break  # too close to a tie
            greedy.append(best.indices[0].item())
        assert greedy, "a tie"
        settings, _ = model._prepare_generation_config(None)
        model._prepare_special_tokens(settings)
        ends = [] if settings._eos_token_tensor is None else settings._eos_token_tensor.flatten().tolist()
        generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(greedy), **PLAIN)[0, ids.shape[1]:]
    round5 = lambda values: [round(value, 5) for value in values]
    return {
        "prompt": PROMPT,
        "logprobs": round5(given),
        "last": round5(logprobs[-1].tolist()),
        "greedy": greedy,
        "end_tokens": [end for end in ends if 0 <= end < model.config.vocab_size],  # others never come
        "generated": generated.tolist(),
    }


def case(name, about, edit, base="opt", **options):
    compat.add(name, about, base, edit, {"model": reference}, **options)


def config_case(name, about, changes, drop=(), **options):
    case(name, about, lambda directory: compat.change_json(directory / "config.json", changes, drop), **options)


def tensors_case(name, about, change, base="opt", config=(), **options):
    """`change` takes and returns the tensors by name; what it returns is saved as one file."""

    def edit(directory):
        path = directory / "model.safetensors"
        save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path, metadata={"format": "pt"})
        if config:
            compat.change_json(directory / "config.json", config)

    case(name, about, edit, base, **options)


def shards_case(name, about, second, index=None, base="opt", config=(), **options):
    """The base's file as the first shard, a second one of what `second` makes of its tensors, and an index of both: what
    `index` makes of the right one."""

    def edit(directory):
        first = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").rename(directory / "model-1.safetensors")
        more = second(first)
        save_file({k: v.contiguous() for k, v in more.items()}, directory / "model-2.safetensors", metadata={"format": "pt"})
        first = [EMBEDDING] if index is None else first  # one name of a shard is enough, and takes less room
        names = {k: "model-1.safetensors" for k in first} | {k: "model-2.safetensors" for k in more}
        document = {"metadata": {"total_size": 1}, "weight_map": names}
        document = document if index is None else index(document)
        (directory / "model.safetensors.index.json").write_text(json.dumps(document))
        if config:
            compat.change_json(directory / "config.json", config)

    case(name, about, edit, base, **options)


DECODER = "model.decoder."
EMBEDDING, HEAD = DECODER + "embed_tokens.weight", "lm_head.weight"


def another(like, seed=9):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).mul(0.4).to(like.dtype)


def renamed(tensors, change):
    return {change(name): tensor for name, tensor in tensors.items()}


def few(tensors):
    """Of a file that is refused whatever else it holds."""
    return {name: tensor for name, tensor in tensors.items() if name.endswith(("embed_positions.weight", "layers.0.fc1.bias", "embed_tokens.weight"))}


def without(tensors, *endings):
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(endings)}
    assert len(kept) < len(tensors), endings
    return kept


case("plain", "the base as it is", lambda directory: None)
case("plain-350m", "the form of OPT-350m", lambda directory: None, base="opt-350m")
