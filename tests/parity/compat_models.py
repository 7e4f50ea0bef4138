"""Checkpoints and configs: what OPTForCausalLM computes from them, and where its generate() ends."""
import json
import math
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
    round5 = lambda values: [None if math.isnan(value) else round(value, 5) for value in values]
    return {
        "prompt": PROMPT,
        "logprobs": round5(given),
        "last": round5(logprobs[-1].tolist()),
        "greedy": greedy,
        # Those that can come, each once.
        "end_tokens": [end for end in dict.fromkeys(ends) if 0 <= end < model.config.vocab_size],
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

# The head.
tensors_case("head-only", "what safetensors.torch.save_model writes: the tied weight under the head's name",
             lambda t: renamed(t, lambda n: HEAD if n == EMBEDDING else n))
shards_case("head-same", "embedding and head, both in the file and equal", lambda t: {HEAD: t[EMBEDDING]})
shards_case("head-different", "a head of its own, though the config says tied", lambda t: {HEAD: another(t[EMBEDDING])})
shards_case("head-untied", "a head of its own", lambda t: {HEAD: another(t[EMBEDDING])}, config={"tie_word_embeddings": False})
shards_case("head-untied-same", "said to be untied, and equal", lambda t: {HEAD: t[EMBEDDING]}, config={"tie_word_embeddings": False})
shards_case("head-untied-350m", "a head of its own behind a projection", lambda t: {HEAD: another(t[EMBEDDING])}, base="opt-350m",
            config={"tie_word_embeddings": False})
shards_case("head-in-float32", "a head of another type than the rest", lambda t: {HEAD: another(t[EMBEDDING].float())})
shards_case("head-same-in-float32", "the same values in another type", lambda t: {HEAD: t[EMBEDDING].float()})
shards_case("head-under-model", "a head whose name begins with the base model's", lambda t: {"model." + HEAD: another(t[EMBEDDING])})
shards_case("head-not-in-index", "a head that lies in a shard, though the index does not name it", lambda t: {HEAD: another(t[EMBEDDING])},
            index=lambda d: d | {"weight_map": {k: v for k, v in d["weight_map"].items() if k != HEAD} | {"x": "model-2.safetensors"}})
config_case("head-untied-missing", "said to be untied, without a head", {"tie_word_embeddings": False},
            refused=["config.json", "tie_word_embeddings is false", "lm_head.weight", "missing"])
tensors_case("head-untied-no-embedding", "said to be untied, with a head alone", lambda t: renamed(t, lambda n: HEAD if n == EMBEDDING else n),
             config={"tie_word_embeddings": False}, refused=["embed_tokens.weight", "missing", "tie_word_embeddings is false"])
tensors_case("head-neither", "neither embedding nor head", lambda t: without(few(t), "embed_tokens.weight"), refused=["model.decoder.embed_tokens.weight", "missing"])
shards_case("head-bias", "a bias of the head, which OPT does not have", lambda t: {"lm_head.bias": torch.ones(64)})
shards_case("head-shape", "a head of another shape", lambda t: {HEAD: torch.ones(63, 16)}, refused=["model-2.safetensors", "lm_head.weight", "[63, 16]", "[64, 16]"])

# Names.
tensors_case("names-old", "names of exports before 4.19", lambda t: renamed(t, lambda n: n.removeprefix("model.")))
tensors_case("names-model-twice", "names that begin with the base model's twice", lambda t: renamed(t, lambda n: "model." + n))
tensors_case("names-mixed", "names of two forms in one file", lambda t: renamed(t, lambda n: n.removeprefix("model.") if "layers.1." in n else n))
shards_case("names-twice", "one tensor under an old name and under the new one", lambda t: {"decoder.final_layer_norm.bias": another(t[DECODER + "final_layer_norm.bias"])})
shards_case("names-twice-model", "one tensor under the new name and under that with the base model's twice",
            lambda t: {"model.model.decoder.final_layer_norm.bias": another(t[DECODER + "final_layer_norm.bias"])})
for prefix, who in (("module.", "DataParallel"), ("_orig_mod.", "torch.compile"), ("base_model.model.", "PEFT"), ("model.base_model.", "a wrapper")):
    tensors_case("names-of-" + prefix.strip("._").replace(".", "-").replace("_", "-"), f"names as {who} writes them", lambda t, p=prefix: renamed(few(t), lambda n: p + n),
                 refused=["model.safetensors", f"{prefix}model.decoder.embed_tokens.weight", f'"{prefix}"', "model.decoder.embed_tokens.weight"])
tensors_case("names-of-gpt2", "another model's weights", lambda t: renamed(few(t), lambda n: n.replace("model.decoder.layers", "transformer.h").replace("embed_tokens", "wte")),
             refused=["model.decoder.embed_tokens.weight", "missing"])

# What else lies in the files.
shards_case("surplus-buffers", "buffers, and heads of other tasks", lambda t: {
    DECODER + "position_ids": torch.arange(20)[None], DECODER + "embed_positions.inv_freq": torch.ones(4), "score.weight": torch.ones(2, 16),
    DECODER + "layers.0.self_attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool), DECODER + "version": torch.tensor([3.0])})
shards_case("surplus-projections", "projections that the config does not ask for", lambda t: {DECODER + "project_in.weight": torch.ones(16, 8)})
config_case("surplus-layers", "more layers than the config says", {"num_hidden_layers": 1},
            refused=["model.decoder.layers.1.fc1.weight", "num_hidden_layers = 1"], decision="num_hidden_layers")
config_case("surplus-biases", "biases that the config takes away", {"enable_bias": False})
config_case("surplus-norms", "weights of norms that the config takes away", {"layer_norm_elementwise_affine": False})
config_case("surplus-final-norm", "a last norm that the config removes", {"_remove_final_layer_norm": True})
config_case("post-norm", "norms behind, and a last norm in the file all the same", {"do_layer_norm_before": False})
tensors_case("no-biases", "neither biases nor a need for them", lambda t: {k: v for k, v in t.items() if not k.endswith("bias") or "norm" in k},
             config={"enable_bias": False})
tensors_case("no-norm-weights", "norms without weights", lambda t: {k: v for k, v in t.items() if "norm" not in k},
             config={"layer_norm_elementwise_affine": False})
for name, ending in (("bias", "layers.1.fc2.bias"), ("norm", "layers.0.self_attn_layer_norm.weight"), ("matrix", "layers.1.self_attn.q_proj.weight")):
    tensors_case("missing-" + name, "a tensor that is not there", lambda t, e=ending: without(t, e),
                 refused=[DECODER + ending, "missing"])
config_case("missing-layer", "fewer layers than the config says", {"num_hidden_layers": 3}, refused=["model.decoder.layers.2.self_attn_layer_norm.weight", "missing"])
for field, value, tensor, found, wanted in (("vocab_size", 65, "embed_tokens.weight", [64, 16], [65, 16]),
                                            ("max_position_embeddings", 22, "embed_positions.weight", [22, 16], [24, 16]),
                                            ("ffn_dim", 16, "layers.0.fc1.weight", [20, 16], [16, 16])):
    config_case("shape-" + field.replace("_", "-"), "a config that does not fit the file", {field: value}, refused=["model.safetensors", tensor, str(found), str(wanted)])
tensors_case("shape-transposed", "a matrix that lies the other way", lambda t: t | {DECODER + "layers.0.fc2.weight": t[DECODER + "layers.0.fc2.weight"].T},
             refused=["model.safetensors", "layers.0.fc2.weight", "[20, 16]", "[16, 20]"])

# Types.
NEW = torch.ones(16, 16).tril()


def type_case(name, about, dtype, *refused, decision=""):
    shards_case("type-" + name, about, lambda t: {DECODER + "layers.0.self_attn.out_proj.weight": (NEW * 2 if dtype.is_floating_point else NEW).to(dtype)},
                refused=("model-2.safetensors", "layers.0.self_attn.out_proj.weight", *refused) if refused else (), decision=decision)


type_case("bfloat16", "one tensor in bfloat16", torch.bfloat16)
type_case("float32", "one tensor in float32", torch.float32)
DECIDED = "float64"
type_case("float64", "one tensor in float64", torch.float64, "F64", decision=DECIDED)
type_case("int8", "one tensor in int8", torch.int8, "int8", decision=DECIDED)
type_case("uint8", "one tensor in uint8", torch.uint8, "U8", decision=DECIDED)
type_case("int64", "one tensor in int64", torch.int64, "I64", decision=DECIDED)
type_case("bool", "one tensor in bool", torch.bool, "BOOL", decision=DECIDED)
type_case("float8", "one tensor in float8", torch.float8_e4m3fn, "F8_E4M3", decision=DECIDED)
tensors_case("type-all-float64", "a checkpoint in float64", lambda t: {k: v.double() for k, v in few(t).items()},
             refused=["model.safetensors", "model.decoder.embed_tokens.weight", "F64"], decision=DECIDED)
shards_case("type-of-query", "a query projection of another type than keys and values", lambda t: {
    DECODER + f"layers.0.self_attn.q_proj.{n}": t[DECODER + f"layers.0.self_attn.q_proj.{n}"].float() for n in ("weight", "bias")})

# The index.
shards_case("index-names-too-much", "names in the index that no shard holds", lambda t: {"score.weight": torch.ones(1)},
            index=lambda d: d | {"weight_map": d["weight_map"] | {"model.decoder.position_ids": "model-2.safetensors", HEAD: "model-1.safetensors"}})
shards_case("index-names-too-little", "an index that names one tensor of each shard", lambda t: {"score.weight": torch.ones(1)},
            index=lambda d: d | {"weight_map": {EMBEDDING: "model-1.safetensors", "score.weight": "model-2.safetensors"}})
shards_case("index-swapped", "an index that takes the shards for each other", lambda t: {"score.weight": torch.ones(1)},
            index=lambda d: d | {"weight_map": {k: "model-2.safetensors" if v == "model-1.safetensors" else "model-1.safetensors" for k, v in d["weight_map"].items()}})
shards_case("index-two-of-a-name", "a tensor in two shards", lambda t: {DECODER + "final_layer_norm.bias": another(t[DECODER + "final_layer_norm.bias"])},
            index=lambda d: d | {"weight_map": d["weight_map"] | {DECODER + "final_layer_norm.bias": "model-1.safetensors", "x": "model-2.safetensors"}})
shards_case("index-two-of-a-name-first", "a tensor in two shards, the other way about", lambda t: {DECODER + "final_layer_norm.bias": another(t[DECODER + "final_layer_norm.bias"])})
shards_case("index-without-shard", "a shard that is not there", lambda t: {"score.weight": torch.ones(1)},
            index=lambda d: d | {"weight_map": d["weight_map"] | {"x": "model-3.safetensors"}}, refused=["model-3.safetensors", "No such file"])
shards_case("index-null", "an index without names", lambda t: {"score.weight": torch.ones(1)}, index=lambda d: d | {"weight_map": None},
            refused=["model.safetensors.index.json", "weight_map"])


def subfolder(directory):
    (directory / "part").mkdir()
    (directory / "model.safetensors").rename(directory / "part" / "model.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {EMBEDDING: "part/model.safetensors"}}))


case("index-subfolder", "shards in a folder of their own", subfolder, refused=["model.safetensors.index.json", "part/model.safetensors", "same directory"],
     decision="subfolder")


def nan_index(directory):
    shutil.copy(directory / "model.safetensors", directory / "model-1.safetensors")
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text('{"metadata": {"total_size": NaN}, "weight_map": {"' + EMBEDDING + '": "model-1.safetensors"}}')


case("index-nan", "an index with NaN", nan_index)


# PyTorch files.
def bin_case(name, about, change, config=(), legacy=False, **options):
    """One layer only, since an archive gives each tensor a few hundred bytes of its own."""

    def edit(directory):
        tensors = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        tensors = {k: v for k, v in tensors.items() if "layers.1." not in k}
        torch.save(change(tensors), directory / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        compat.change_json(directory / "config.json", {"num_hidden_layers": 1})
        if config:
            compat.change_json(directory / "config.json", config)

    case("bin-" + name, about, edit, **options)


bin_case("tied", "embedding and head as one storage", lambda t: t | {HEAD: t[EMBEDDING]})
bin_case("untied", "a head of its own", lambda t: t | {HEAD: another(t[EMBEDDING])}, config={"tie_word_embeddings": False})
bin_case("foreign", "buffers of other types", lambda t: t | {DECODER + "position_ids": torch.arange(20), "mask": torch.ones(2, dtype=torch.bool)})
bin_case("float64", "one tensor in float64", lambda t: t | {DECODER + "layers.0.fc1.weight": t[DECODER + "layers.0.fc1.weight"].double()},
         refused=["pytorch_model.bin", "layers.0.fc1.weight", "DoubleStorage"], decision=DECIDED)
bin_case("strided", "a matrix that is a view of its transpose", lambda t: t | {DECODER + "layers.0.fc1.weight": t[DECODER + "layers.0.fc1.weight"].T.contiguous().T},
         refused=["pytorch_model.bin", "layers.0.fc1.weight", "contiguous"], decision="contiguous")
bin_case("step", "weights beside a count of steps and a note", lambda t: t | {"step": 5, "note": "x", "nothing": None, "more": [1, 2]})
bin_case("parameters", "parameters in a plain dictionary", lambda t: {k: torch.nn.Parameter(v) for k, v in t.items()})
bin_case("nested", "a training checkpoint", lambda t: {"model": few(t), "epoch": 3}, refused=["pytorch_model.bin", '"model"', "state dictionary"])
bin_case("before-1-6", "the format of PyTorch before 1.6", lambda t: t, legacy=True, refused=["pytorch_model.bin", "before 1.6"], decision="1.6")

# Fields of config.json.
config_case("config-null-embed", "word_embed_proj_dim null", {"word_embed_proj_dim": None})
config_case("config-defaults", "fields left out that equal the defaults", {}, drop=["word_embed_proj_dim", "bos_token_id", "eos_token_id", "pad_token_id", "dropout",
                                                                                      "activation_function", "do_layer_norm_before", "enable_bias"],
            here={"end_tokens": [2]}, decision="left out")
config_case("config-dropouts", "dropouts, of which nothing is left outside of training", {"dropout": 0.5, "attention_dropout": 1, "activation_dropout": 0.5, "layerdrop": 0.9})
config_case("config-unknown", "fields that nobody knows", {"my_field": {"a": [1, None]}, "head_dim": 64, "hidden_act": "gelu", "num_labels": 3, "prefix": "</s>"})
config_case("config-architecture", "another task's architecture", {"architectures": ["OPTForSequenceClassification"]})
config_case("config-dtype", "another type in the config than in the file", {"dtype": "bfloat16", "torch_dtype": "float64"})
config_case("config-quantization-null", "quantization_config null", {"quantization_config": None})
config_case("config-generation", "settings of generate() that old configs hold", {"max_length": 5, "do_sample": True, "temperature": 3.0, "num_beams": 1})
for name, field, value, *more in (
        ("gelu", "activation_function", "gelu"), ("null-activation", "activation_function", None), ("upper-case-activation", "activation_function", "ReLU"),
        ("heads", "num_attention_heads", 3, "hidden_size is 16"), ("no-heads", "num_attention_heads", 0), ("text-size", "hidden_size", "16"), ("float-size", "hidden_size", 16.0),
        ("true-size", "num_hidden_layers", True), ("null-size", "ffn_dim", None), ("list-size", "vocab_size", [64]), ("text-dropout", "dropout", "0.1"),
        ("null-flag", "do_layer_norm_before", None), ("number-flag", "enable_bias", 1), ("text-flag", "tie_word_embeddings", "true"), ("null-tie", "tie_word_embeddings", None),
        ("null-type", "model_type", None), ("upper-case-type", "model_type", "OPT"), ("other-type", "model_type", "gpt2"), ("pad-beyond", "pad_token_id", 64),
        ("text-end", "eos_token_id", "2"), ("float-end", "eos_token_id", 2.0), ("nested-end", "eos_token_id", [[2]]), ("text-in-ends", "eos_token_id", [2, "3"]),
        ("list-begin", "bos_token_id", [2]), ("huge-end", "eos_token_id", 1 << 63), ("quantized", "quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("other-weights", "transformers_weights", "other.safetensors"), ("per-layer", "per_layer_config", {"0": {"ffn_dim": 8}})):
    config_case("config-" + name, f"{field} {json.dumps(value)}", {field: value}, refused=["config.json", *(more or [field])], decision=field)


def text_case(name, about, change, **options):
    def edit(directory):
        path = directory / "config.json"
        path.write_bytes(change(path.read_text()).encode())

    case("config-" + name, about, edit, **options)


text_case("nan", "NaN and infinities, as Python writes them", lambda t: t.replace("{", '{"layerdrop": NaN, "init_std": Infinity, "x": [-Infinity, "NaN"],', 1).replace('"layerdrop": 0.0,', "")
          .replace('"init_std": 0.3,', ""))
text_case("nan-size", "NaN where a size should be", lambda t: t.replace('"ffn_dim": 20', '"ffn_dim": NaN'), refused=["config.json", "ffn_dim is", "NaN"])
text_case("twice", "a field twice, of which Python takes the last", lambda t: t.replace("{", '{"ffn_dim": 7,', 1), refused=["config.json", '"ffn_dim" appears twice'], decision="twice")
text_case("byte-order-mark", "a byte order mark", lambda t: "\ufeff" + t, refused=["config.json", "byte order mark"])
text_case("exponent", "a number beyond all numbers, which Python reads as infinity", lambda t: t.replace("{", '{"x": 1e999,', 1), refused=["config.json", "JSON"],
          decision="1e999")
text_case("half-a-character", "half a surrogate, which Python reads", lambda t: t.replace("{", '{"x": "\\ud800",', 1), refused=["config.json", "JSON"],
          decision="surrogate")
config_case("config-no-layers", "a model without layers", {"num_hidden_layers": 0}, refused=["config.json", "num_hidden_layers is 0", "1 to 1024"], decision="num_hidden_layers` of 0")
config_case("config-encoder", "an encoder and a decoder", {"is_encoder_decoder": True}, refused=["config.json", "is_encoder_decoder is true"])
config_case("config-text-cache", "use_cache as a text", {"use_cache": "no"}, refused=["config.json", "use_cache is"])
tensors_case("type-nan", "a value that is not a number", lambda t: t | {EMBEDDING: t[EMBEDDING].index_fill(0, torch.tensor([63]), float("nan"))},
             refused=["model.safetensors", "embed_tokens.weight", "not finite"], decision="not finite")
text_case("comment", "a comment", lambda t: "// mine\n" + t, refused=["config.json", "JSON"])
text_case("comma", "a comma too much", lambda t: t.rstrip().rstrip("}") + ",}", refused=["config.json", "JSON"])
text_case("array", "a list", lambda t: f"[{t}]", refused=["config.json", "object"])
case("config-absent", "no config.json", lambda directory: (directory / "config.json").unlink(), refused=["config.json", "No such file"])

# End tokens. What the base says greedily: so that they are met.
with tempfile.TemporaryDirectory() as scratch:
    save(tiny(), pathlib.Path(scratch))
    GREEDY = reference(pathlib.Path(scratch))["greedy"]
THIRD, LATER = GREEDY[2], next(token for token in GREEDY[5:] if token not in GREEDY[:5])


def ends_case(name, about, config=None, generation=None, **options):
    def edit(directory):
        if config is not None:
            compat.change_json(directory / "config.json", config)
        if isinstance(generation, dict):
            compat.change_json(directory / "generation_config.json", generation)
        elif generation is not None:
            (directory / "generation_config.json").write_text(generation)

    case("end-" + name, about, edit, **options)


ends_case("int", "an end token that is met", {"eos_token_id": THIRD})
ends_case("list", "end tokens as a list", {"eos_token_id": [1, LATER, THIRD]})
ends_case("list-of-one", "a list of one", {"eos_token_id": [LATER]})
ends_case("empty-list", "an empty list", {"eos_token_id": []})
ends_case("null", "no end token", {"eos_token_id": None})
ends_case("minus-one", "-1, which never comes", {"eos_token_id": -1})
ends_case("minus-one-in-list", "-1 in a list", {"eos_token_id": [-1, THIRD]})
ends_case("beyond", "a token beyond the vocabulary, which never comes", {"eos_token_id": 64})
ends_case("repeated", "a list that names a token twice", {"eos_token_id": [THIRD, THIRD]})
ends_case("begin-null", "no begin token", {"bos_token_id": None})
ends_case("begin-minus-one", "a begin token -1", {"bos_token_id": -1})
ends_case("begin-beyond", "a begin token beyond the vocabulary", {"bos_token_id": 70})
ends_case("pad-null", "no padding token", {"pad_token_id": None})
ends_case("pad-minus-one", "a padding token -1", {"pad_token_id": -1})
ends_case("generation", "generation_config.json names another than config.json", {"eos_token_id": 2}, {"eos_token_id": THIRD})
ends_case("generation-list", "generation_config.json names several", None, {"eos_token_id": [2, LATER], "bos_token_id": 2, "pad_token_id": 1})
ends_case("generation-null", "generation_config.json says null", {"eos_token_id": THIRD}, {"eos_token_id": None, "bos_token_id": 2})
ends_case("generation-without", "generation_config.json names none", {"eos_token_id": THIRD}, {"bos_token_id": 2})
ends_case("generation-empty", "generation_config.json is empty", {"eos_token_id": THIRD}, {})
ends_case("generation-of-config", "generation_config.json that was made of config.json", {"eos_token_id": THIRD}, {"_from_model_config": True, "eos_token_id": 2})
ends_case("generation-minus-one", "generation_config.json says -1", {"eos_token_id": THIRD}, {"eos_token_id": -1})
ends_case("generation-beyond", "generation_config.json names a token beyond the vocabulary", {"eos_token_id": THIRD}, {"eos_token_id": [64, 50256]})
ends_case("generation-nan", "generation_config.json with NaN", None, '{"eos_token_id": %d, "temperature": NaN}' % THIRD)
ends_case("generation-sampling", "generation_config.json with settings of sampling", None,
          {"eos_token_id": THIRD, "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 5, "max_length": 9, "max_new_tokens": 3})
ends_case("generation-broken", "generation_config.json that is no JSON", {"eos_token_id": THIRD}, '{"eos_token_id": 2', refused=["generation_config.json", "JSON"],
          decision="generation_config.json")
for name, value in (("text", "2"), ("float", 2.0), ("true", True), ("nested", [[2]])):
    ends_case(f"generation-{name}", f"generation_config.json says {json.dumps(value)}", None, {"eos_token_id": value},
              refused=["generation_config.json", "eos_token_id is"], decision="eos_token_id")
for name, setting in (("penalty", {"repetition_penalty": 1.7}), ("suppress", {"suppress_tokens": [THIRD]}), ("forced-end", {"forced_eos_token_id": 5})):
    ends_case(f"generation-{name}", f"generation_config.json with {next(iter(setting))}", None, {"eos_token_id": 2} | setting)
