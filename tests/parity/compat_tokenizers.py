"""Tokenizer files: the ids of AutoTokenizer, with special tokens as text and parsed, and its texts."""
import json

from transformers import AutoTokenizer

import compat

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "a"), ("Ġ", "a"), ("l", "l"), ("h", "e"), ("he", "ll"), ("hell", "o"), ("<", "s"), ("<s", ">")]
FREE = 4 + 256 + len(MERGES) - 1  # the first id behind the vocabulary

TEXTS = [
    "", " ", "the hello</s>x<s> the</s>", "  a  the\n\n hell", "<|endoftext|>", "naïve 日本 🎈 e\u0301", "the's they'LL don't",
    "<mask> a<mask>b  <mask>  c", "new newt\u00e9 renew new", "a<new>b", "THE  the", "x\u00a0\u2003the\u3000", "\ufeffthe\x00\x7f", "<pad><unk><s></s>",
    "12.5 ²٣Ⅷ", "\U00010d4e\U0001e5d0\U0002ebf0 \U00010d40\U0001ccf3",  # letters and numbers of Unicode 15 to 16
]
IDS = [[0, 1, 2, 3], [2, 261, 36, 269, 2], [198, 173, 199], [FREE, FREE + 1, FREE + 2, 300, 4], [2, 198, 2, 173]]


def byte_symbols():
    symbols, other = [], 0x100
    for byte in range(256):
        printable = 0x20 < byte < 0x7F or byte > 0xA0 and byte != 0xAD
        symbols.append(chr(byte if printable else other))
        other += not printable
    return symbols


def vocabulary():
    ids = {token: i for i, token in enumerate(SPECIAL + byte_symbols())}
    for left, right in MERGES:
        ids.setdefault(left + right, len(ids))
    return ids


def merges_text(header="#version: 0.2\n", merges=MERGES):
    return header + "".join(f"{left} {right}\n" for left, right in merges)


# As of facebook/opt, but for its length.
CONFIG = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>",
          "add_prefix_space": False, "add_bos_token": True}
GENERIC = CONFIG | {"tokenizer_class": "PreTrainedTokenizerFast"}


def put(directory, name, contents):
    data = contents if isinstance(contents, bytes) else contents.encode() if isinstance(contents, str) else json.dumps(contents).encode()
    (directory / name).write_bytes(data)


def put_questions(directory):
    put(directory, "questions.json", {"texts": TEXTS, "ids": IDS})


@compat.base
def tokenizer(directory):
    put_questions(directory)
    put(directory, "config.json", {"model_type": "opt", "vocab_size": 320})
    put(directory, "vocab.json", vocabulary())
    put(directory, "merges.txt", merges_text())
    put(directory, "tokenizer_config.json", CONFIG)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def added(content, **flags):
    return {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False} | flags


@compat.base
def tokenizer_json(directory):
    put_questions(directory)
    put(directory, "config.json", {"model_type": "opt", "vocab_size": 320})
    put(directory, "tokenizer_config.json", CONFIG)
    put(directory, "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i} | added(token, special=True) for i, token in enumerate(SPECIAL)],
        "normalizer": None, "pre_tokenizer": BYTE_LEVEL, "post_processor": None, "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                  "byte_fallback": False, "ignore_merges": False, "vocab": vocabulary(), "merges": [f"{left} {right}" for left, right in MERGES]}})


def reference(directory):
    """`parsed`, `text`: ids of TEXTS, where special tokens are these and where they are text. `kept`, `skipped`: texts of IDS. What is
    asked stands in the bases' questions.json."""
    loaded = AutoTokenizer.from_pretrained(directory)
    encode = lambda split: [loaded(text, split_special_tokens=split)["input_ids"] for text in TEXTS]  # noqa: E731
    decode = lambda skip: [loaded.decode(ids, skip_special_tokens=skip) for ids in IDS]  # noqa: E731
    return {"parsed": encode(False), "text": encode(True), "kept": decode(False), "skipped": decode(True)}


def case(name, about, edit, *refused, base="tokenizer", decision=""):
    compat.add("tokenizer-" + name, about, base, edit, {"tokenizer": reference}, refused, decision)


def files(**contents):
    """Writes files; `vocab__json` is vocab.json. None removes one."""
    def edit(directory):
        for key, value in contents.items():
            name = key.replace("__", ".")
            put(directory, name, value) if value is not None else (directory / name).unlink()
    return edit


def config(changes=(), drop=(), **more):
    return files(tokenizer_config__json={key: value for key, value in (CONFIG | dict(changes)).items() if key not in drop}, **more)


def of_json(config=CONFIG, model=(), drop=(), **changes):
    """Changes a tokenizer.json, and of what is in its model."""
    def edit(directory):
        document = json.loads((directory / "tokenizer.json").read_text())
        document |= changes
        document["model"] = {key: value for key, value in (document["model"] | dict(model)).items() if key not in drop}
        put(directory, "tokenizer.json", document)
        put(directory, "tokenizer_config.json", config)
    return edit


def decoder(*tokens, **ids):
    return {"added_tokens_decoder": {str(FREE + i): token for i, token in enumerate(tokens)} | ids}


# What stands around a prompt.
case("plain", "vocab.json, merges.txt and tokenizer_config.json, as facebook/opt", files())
case("no-config", "no tokenizer_config.json: no </s>, and <|endoftext|> is a token", files(tokenizer_config__json=None))
case("no-bos", "add_bos_token is false", config({"add_bos_token": False}))
case("bos-absent", "no add_bos_token", config(drop=["add_bos_token"]))
case("bos-null", "no bos_token to add", config({"bos_token": None}))
case("eos", "add_eos_token", config({"add_eos_token": True}))
case("bos-of-map", "another bos_token in special_tokens_map.json", files(special_tokens_map__json={"bos_token": "<s>"}))
case("prefix-space", "add_prefix_space", config({"add_prefix_space": True}))
case("facebook", "tokens as objects, as facebook/opt has them", config(
    {role: {"__type": "AddedToken"} | added("</s>", normalized=True) for role in ("bos_token", "eos_token", "unk_token")},
    special_tokens_map__json={role: added("</s>", normalized=True) for role in ("bos_token", "eos_token", "unk_token")} | {"pad_token": added("<pad>", normalized=True)}))

# merges.txt and vocab.json.
case("merges-bom", "merges.txt begins with a byte order mark", files(merges__txt="\ufeff" + merges_text()), "merges.txt", "byte order mark")
case("merges-no-header", "merges.txt has no #version", files(merges__txt=merges_text("")))
case("merges-crlf", "merges.txt has Windows line ends", files(merges__txt=merges_text().replace("\n", "\r\n")))
case("merges-empty", "merges.txt is empty", files(merges__txt=""))
case("merges-cut", "merges.txt ends in the middle of a merge", files(merges__txt=merges_text()[:-3]), "merges.txt", "line 12")
case("merges-cut-between", "merges.txt ends after some merges", files(merges__txt=merges_text(merges=MERGES[:4])))
case("merges-no-line-end", "the last line has no end", files(merges__txt=merges_text()[:-1]))
case("merges-blank", "an empty line in merges.txt", files(merges__txt=merges_text() + "\n"), "merges.txt", "line 13")
case("merges-twice", "a merge stands there twice: the later counts", files(merges__txt=merges_text() + "t h\n"))
case("merges-unknown", "a merge of a token that is not there", files(merges__txt=merges_text() + "t q\n"), "merges.txt", "line 13", "tq")
case("no-merges", "no merges.txt", files(merges__txt=None), "vocab.json", "no merges.txt")
case("no-vocab", "no vocab.json", files(vocab__json=None), "merges.txt", "no vocab.json")
case("vocab-bom", "vocab.json begins with a byte order mark", files(vocab__json="\ufeff" + json.dumps(vocabulary())), "vocab.json", "byte order mark")
case("vocab-hole", "ids of the vocabulary have holes", files(vocab__json=vocabulary() | {"hellohello": FREE + 20}))
case("vocab-missing-byte", "a byte has no token", files(vocab__json={k: v for k, v in vocabulary().items() if k != "q"}), "vocab.json", "byte 0x71",
     decision="has no token for one of the 256 bytes")
case("vocab-same-id", "two tokens have the same id", files(vocab__json=vocabulary() | {"zz": 261}), "vocab.json", "id 261 belongs to both",
     decision="two tokens have the same id")

# Added tokens.
case("added-tokens-json", "tokens in added_tokens.json", files(added_tokens__json={"<new>": FREE, "<mask>": FREE + 1, "new": FREE + 2}))
case("added-tokens-special", "one of them is special by special_tokens_map.json",
     files(added_tokens__json={"<new>": FREE, "<mask>": FREE + 1}, special_tokens_map__json={"mask_token": "<mask>"}))
case("added-tokens-far", "an id that is not the next one, which counts", files(added_tokens__json={"<new>": FREE + 9, "<mask>": FREE + 4}))
case("added-decoder", "tokens in added_tokens_decoder", config(decoder(added("<new>"), added("<mask>", special=True), added("new"))))
case("added-strips", "tokens that take spaces", config(decoder(added("<mask>", special=True, lstrip=True), added("new", rstrip=True), added("a", lstrip=True, rstrip=True))))
case("added-single-word", "tokens that are words of their own", config(decoder(added("new", single_word=True), added("the", single_word=True, special=True))))
case("added-normalized", "tokens that are looked for last", config(decoder(added("new", normalized=True), added("w n", normalized=False), added("<mask>", normalized=True, special=True))))
case("added-overlap", "tokens that overlap, special and not", config(decoder(added("<s>", special=True), added("s> "), added("<pad", special=True), added("><unk"))))
case("added-bytes", "tokens with characters that stand for bytes", config(decoder(added("é"), added("Ġ日"), added("\n\n"))))
case("added-roles", "roles of other names, and a list of more", config({"image_token": "<mask>", "additional_special_tokens": ["<new>", "new"], "audio_token": "日"}))
case("added-mask", "mask_token in special_tokens_map.json", files(special_tokens_map__json={"mask_token": added("<mask>", lstrip=True)}))
case("added-ordinary", "a word of the vocabulary is special", config({"pad_token": "the"}))
case("added-byte", "a byte is special", config({"pad_token": "a"}))
case("added-flag", "a flag that is none", config(decoder(added("<new>", lstrip="yes"))), "tokenizer_config.json", "<new>", "lstrip")

# tokenizer.json.
case("json", "tokenizer.json of GPT2Tokenizer", files(), base="tokenizer-json")
case("json-generic", "tokenizer.json of PreTrainedTokenizerFast", of_json(GENERIC), base="tokenizer-json")
case("json-first", "vocab.json and merges.txt beside it differ: tokenizer.json counts",
     files(vocab__json={"a": 0}, merges__txt="not read"), base="tokenizer-json")
case("json-class-of-model", "tokenizer_class in config.json", lambda directory: (
    of_json({}, pre_tokenizer=BYTE_LEVEL | {"use_regex": False})(directory),
    compat.change_json(directory / "config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})), base="tokenizer-json")
case("class-other", "a tokenizer of another kind", config({"tokenizer_class": "RobertaTokenizer"}), "tokenizer_config.json", "RobertaTokenizer", "GPT2Tokenizer",
     decision="another `tokenizer_class`")
case("class-needs-json", "PreTrainedTokenizerFast without tokenizer.json", config(GENERIC), "tokenizer_config.json", "needs a tokenizer.json")


def template(*single):
    pieces = [{"Sequence": {"id": "A", "type_id": 0}} if piece == "A" else {"SpecialToken": {"id": piece, "type_id": 0}} for piece in single]
    return {"type": "TemplateProcessing", "single": pieces, "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]} for i, token in enumerate(SPECIAL)}}


def sequence(key, *parts):
    return {"type": "Sequence", key: list(parts)}


for name, about, processor in (
        ("none", "no post-processor: no </s>, whatever add_bos_token says", None),
        ("byte-level", "a post-processor that adds nothing", BYTE_LEVEL),
        ("front", "</s> before a prompt", template("</s>", "A")),
        ("both-ends", "tokens at both ends", template("<s>", "A", "</s>")),
        ("roberta", "RobertaProcessing", {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0], "trim_offsets": True, "add_prefix_space": False}),
        ("sequence", "a sequence of both", sequence("processors", BYTE_LEVEL, template("</s>", "A"))),
        ("sequence-of-one", "a sequence of one", sequence("processors", template("</s>", "</s>", "A")))):
    case("post-" + name, about, of_json(post_processor=processor), base="tokenizer-json")
case("post-twice", "two post-processors that add tokens", of_json(post_processor=sequence("processors", template("</s>", "A"), template("</s>", "A"))),
     "tokenizer.json", "post_processor", "twice", base="tokenizer-json", decision="adds tokens twice")
case("post-unknown", "a post-processor that nobody knows", of_json(post_processor={"type": "Other"}), "tokenizer.json", "post_processor", "Other",
     base="tokenizer-json")

for name, about, changes in (
        ("prefix-space", "pre_tokenizer.add_prefix_space", dict(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True})),
        ("no-regex", "pre_tokenizer.use_regex is false", dict(pre_tokenizer=BYTE_LEVEL | {"use_regex": False})),
        ("sequences", "sequences of one and of none", dict(pre_tokenizer=sequence("pretokenizers", BYTE_LEVEL), normalizer=sequence("normalizers"),
                                                          decoder=sequence("decoders", BYTE_LEVEL))),
        ("pairs", "merges as pairs", dict(model={"merges": [list(merge) for merge in MERGES]})),
        ("ignore-merges", "ignore_merges", dict(model={"ignore_merges": True, "merges": []})),
        ("options", "byte_fallback, unk_token and fuse_unk, which change nothing here", dict(model={"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True})),
        ("cut", "truncation and padding, which a prompt does not get", dict(
            truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
            padding={"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0, "pad_token": "<pad>"})),
        ("added", "its own added tokens, other than those of tokenizer_config.json", dict(
            config=GENERIC | decoder(added("new", lstrip=True), added("<mask>", special=True)),
            added_tokens=[{"id": 2} | added("</s>", special=True, rstrip=True), {"id": FREE} | added("new", rstrip=True)]))):
    case("json-" + name, about, of_json(**({"config": GENERIC} | changes)), base="tokenizer-json")
case("json-gpt2-ignores", "normalizer, pre_tokenizer and dropout of a tokenizer.json that GPT2Tokenizer does not read",
     of_json(normalizer={"type": "Lowercase"}, pre_tokenizer={"type": "Whitespace"}, model={"dropout": 0.5}), base="tokenizer-json")
for name, words, decision, changes in (
        ("lowercase", ("normalizer", "Lowercase"), "a normalizer", dict(normalizer={"type": "Lowercase"})),
        ("whitespace", ("pre_tokenizer",), "a `pre_tokenizer`", dict(pre_tokenizer={"type": "Whitespace"})),
        ("dropout", ("model.dropout",), "`dropout`", dict(model={"dropout": 0.5})),
        ("suffix", ("model.end_of_word_suffix",), "`end_of_word_suffix`", dict(model={"end_of_word_suffix": "</w>"}))):
    case("json-" + name, f"{words[0]} of another kind", of_json(GENERIC, **changes), "tokenizer.json", *words, base="tokenizer-json", decision=decision)
case("json-merges-null", "model.merges is null", of_json(model={"merges": None}), "tokenizer.json", "model.merges", base="tokenizer-json")
case("json-not-bpe", "model.type is WordLevel", of_json(model={"type": "WordLevel"}), "tokenizer.json", "model.type", base="tokenizer-json")
case("json-version", "a version of the future", of_json(version="2.0"), "tokenizer.json", "version", base="tokenizer-json")
