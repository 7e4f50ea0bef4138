"""One peer in a process of its own: loads a checkpoint and measures what it is asked for, until its input ends.

    peer.py prepare SYSTEM DTYPE CHECKPOINT WORK          converts the checkpoint, once
    peer.py serve SYSTEM DTYPE CHECKPOINT WORK THREADS    says version and notes, then answers a line with a line, as JSON

A peer has `generate(prompt, batch, tokens, on_step)`: that many greedy tokens for `batch` copies of a prompt. It calls
`on_step` when each of them has its next token, and stops early where that returns true. Imports stand where they are needed:
no process loads more than one peer.
"""
import itertools
import json
import os
import pathlib
import random
import statistics
import sys
import time
import warnings

warnings.filterwarnings("ignore")
WARM_STEPS = 2    # the first steps of a generation: new shapes are compiled in them
FEWEST_STEPS = 2  # besides those, however long they take


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

    def generate(self, prompt, batch, tokens, on_step):
        torch = self.torch

        def criterion(ids, scores, **_):
            return torch.full((batch,), on_step())

        ids = torch.tensor([prompt] * batch)
        with torch.inference_mode():
            self.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, min_new_tokens=tokens,
                                max_new_tokens=tokens, pad_token_id=1, stopping_criteria=[criterion])


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

    def generate(self, prompt, batch, tokens, on_step):
        rows, stop = 0, False

        def on_row(result):  # is told of each row of a step, and can end each row when it comes
            nonlocal rows, stop
            rows += 1
            if rows % batch == 0 and not stop:
                stop = on_step()
            return stop

        self.model.generate_batch([[f"t{i}" for i in prompt]] * batch, max_batch_size=batch, beam_size=1, sampling_topk=1,
                                  min_length=tokens, max_length=tokens, include_prompt_in_result=False, callback=on_row)


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


def times_ms(peer, prompt, batch, tokens, limit_s):
    """What each token of a generation took: the first one with the prompt, every other one a step. By a clock that never goes
    back, read when a peer says that a token is there. Ends after `tokens`, or soon after `limit_s`."""
    stamps = [time.perf_counter()]

    def on_step():
        stamps.append(time.perf_counter())
        steps = len(stamps) - 2
        return len(stamps) > tokens or (steps >= WARM_STEPS + FEWEST_STEPS and stamps[-1] - stamps[0] > limit_s)

    peer.generate(prompt, batch, tokens, on_step)
    ms = [1000 * (after - before) for before, after in itertools.pairwise(stamps)]
    if not ms or min(ms) <= 0:
        raise RuntimeError(f"it reports {len(ms)} tokens, in {', '.join(f'{each:g}' for each in ms)} ms")
    return ms


def decode(peer, prompt, batch, tokens, limit_s):
    first_ms, *steps_ms = times_ms(peer, prompt, batch, tokens, limit_s)
    if len(steps_ms) <= WARM_STEPS:
        raise RuntimeError(f"it stopped after {len(steps_ms) + 1} of {tokens} tokens")
    notes = [f"batch {batch}: {len(steps_ms) + 1} of {tokens} tokens in {limit_s:.0f} s"] if len(steps_ms) + 1 < tokens else []
    return {"ms": statistics.fmean(steps_ms[WARM_STEPS:]), "first_ms": first_ms, "samples_ms": steps_ms, "notes": notes}


def prefill(peer, prompt, repeats, limit_s):
    """After a warm-up, unless that alone has taken long."""
    warm_up, samples, notes = times_ms(peer, prompt, 1, 1, limit_s)[0], [], []
    if 1e-3 * warm_up >= limit_s:
        samples, notes = [warm_up], [f"prefill: {1e-3 * warm_up:.0f} s without a warm-up, once"]
    else:
        samples = [times_ms(peer, prompt, 1, 1, limit_s)[0] for _ in range(repeats)]
    return {"ms": statistics.median(samples), "samples_ms": samples, "notes": notes}


def answer(peer, request, vocabulary):
    generator = random.Random(1)
    prompt = [generator.randrange(4, vocabulary) for _ in range(request["prompt"])]
    if request["phase"] == "prefill":
        return prefill(peer, prompt, request["repeats"], request["limit_s"])
    return decode(peer, prompt, request["batch"], request["tokens"], request["limit_s"])


def serve(system, dtype, checkpoint, work, threads):
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    vocabulary = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    peer = SYSTEMS[system](dtype, checkpoint, work, threads)
    print(json.dumps({"version": peer.version, "notes": peer.notes}), file=out, flush=True)
    for line in sys.stdin:
        try:
            reply = answer(peer, json.loads(line), vocabulary)
        except Exception as error:  # whatever a library throws is an answer too
            reply = {"error": (str(error).strip() or type(error).__name__).splitlines()[-1]}
        print(json.dumps(reply), file=out, flush=True)


def main():
    action, system, dtype, checkpoint, work, *rest = sys.argv[1:]
    checkpoint, work = pathlib.Path(checkpoint), pathlib.Path(work)
    if action == "prepare":
        add_tokenizer(checkpoint)
        SYSTEMS[system].prepare(dtype, checkpoint, work)
    else:
        serve(system, dtype, checkpoint, work, int(rest[0]))


if __name__ == "__main__":
    main()
