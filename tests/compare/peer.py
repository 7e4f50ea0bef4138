"""One peer in a process of its own: loads a checkpoint, decodes and prefills, writes what it measured as one JSON object.

    peer.py prepare SYSTEM DTYPE CHECKPOINT WORK      converts the checkpoint, once
    peer.py measure SYSTEM DTYPE CHECKPOINT WORK JSON-OF-SETTINGS

A peer has `generate(prompt, batch, tokens)`: that many greedy tokens for `batch` copies of a prompt. Imports stand where
they are needed: no process loads more than one peer.
"""
import json
import pathlib
import random
import sys
import time
import warnings

warnings.filterwarnings("ignore")


class Transformers:
    def __init__(self, dtype, checkpoint, work, threads):
        import torch
        import transformers
        torch.set_num_threads(threads)
        self.torch, self.version = torch, f"{transformers.__version__} (torch {torch.__version__})"
        types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=types[dtype], attn_implementation="sdpa").eval()
        self.notes = [f"instruction set {torch.backends.cpu.get_cpu_capability()}"]

    @staticmethod
    def prepare(dtype, checkpoint, work):
        pass

    def generate(self, prompt, batch, tokens):
        ids = self.torch.tensor([prompt] * batch)
        with self.torch.inference_mode():
            out = self.model.generate(ids, attention_mask=self.torch.ones_like(ids), do_sample=False, num_beams=1,
                                      min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=1)
        assert out.shape == (batch, len(prompt) + tokens), out.shape


class OpenVino(Transformers):
    """Through optimum-intel. int8: weights only, symmetric, as ours."""

    def __init__(self, dtype, checkpoint, work, threads):
        import openvino
        import torch
        from optimum.intel import OVModelForCausalLM
        self.torch, self.version = torch, openvino.__version__.split("-")[0]
        config = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1,
                  "ENABLE_CPU_PINNING": True}
        able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if dtype == "bf16" and "BF16" in able:
            config["INFERENCE_PRECISION_HINT"] = "bf16"
        self.model = OVModelForCausalLM.from_pretrained(work / f"openvino-{dtype}", ov_config=config)
        compiled = self.model.request.get_compiled_model()
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        self.notes = [f"computes in {precision}; the processor offers {', '.join(able)}"]

    @staticmethod
    def prepare(dtype, checkpoint, work):
        import torch
        from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
        target = work / f"openvino-{dtype}"
        quantization = OVWeightQuantizationConfig(bits=8, sym=True) if dtype == "int8" else None
        model = OVModelForCausalLM.from_pretrained(checkpoint, export=True, compile=False, torch_dtype=torch.bfloat16,
                                                   load_in_8bit=False if quantization is None else None,
                                                   quantization_config=quantization)
        model.save_pretrained(target)


class CTranslate2:
    def __init__(self, dtype, checkpoint, work, threads):
        import ctranslate2
        self.version, self.notes = ctranslate2.__version__, []
        self.model = ctranslate2.Generator(str(work / f"ctranslate2-{dtype}"), device="cpu", compute_type=self.name(dtype),
                                           inter_threads=1, intra_threads=threads)

    @staticmethod
    def name(dtype):
        return {"bf16": "bfloat16", "fp32": "float32"}.get(dtype, dtype)

    @staticmethod
    def prepare(dtype, checkpoint, work):
        import ctranslate2
        if CTranslate2.name(dtype) not in ctranslate2.get_supported_compute_types("cpu"):
            raise SystemExit(f"CTranslate2 has no {dtype} on this processor")
        target = str(work / f"ctranslate2-{dtype}")
        ctranslate2.converters.TransformersConverter(str(checkpoint)).convert(target, quantization=CTranslate2.name(dtype), force=True)

    def generate(self, prompt, batch, tokens):
        results = self.model.generate_batch([[f"t{i}" for i in prompt]] * batch, max_batch_size=batch, sampling_topk=1,
                                            min_length=tokens, max_length=tokens, include_prompt_in_result=False)
        assert [len(r.sequences_ids[0]) for r in results] == [tokens] * batch


SYSTEMS = {"transformers": Transformers, "openvino": OpenVino, "ctranslate2": CTranslate2}


def add_tokenizer(checkpoint):
    """Token i is the word "ti": CTranslate2 takes no model without a tokenizer, and random weights have none."""
    if (checkpoint / "tokenizer.json").exists():
        return
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    vocabulary = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t3"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="t2", eos_token="t2", pad_token="t1",
                            unk_token="t3").save_pretrained(checkpoint)


def timed(call):
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def measure(peer, settings):
    """Milliseconds per decode step by batch, less the prefill of the same prompt; milliseconds of a long prefill.

    What would take longer than `sample_s` is measured over fewer tokens, or once, and a note says so.
    """
    limit_ms, notes = 1000 * settings["sample_s"], list(peer.notes)
    random.seed(1)
    ids = [random.randrange(4, settings["vocabulary"]) for _ in range(max(settings["prompt"], settings["prefill"]))]
    prompt, tokens = ids[:settings["prompt"]], settings["tokens"]
    decode, prefill = {}, []
    peer.generate(prompt, 1, 4)
    for batch in settings["batches"]:
        def step_ms(tokens):
            first = timed(lambda: peer.generate(prompt, batch, 1))
            return (timed(lambda: peer.generate(prompt, batch, tokens)) - first) / (tokens - 1), first

        warm_up, first = step_ms(2)
        count = min(tokens, max(6, round((limit_ms - first) / max(warm_up, 1e-3))))
        repeats = settings["repeats"] if first < limit_ms else 1
        if count < tokens or repeats < settings["repeats"]:
            notes.append(f"batch {batch}: a step takes about {warm_up / 1000:.1f} s, so {repeats} x {count} tokens")
        decode[batch] = [step_ms(count)[0] for _ in range(repeats)]
    if settings["prefill"]:
        prefill.append(timed(lambda: peer.generate(ids[:settings["prefill"]], 1, 1)))
        if prefill[0] < limit_ms:
            prefill = [timed(lambda: peer.generate(ids[:settings["prefill"]], 1, 1)) for _ in range(settings["repeats"])]
        else:
            notes.append(f"prefill: {prefill[0] / 1000:.0f} s without a warm-up, once")
    return {"version": peer.version, "notes": notes, "decode": decode, "prefill": prefill}


def main():
    action, system, dtype, checkpoint, work, *rest = sys.argv[1:]
    checkpoint, work = pathlib.Path(checkpoint), pathlib.Path(work)
    if action == "prepare":
        add_tokenizer(checkpoint)
        SYSTEMS[system].prepare(dtype, checkpoint, work)
    else:
        settings = json.loads(rest[0])
        print(json.dumps(measure(SYSTEMS[system](dtype, checkpoint, work, settings["threads"]), settings)))


if __name__ == "__main__":
    main()
