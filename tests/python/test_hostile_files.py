"""Bad files, groups 11 and 12: checkpoints, tokenizers, predictors and configurations. Each is a start that must fail with exit code
1 and the name of the file, soon, and without a signal."""
import concurrent.futures
import json
import random
import struct
import subprocess

from conftest import BIN, MODEL, PARITY, PATIENCE_S

TINY = PARITY / "pre-norm-hd64"  # config.json and model.safetensors, no tokenizer
SERVES_S = 60  # after so long it is no failure to start any more


def start(*flags):
    """Exit code and what was said. What a good file would do, serve, is cut off after a while."""
    try:
        done = subprocess.run([BIN / "dejavud", "--listen", "127.0.0.1:0", "--metrics-listen", "", "--device", "cpu", *map(str, flags)],
                              capture_output=True, timeout=SERVES_S)
        return done.returncode, done.stderr.decode(errors="replace")
    except subprocess.TimeoutExpired:
        return "it serves", ""


def refuse(number, cases, at_least):
    """cases: name to (flags, code, words that are said)."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # most of it is the start of processes
        results = dict(zip(cases, pool.map(lambda case: start(*case[0]), cases.values())))
    wrong = [f"{name}: {results[name][0]}, not {code} '{words}': {results[name][1][-300:]}"
             for name, (_, code, words) in cases.items() if results[name][0] != code or words not in results[name][1]]
    print(f"group {number}: {len(cases)} inputs")
    assert not wrong, "\n".join(wrong)
    assert len(cases) >= at_least


def folder_with(at, model, **files):
    """The model's files, some of them exchanged: bytes, or None for none. `__` in a name stands for a dot."""
    at.mkdir(parents=True)
    files = {name.replace("__", "."): content for name, content in files.items()}
    for path in model.iterdir():
        if path.name not in files:
            (at / path.name).symlink_to(path)
    for name, content in files.items():
        if content is not None:
            (at / name).write_bytes(content)
    return at


class Tensors:
    """A safetensors file in parts."""

    def __init__(self, path):
        whole = path.read_bytes()
        length = struct.unpack("<Q", whole[:8])[0]
        self.header, self.data = json.loads(whole[8:8 + length]), whole[8 + length:]

    def with_header(self, change):
        header = json.loads(json.dumps(self.header))
        changed = change(header)
        return self.pack(header if changed is None else changed)

    def pack(self, header, length=None, data=None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + (self.data if data is None else data)


def broken_tensors(file, name):
    """Files of that kind, each broken in one way, and a word of what is said. `name`: a tensor in it."""
    whole, tensors = file.read_bytes(), Tensors(file)
    set_ = lambda **fields: tensors.with_header(lambda header: header[name].update(fields))  # noqa: E731
    begin, end = tensors.header[name]["data_offsets"]
    text = json.dumps(tensors.header).encode()
    found = {
        "empty": b"", "of 7 bytes": whole[:7], "of 8 bytes": whole[:8], "header cut off": whole[:100], "data missing": whole[:8 + len(text)],
        "the last byte missing": whole[:-1],
        **{f"header of {n:#x} bytes": struct.pack("<Q", n) + whole[8:] for n in (0, 1, 1 << 31, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1, len(whole), len(whole) - 7)},
        "no JSON": tensors.pack(b"{" * 1000), "JSON 100,000 deep": tensors.pack(b'{"a":' + b"[" * 100_000), "a list": tensors.pack(b"[]"), "a number": tensors.pack(b"7"),
        "not UTF-8": tensors.pack(text.replace(b"weight", b"w\xffight", 1)), "NUL": tensors.pack(text.replace(b"weight", b"we\0ght", 1)),
        "an entry that is none": tensors.pack({**tensors.header, name: 5}), "an empty entry": tensors.pack({**tensors.header, name: {}}),
        "nothing in it": tensors.pack({}), "a tensor twice": tensors.pack(text[:-1] + b"," + json.dumps({name: tensors.header[name]}).encode()[1:]),
        "a dtype that there is not": set_(dtype="F128"), "a dtype of another size": set_(dtype="F64"), "a dtype that is a number": set_(dtype=16), "no dtype": set_(dtype=None),
        "a shape of another size": set_(shape=[1, 2, 3]), "a shape of nothing": set_(shape=[]), "a shape below zero": set_(shape=[-1, 4]),
        "a shape beyond all": set_(shape=[1 << 32, 1 << 32]), "a product of 2^64": set_(shape=[1 << 32, 1 << 31, 2]), "a shape of 0": set_(shape=[0, 0]),
        "a shape of a fraction": set_(shape=[1.5, 2]), "a shape of text": set_(shape="64"), "a hundred dimensions": set_(shape=[1] * 100), "no shape": set_(shape=None),
        "offsets beyond the file": set_(data_offsets=[begin, len(whole) * 2]), "offsets of 2^63": set_(data_offsets=[1 << 63, (1 << 63) + end - begin]),
        "offsets the other way": set_(data_offsets=[end, begin]), "offsets below zero": set_(data_offsets=[-8, end - begin - 8]), "one offset": set_(data_offsets=[begin]),
        "three offsets": set_(data_offsets=[begin, end, end]), "offsets of text": set_(data_offsets=["0", "8"]), "no offsets": set_(data_offsets=None),
        "another's data": set_(data_offsets=[begin + 2, end + 2]),
        "a tensor missing": tensors.with_header(lambda header: {key: value for key, value in header.items() if key != name}),
        "another name": tensors.with_header(lambda header: {("another" if key == name else key): value for key, value in header.items()}),
        "noise": random.Random(1).randbytes(5000), "HTML": b"<!DOCTYPE html>" + b" " * 2000, "a zip": b"PK\3\4" + b"\0" * 2000,
        "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 2206960\n",
    }
    return found


def test_group_11_weights(tmp_path):
    cases = {}
    weights = "model.decoder.layers.0.fc1.weight"
    assert weights in Tensors(TINY / "model.safetensors").header
    for n, (name, content) in enumerate(broken_tensors(TINY / "model.safetensors", weights).items()):
        cases[f"weights {name}"] = (["--model", folder_with(tmp_path / f"w{n}", TINY, model__safetensors=content)], 1, "model.safetensors")
    config = json.loads((TINY / "config.json").read_text())
    changes = {
        **{f"{key} of {value!r}"[:60]: {key: value} for key, value in (
            ("hidden_size", 0), ("hidden_size", -1), ("hidden_size", 1 << 40), ("hidden_size", 65), ("hidden_size", "128"), ("hidden_size", 1.5), ("hidden_size", None),
            ("num_attention_heads", 0), ("num_attention_heads", 7), ("num_attention_heads", 1 << 31), ("num_hidden_layers", 0), ("num_hidden_layers", -3),
            ("num_hidden_layers", 1 << 30), ("num_hidden_layers", 99), ("vocab_size", 0), ("vocab_size", 1 << 33), ("vocab_size", 7), ("ffn_dim", 0), ("ffn_dim", 10 ** 30),
            ("max_position_embeddings", 0), ("max_position_embeddings", 1 << 31), ("max_position_embeddings", 5), ("word_embed_proj_dim", 3), ("activation_function", "gelu"),
            ("model_type", "llama"), ("model_type", None), ("do_layer_norm_before", "yes"))},
    }
    files = {name: json.dumps({**config, **change}).encode() for name, change in changes.items()}
    files |= {"empty": b"", "no JSON": b"{", "a list": b"[]", "nothing in it": b"{}", "deep": b'{"a":' * 100_000, "not UTF-8": b'{"model_type": "\xff"}',
              "noise": random.Random(2).randbytes(500), "two megabytes of spaces": b" " * 2_000_000 + b"x"}
    for n, (name, content) in enumerate(files.items()):
        cases[f"config.json {name}"] = (["--model", folder_with(tmp_path / f"c{n}", TINY, config__json=content)], 1, str(tmp_path / f"c{n}"))
    index = lambda content: dict(model__safetensors=None, model__safetensors__index__json=content)  # noqa: E731
    shard = PARITY / "pre-norm-hd128-sharded"
    good = json.loads((shard / "model.safetensors.index.json").read_text())
    one = next(iter(good["weight_map"]))
    for n, (name, content) in enumerate({
            "empty": b"", "no map": b"{}", "a map that is a list": b'{"weight_map": []}', "no names": b'{"weight_map": {"a": 5}}',
            "a path upward": json.dumps({"weight_map": {**good["weight_map"], one: "../model.safetensors"}}).encode(),
            "a path from the root": json.dumps({"weight_map": {**good["weight_map"], one: "/etc/passwd"}}).encode(),
            "a shard that there is not": json.dumps({"weight_map": {**good["weight_map"], one: "model-00009-of-00005.safetensors"}}).encode(),
            "NUL in a name": json.dumps({"weight_map": {**good["weight_map"], one: "a\0b"}}).encode()}.items()):
        cases[f"index {name}"] = (["--model", folder_with(tmp_path / f"i{n}", shard, **index(content))], 1, str(tmp_path / f"i{n}"))
    bin_folder = PARITY / "pre-norm-hd80"
    whole = (bin_folder / "pytorch_model.bin").read_bytes()
    for n, (name, content) in enumerate({
            "empty": b"", "cut in the middle": whole[:len(whole) // 2], "the directory cut off": whole[:-30], "no zip": b"x" * 1000, "a pickle alone": b"\x80\x02}q\0.",
            "a pickle that calls": whole.replace(b"torch._utils\n_rebuild_tensor_v2", b"os\nsystem".ljust(len(b"torch._utils\n_rebuild_tensor_v2"), b"m"), 1),
            "the pickle cut off": whole.replace(b"ctorch", b".torch", 1), "noise in it": whole[:200] + random.Random(3).randbytes(300) + whole[500:]}.items()):
        cases[f"torch archive {name}"] = (["--model", folder_with(tmp_path / f"b{n}", bin_folder, pytorch_model__bin=content)], 1, "pytorch_model.bin")
    cases["no weights"] = (["--model", folder_with(tmp_path / "none", TINY, model__safetensors=None)], 1, str(tmp_path / "none"))
    cases["no config"] = (["--model", folder_with(tmp_path / "noconfig", TINY, config__json=None)], 1, "config.json")
    cases["a folder that is a file"] = (["--model", TINY / "config.json"], 1, "config.json")
    for name in ("synthetic:opt-99b", "synthetic:", "synthetic:opt-tiny?seed=x", "synthetic:opt-tiny?recall=nan", "synthetic:opt-tiny?x=1", "synthetic:opt-tiny?seed"):
        cases[f"model {name}"] = (["--model", name], 1, name.split("?")[0])
    refuse(11, cases, at_least=95)


def test_group_11_tokenizers_and_predictors(tmp_path):
    cases = {}
    light = tmp_path / "light"
    light.mkdir()
    for path in MODEL.iterdir():
        (light / path.name).symlink_to(path)
    tokenizer = json.loads((MODEL / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    change = lambda **fields: json.dumps({**tokenizer, "model": {**tokenizer["model"], **fields}}).encode()  # noqa: E731
    first, second = list(vocabulary)[10:12]
    for n, (name, content) in enumerate({
            "empty": b"", "no JSON": b"{", "a list": b"[]", "nothing": b"{}", "no model": json.dumps({**tokenizer, "model": None}).encode(),
            "another model": change(type="Unigram"), "no vocabulary": change(vocab={}), "a vocabulary that is a list": change(vocab=[]),
            "ids below zero": change(vocab={**vocabulary, first: -1}), "ids of 2^40": change(vocab={**vocabulary, first: 1 << 40}), "ids of text": change(vocab={**vocabulary, first: "5"}),
            "an id twice": change(vocab={**vocabulary, first: vocabulary[second]}), "a fraction": change(vocab={**vocabulary, first: 1.5}),
            "merges that are none": change(merges=5), "a merge of one": change(merges=["a"]), "a merge of what there is not": change(merges=["zzzzq qzzzz"]),
            "a merge of numbers": change(merges=[[1, 2]]), "cut off": json.dumps(tokenizer).encode()[:300_000], "not UTF-8": b'{"model": "\xff\xfe"}',
            "deep": b'{"model":' * 100_000}.items()):
        files = dict(tokenizer__json=content, vocab__json=None, merges__txt=None)
        cases[f"tokenizer.json {name}"] = (["--model", folder_with(tmp_path / f"t{n}", light, **files)], 1, "tokenizer.json")
    merges = (MODEL / "merges.txt").read_bytes()
    for n, (file, name, content) in enumerate((
            ("vocab.json", "empty", b""), ("vocab.json", "no JSON", b"{"), ("vocab.json", "a list", b"[]"), ("vocab.json", "nothing", b"{}"),
            ("vocab.json", "ids below zero", json.dumps({**vocabulary, first: -1}).encode()), ("vocab.json", "ids of 2^40", json.dumps({**vocabulary, first: 1 << 40}).encode()),
            ("vocab.json", "an id twice", json.dumps({**vocabulary, first: vocabulary[second]}).encode()), ("vocab.json", "cut off", json.dumps(vocabulary).encode()[:50_000]),
            ("merges.txt", "a merge of one", merges + b"one\n"), ("merges.txt", "a merge of three", merges + b"a b c\n"),
            ("merges.txt", "a merge of what there is not", merges + b"zzzzq qzzzz\n"), ("merges.txt", "not UTF-8", merges + b"\xff \xfe\n"),
            ("merges.txt", "NUL", merges + b"a\0 b\n"))):
        cases[f"{file} {name}"] = (["--model", folder_with(tmp_path / f"v{n}", light, tokenizer__json=None, **{file.replace(".", "__"): content})], 1, str(tmp_path / f"v{n}"))
    predictor = MODEL / "predictor.safetensors"
    tensor = next(key for key in Tensors(predictor).header if key != "__metadata__")
    for n, (name, content) in enumerate(broken_tensors(predictor, tensor).items()):
        (tmp_path / f"p{n}.safetensors").write_bytes(content)
        cases[f"predictor {name}"] = (["--model", light, "--predictor", tmp_path / f"p{n}.safetensors"], 1, f"p{n}.safetensors")
    for n, (name, change_) in enumerate({
            "no metadata": lambda header: {key: value for key, value in header.items() if key != "__metadata__"}, "empty metadata": lambda header: header.update(__metadata__={}),
            **{f"metadata without {key}": lambda header, key=key: header["__metadata__"].pop(key) and None for key in list(Tensors(predictor).header["__metadata__"])},
    }.items()):
        (tmp_path / f"m{n}.safetensors").write_bytes(Tensors(predictor).with_header(change_))
        cases[f"predictor {name}"] = (["--model", light, "--predictor", tmp_path / f"m{n}.safetensors"], 1, f"m{n}.safetensors")
    cases["predictor of other weights"] = (["--model", TINY, "--predictor", predictor], 1, "predictor.safetensors")
    cases["predictor that there is not"] = (["--model", TINY, "--predictor", tmp_path / "nowhere"], 1, "nowhere")
    cases["predictor that is a folder"] = (["--model", light, "--predictor", tmp_path], 1, str(tmp_path))
    refuse(11, cases, at_least=75)


CONFIGURATIONS = {
    "an unknown key": "nokey: 1", "an unknown section": "nosection:\n  x: 1", "an unknown key of a section": "kv:\n  nokey: 1", "a key twice": "model: x\nmodel: y",
    "a section twice": "kv:\n  dtype: fp16\nkv:\n  block_tokens: 16", "a key of a section twice": "kv:\n  dtype: fp16\n  dtype: fp16", "a section that is a value": "kv: 5",
    "a value that is a section": "model:\n  a: 1", "a value that is a list": "model: [a]", "a list": "[1, 2]", "a text": "just words", "a tab": "kv:\n\tdtype: fp16",
    "an anchor": "model: &a x", "an alias": "model: *a", "an alias bomb": "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nmodel: *c", "a merge": "<<: {model: x}",
    "a tag": "model: !!python/object/apply:os.system [ls]", "two documents": "model: x\n---\nmodel: y", "not closed": "model: \"x", "braces": "{model: x",
    "deep": "[" * 10000, "deeper": "a:\n" + "".join(" " * n + "a:\n" for n in range(1, 40)), "not UTF-8": b"model: \xff", "UTF-16": "model: x".encode("utf-16"), "NUL": b"model: x\0y",
    "a NUL that is written": 'model: "a\\0b"', "too long": b"# " + b"x" * (1 << 20), "a key that is a list": "[a]: b", "an empty key": "'': x",
    "a byte order mark and nonsense": b"\xef\xbb\xbf{",
    **{f"{key} = {value}": f"{key.partition('.')[0]}:\n  {key.partition('.')[2]}: {value}" for key, value in (
        ("kv.block_tokens", "-1"), ("kv.block_tokens", "0"), ("kv.block_tokens", "1025"), ("kv.block_tokens", "1e3"), ("kv.block_tokens", "16.0"), ("kv.block_tokens", "0x10"),
        ("kv.block_tokens", "''"), ("kv.block_tokens", "99999999999999999999"), ("kv.block_tokens", "~"), ("kv.dtype", "fp8"), ("kv.dtype", "FP16"), ("kv.overcommit", "maybe"),
        ("kv.overcommit", "1e0"), ("kv.memory_mib", "nan"), ("scheduler.deadline_slack", "nan"), ("scheduler.deadline_slack", "inf"), ("scheduler.deadline_slack", "-1"),
        ("scheduler.deadline_slack", "1e9"), ("transport.max_message_bytes", "1"), ("transport.max_message_bytes", "-1"), ("tls.reload_s", "0"), ("sparsity.default_tier", "best"),
        ("trace.sample_ratio", "1.5"), ("trace.otlp_endpoint", "http"), ("log.level", "loud"), ("log.format", "xml"), ("health.listen", "127.0.0.1"), ("drain.timeout_s", "-1"))},
    **{f"listen: {value}": f"listen: {value}" for value in (
        "127.0.0.1:-1", "127.0.0.1:65536", "127.0.0.1:x", "127.0.0.1", "':50051'", "'[::1:50051'", "1.2.3.4:5:6", "'a b:1'", "\"127.0.0.1:1\\n\"")},
    **{f"threads: {value}": f"threads: {value}" for value in ("-1", "1025", "many", "1.5", "[]", "{}", "99999999999")},
}


def test_group_12_configurations(tmp_path):
    cases = {}
    for n, (name, content) in enumerate(CONFIGURATIONS.items()):
        path = tmp_path / f"{n}.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        cases[name] = (["--config", path, "--print-config"], 1, str(path))
    # What the whole start checks.
    for n, (key, value) in enumerate((
            ("scheduler.fault", "crash@1"), ("scheduler.fault", "throw@0"), ("scheduler.fault", "slow@x"), ("scheduler.tenant_weights", "a=-1"),
            ("scheduler.tenant_weights", "a=0"), ("scheduler.tenant_weights", "a"), ("scheduler.tenant_weights", "a=nan"), ("scheduler.tenant_weights", "a=1,a=2"),
            ("metrics.edges", "x=1"), ("metrics.edges", "inter_token_latency_seconds=2,1"), ("metrics.edges", "inter_token_latency_seconds=nan"))):
        section, _, name = key.partition(".")
        (tmp_path / f"s{n}.yaml").write_text(f"{section}:\n  {name}: {value}\n")
        cases[f"{key} = {value}"] = (["--config", tmp_path / f"s{n}.yaml", "--model", TINY], 1, name)
    for name, flags, code, words in (
            ("no such file", ["--config", tmp_path / "nowhere"], 1, "nowhere"), ("a folder", ["--config", tmp_path], 1, str(tmp_path)),
            ("an unknown flag", ["--nonsense"], 2, "nonsense"), ("a flag without a value", ["--threads"], 2, "threads"), ("a flag of nonsense", ["--threads", "x"], 2, "threads"),
            ("a flag twice", ["--threads", "1", "--threads", "2"], 2, "threads"), ("a word", ["word"], 2, "word"),
            ("a certificate that there is not", ["--model", TINY, "--tls-cert", "/nowhere/c", "--tls-key", "/nowhere/k"], 1, "/nowhere/c"),
            ("a key alone", ["--model", TINY, "--tls-key", "/nowhere/k"], 1, "belong together"), ("tokens that there are not", ["--model", TINY, "--auth-tokens-file", "/nowhere/t"], 1, "/nowhere/t"),
            ("a port file nowhere", ["--model", TINY, "--port-file", "/nowhere/p"], 1, "/nowhere/p"),
            ("tiers the wrong way", ["--model", TINY, "--sparsity-highest-tier", "fast", "--sparsity-lowest-tier", "dense"], 1, "sparsity")):
        cases[name] = (flags, code, words)
    refuse(12, cases, at_least=85)


def test_group_12_the_environment_is_checked_as_files_are(monkeypatch):
    for name, value, words in (("DEJAVUD_THREADS", "x", "threads"), ("DEJAVUD_KV_DTYPE", "fp8", "kv.dtype"), ("DEJAVUD_LISTEN", "nowhere", "listen"),
                               ("DEJAVUD_CONFIG", "/nowhere/c.yaml", "/nowhere/c.yaml"), ("DEJAVUD_SCHEDULER_DEADLINE_SLACK", "nan", "scheduler.deadline_slack")):
        with monkeypatch.context() as environment:
            environment.setenv(name, value)
            code, said = start("--print-config")
            assert code in (1, 2) and words in said, (name, code, said)
    print("group 12: 5 inputs of the environment")
