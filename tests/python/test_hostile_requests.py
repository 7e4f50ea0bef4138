"""Bad input in requests, groups 1 to 7: numbers, token ids, text, stop strings, biases, request ids. All of it is refused, or is
taken for what it says; the tables say which."""
import struct

import grpc
import pytest

import groups
from groups import PROMPT, Case
from wire import bits, packed, part, real, uint

INVALID = "INVALID_ARGUMENT"
VOCABULARY, CONTEXT = 8192, 512  # of the embedded model
IDS = part(4, packed(1, PROMPT))  # GenerateRequest's and ScoreRequest's token_ids
ONE_TOKEN = part(7, uint(1, 1))   # stopping: max_new_tokens 1
# Sections of GenerateRequest.
SAMPLING, PENALTIES, STOPPING, OUTPUT, SPARSITY, SCHEDULING = range(5, 11)


def generate(*parts, prompt=IDS, stopping=ONE_TOKEN):
    """Later parts win; messages merge."""
    return prompt + stopping + b"".join(parts)


def floats():
    """Bits as they come in, by name."""
    of = lambda value: struct.unpack("<I", struct.pack("<f", value))[0]
    return {"NaN": 0x7fc00000, "-NaN": 0xffc00000, "signalling NaN": 0x7f800001, "+Inf": 0x7f800000, "-Inf": 0xff800000,
            "-0": 0x80000000, "-1": of(-1), "1e-45": 1, "-1e-45": 0x80000001, "1e38": of(1e38), "FLT_MAX": 0x7f7fffff,
            "1.0000001": 0x3f800001, "0": 0, "1": of(1), "100": of(100), "100.00001": 0x42c80001, "-100.00001": 0xc2c80001}


# Section, field's number, its name, and the values that are taken. All others are refused.
FLOATS = [
    (SAMPLING, 1, "sampling.temperature", {"-0", "0", "1e-45", "1", "1.0000001", "100"}),
    (SAMPLING, 3, "sampling.top_p", {"1e-45", "1"}),
    (SAMPLING, 4, "sampling.min_p", {"-0", "0", "1e-45", "1"}),
    (PENALTIES, 1, "penalties.repetition", {"1e-45", "1", "1.0000001", "100"}),
    (PENALTIES, 2, "penalties.presence", {"-0", "0", "-1", "1e-45", "-1e-45", "1", "1.0000001", "100"}),
    (PENALTIES, 3, "penalties.frequency", {"-0", "0", "-1", "1e-45", "-1e-45", "1", "1.0000001", "100"}),
    (STOPPING, 7, "stopping.max_time_s", {"1e-45", "1", "1.0000001", "100", "100.00001"}),
    (SCHEDULING, 3, "scheduling.inter_token_target_ms", {"1e-45", "1", "1.0000001", "100", "100.00001"}),
]


def test_group_1_numbers_that_are_none(daemon):
    cases = []
    for section, number, field, taken in FLOATS:
        for name, value in floats().items():
            refused = name not in taken
            cases.append(Case(f"{field} {name}", "Generate", generate(part(section, bits(number, value))), INVALID if refused else "OK",
                              field if refused else ""))
    for name, value in floats().items():
        refused = name not in {"-0", "0", "-1", "1e-45", "-1e-45", "1", "1.0000001", "100"}
        bias = part(PENALTIES, part(4, uint(1, 9) + bits(2, value)))
        cases.append(Case(f"bias {name}", "Generate", generate(bias), INVALID if refused else "OK", "logit_bias[9]" if refused else ""))
    groups.run(daemon, 1, cases, at_least=150)


NUMBERS = {"0": 0, "1": 1, "-1": -1, "2^31-1": (1 << 31) - 1, "2^31": 1 << 31, "2^32-1": (1 << 32) - 1, "2^63": 1 << 63}


def test_group_2_counts(daemon):
    cases = []

    def table(section, number, field, taken, more=(), method="Generate", base=generate):
        """A number of more than 32 bits keeps the lower ones: 2^63 is 0, as protobuf has it."""
        for name, value in {**NUMBERS, **{str(n): n for n in more}}.items():
            message = base(part(section, uint(number, value)) if section else uint(number, value))
            cases.append(Case(f"{field} {name}", method, message, "OK" if name in taken else INVALID, "" if name in taken else field))

    table(STOPPING, 1, "stopping.max_new_tokens", {"1", "3"}, (3, CONTEXT, CONTEXT - len(PROMPT) + 2))
    table(STOPPING, 2, "stopping.min_new_tokens", {"0", "1", "2^63"}, (2, VOCABULARY + 1))
    table(SAMPLING, 2, "sampling.top_k", {*NUMBERS, "8193"}, (VOCABULARY + 1,))  # more than there are is all of them
    table(SAMPLING, 5, "sampling.seed", set(NUMBERS))
    table(OUTPUT, 2, "output.top_logprobs", {"0", "1", "100", "2^63"}, (100, 101, VOCABULARY + 1))
    table(SPARSITY, 3, "sparsity.shadow_every", {"0", "1", "1000000000", "2^63"}, (1000000000, 1000000001))
    table(SPARSITY, 1, "sparsity.tier", {"0", "1", "2", "2^63"}, (2, 6))
    table(SCHEDULING, 1, "scheduling.urgency", {"0", "1", "3", "2^63"}, (3, 4))
    # Zigzag: an even number is half of it, an odd one is below zero.
    table(SCHEDULING, 2, "scheduling.priority", {"0", "1", "200", "199", "2^63"}, (200, 201, 199))
    # Every sample is a request of its own; one without a temperature is enough.
    hot = part(SAMPLING, real(1, 1.0))
    table(SAMPLING, 6, "sampling.samples", {"0", "1", "2^63"}, (2,))
    table(SAMPLING, 6, "sampling.samples", {"0", "1", "2^63", "16"}, (16, 17), base=lambda *p: generate(hot, *p))
    table(None, 5, "top_logprobs", {"0", "1", "2^63"}, (101,), method="Score", base=lambda *p: IDS + b"".join(p))
    # What is given as 64 bits or as bytes is another field to protobuf, and unknown.
    cases.append(Case("max_new_tokens of 11 bytes", "Generate", generate(part(STOPPING, b"\x08" + b"\xff" * 10 + b"\x01")), INVALID))
    cases.append(Case("min above max", "Generate", generate(part(STOPPING, uint(1, 4) + uint(2, 5))), INVALID, "max_new_tokens is 4"))
    cases.append(Case("samples of -1 and -1 tokens", "Generate", generate(hot, part(SAMPLING, uint(6, -1)), part(STOPPING, uint(1, -1))),
                      INVALID, "sampling.samples"))
    groups.run(daemon, 2, cases, at_least=100)


def test_group_3_token_ids(daemon):
    # name: (ids in bytes, a prompt of them is taken, word)
    lists = {
        "empty": (b"", False, "empty"),
        "vocabulary": (packed(1, [VOCABULARY]), False, "ids[0]"),
        "vocabulary - 1": (packed(1, [VOCABULARY - 1]), True, ""),
        "50265 ... 50271": (packed(1, range(50265, 50272)), False, "ids[0]"),
        "-1": (packed(1, [-1]), False, "4294967295"),
        "2^31": (packed(1, [1 << 31]), False, "2147483648"),
        "2^32 - 1": (packed(1, [(1 << 32) - 1]), False, "4294967295"),
        "2^32": (packed(1, [1 << 32]), True, ""),  # keeps the lower bits: 0
        "the last is bad": (packed(1, [2] * 200 + [VOCABULARY]), False, "ids[200]"),
        "the first is bad": (packed(1, [VOCABULARY] + [2] * 200), False, "ids[0]"),
        "context + 1": (packed(1, [5] * (CONTEXT + 1)), False, "513 tokens"),
        "a million": (packed(1, [5] * 1_000_000), False, "1000000 tokens"),
        "four million": (packed(1, [5] * 4_000_000), False, "4000000 tokens"),
        "begin of text alone": (packed(1, [2]), True, ""),
        "padding alone": (packed(1, [1]), True, ""),
        "packed and not": (packed(1, [2, 5]) + uint(1, 7), True, ""),
        "cut off inside a number": (part(1, b"\x02\x80"), False, "well-formed"),
        "a length beyond the end": (b"\x0a\x7f\x02", False, "well-formed"),
    }
    cases = []
    for name, (ids, taken, word) in lists.items():
        code = "OK" if taken else INVALID
        cases.append(Case(f"Generate {name}", "Generate", generate(prompt=part(4, ids)), code, word))
        cases.append(Case(f"GenerateStream {name}", "GenerateStream", generate(prompt=part(4, ids)), code, word))
        cases.append(Case(f"Score {name}", "Score", part(4, ids), code, word))
    full = part(4, packed(1, [5] * CONTEXT))
    cases += [
        Case("a full context says what comes next", "Generate", generate(prompt=full), "OK"),
        Case("a full context is scored", "Score", full, "OK"),
        Case("one less", "Generate", generate(prompt=part(4, packed(1, [5] * (CONTEXT - 1)))), "OK"),
        Case("no prompt", "Generate", ONE_TOKEN, INVALID, "prompt is missing"),
        Case("no prompt to score", "Score", b"", INVALID, "prompt is missing"),
        Case("text, then ids", "Generate", generate(prompt=part(3, "a" * 5000) + IDS), "OK"),  # the last one wins
        Case("ids, then text", "Generate", generate(prompt=part(4, packed(1, [VOCABULARY])) + part(3, "It was")), "OK"),
        Case("ids, then empty text", "Generate", generate(prompt=IDS + part(3, "")), "OK"),  # </s> alone
        Case("ids twice are one list", "Generate", generate(prompt=part(4, packed(1, [5] * 300)) * 2), INVALID, "600 tokens"),
        Case("Detokenize vocabulary", "Detokenize", packed(2, [VOCABULARY]), INVALID, "token_ids[0]"),
        Case("Detokenize -1", "Detokenize", packed(2, [-1]), INVALID, "token_ids[0]"),
        Case("Detokenize nothing", "Detokenize", b"", "OK"),
        Case("Detokenize a million", "Detokenize", packed(2, [5] * 1_000_000), "OK"),
    ]
    groups.run(daemon, 3, cases, at_least=60)


# Not UTF-8, each for a reason of its own.
BROKEN = {
    "overlong slash": b"\xc0\xaf", "overlong NUL": b"\xc0\x80", "overlong of three": b"\xe0\x80\xaf", "overlong of four": b"\xf0\x80\x80\xaf",
    "first of two": b"\xc3", "two of three": b"\xe2\x82", "three of four": b"\xf0\x9f\x98", "a surrogate": b"\xed\xa0\x80",
    "a pair of surrogates": b"\xed\xa0\xbd\xed\xb8\x80", "beyond Unicode": b"\xf4\x90\x80\x80", "a byte that never is": b"\xff",
    "UTF-16": b"\xff\xfeh\0i\0", "a continuation alone": b"\x80", "Latin-1": b"caf\xe9",
}
# Odd, and yet text.
ODD = {
    "NUL": "a\0b", "a byte order mark": "\ufeffIt was", "combining marks alone": "\u0301\u0302\u0323", "two hundred marks": "e" + "\u0301" * 200,
    "right to left": "\u202eabc\u202c", "isolates": "\u2066abc\u2069", "the last code point": "\U0010ffff", "no character": "\ufffe\uffff",
    "joined emoji": "\U0001f469\u200d\U0001f469\u200d\U0001f467", "zero width": "\u200b\u200c\u200d", "line ends": "a\r\n\x0b\x0c\x85\u2028\u2029b",
    "escapes": "\x1b[2J\x1b]0;title\x07", "a special token": "</s><pad><s>", "spaces": " " * 200, "tabs": "\t" * 100, "one space": " ",
    "replacement": "\ufffd", "quotes": "\"'\\\\${}%s%n", "all bytes": "".join(map(chr, range(1, 256))),
}


def test_group_4_text(daemon):
    cases = []
    for name, text in BROKEN.items():
        for field, method, message in (
                ("text", "Generate", generate(prompt=part(3, b"It was " + text))),
                ("text", "GenerateStream", generate(prompt=part(3, text + b" dark"))),
                ("text", "Score", part(3, text)),
                ("text", "Tokenize", part(2, text)),
                ("stop_strings", "Generate", generate(part(STOPPING, part(3, text)))),
                ("cache_salt", "Generate", generate(part(SCHEDULING, part(5, text)))),
                ("request_id", "Generate", generate(part(1, text))),
                ("request_id", "Abort", part(1, text)),
                ("model", "GetModelInfo", part(1, text))):
            cases.append(Case(f"{method}.{field} {name}", method, message, INVALID, field))
    for name, text in ODD.items():
        cases.append(Case(f"Generate {name}", "Generate", generate(prompt=part(3, text)), "OK"))
        cases.append(Case(f"Tokenize {name}", "Tokenize", part(2, text), "OK"))
        cases.append(Case(f"salt {name}", "Generate", generate(part(SCHEDULING, part(5, text))),
                          "OK" if len(text.encode()) <= 128 else INVALID, "" if len(text.encode()) <= 128 else "cache_salt"))
        cases.append(Case(f"model {name}", "Tokenize", part(1, text), "NOT_FOUND", "is not served here"))
    mebibyte = 1 << 20
    cases += [
        Case("no text", "Generate", generate(prompt=part(3, "")), "OK"),
        Case("no text to tokenise", "Tokenize", b"", "OK"),
        Case("a mebibyte of a", "Generate", generate(prompt=part(3, "a" * mebibyte)), INVALID, "context of 512 tokens"),
        Case("a mebibyte of a, tokenised", "Tokenize", part(2, "a" * mebibyte), "OK"),
        Case("a mebibyte of spaces", "Score", part(3, " " * mebibyte), INVALID, "context of 512 tokens"),
        Case("three mebibytes of NUL", "Generate", generate(prompt=part(3, b"\0" * (3 * mebibyte))), INVALID, "context of 512 tokens"),
        Case("two mebibytes of marks", "Generate", generate(prompt=part(3, "\u0301" * mebibyte)), INVALID, "context of 512 tokens"),
        Case("all that a message may have", "Tokenize", part(2, "a" * (4 * mebibyte - 6)), INVALID, "split the request"),
        Case("broken at the end of a mebibyte", "Tokenize", part(2, b"a" * mebibyte + b"\xc3"), INVALID, "text"),
    ]
    groups.run(daemon, 4, cases, at_least=200, most_growth_mib=32)


def test_group_5_stop_strings_and_tokens(daemon):
    stops = lambda *texts: part(STOPPING, b"".join(part(3, text) for text in texts))
    ids = lambda *values: part(STOPPING, packed(5, values))
    eight = part(STOPPING, uint(1, 8))
    taken = {
        "a space": stops(" "), "longer than the output": stops("x" * 256), "eight": stops(*"abcdefgh"), "eight alike": stops(*"aaaaaaaa"),
        "prefixes of each other": stops("t", "th", "the", "the ", "the s"), "suffixes of each other": stops("he", "e", "the"),
        "periodic": stops("aaaa", "aaab", "abab"), "of one byte more than a character": stops("\u00e9"), "emoji": stops("\U0001f469\u200d"),
        "NUL": stops("\0"), "line ends": stops("\r\n", "\n"), "a special token": stops("</s>"), "marks": stops("\u0301" * 100),
        "pattern": stops(".*", "(a+)+$", "[", "\\"), "with ids": stops("a") + ids(5, 6), "64 ids": ids(*range(64)), "ids alike": ids(*[9] * 64),
        "the end token": ids(2), "padding": ids(1), "the last id": ids(VOCABULARY - 1), "none": stops(), "included": stops("e") + part(STOPPING, uint(4, 1)),
        "no end before": ids(5) + part(STOPPING, uint(2, 8)), "ids not packed": part(STOPPING, uint(5, 7) + uint(5, 8)),
    }
    refused = {
        "empty": (stops(""), "stop_strings[0]"), "the second empty": (stops("a", ""), "stop_strings[1]"), "nine": (stops(*"abcdefghi"), "stop_strings"),
        "ten thousand": (stops(*map(str, range(10000))), "stop_strings"), "257 bytes": (stops("x" * 257), "257 bytes"),
        "129 characters of two bytes": (stops("\u00e9" * 129), "258 bytes"), "a mebibyte": (stops("x" * (1 << 20)), "stop_strings[0]"),
        "65 ids": (ids(*range(65)), "stop_token_ids"), "a million ids": (ids(*[5] * 1_000_000), "stop_token_ids"),
        "an id of the vocabulary": (ids(VOCABULARY), "stop_token_ids[0]"), "-1": (ids(5, -1), "stop_token_ids[1]"),
        "2^31": (ids(1 << 31), "stop_token_ids[0]"),
    }
    cases = [Case(name, method, generate(content, eight), "OK") for name, content in taken.items() for method in ("Generate", "GenerateStream")]
    cases += [Case(name, "Generate", generate(content, eight), INVALID, word) for name, (content, word) in refused.items()]
    groups.run(daemon, 5, cases, at_least=55)


SPECIAL = {0x7fc00000, 0x7f800000, 0xff800000}  # NaN and infinities, by their bits


def test_group_6_biases_and_penalties(daemon):
    entry = lambda id, value: part(4, uint(1, id) + (bits if value in SPECIAL else real)(2, value))
    biases = lambda pairs: part(PENALTIES, b"".join(entry(id, value) for id, value in pairs))
    allowed = lambda *values: part(PENALTIES, packed(5, values))
    hot = part(SAMPLING, real(1, 100.0))
    everything = range(VOCABULARY)
    taken = {
        "300 biases": biases((i, -100) for i in range(300)), "the same id 300 times": biases((9, i % 100) for i in range(300)),
        "no key": part(PENALTIES, part(4, real(2, 5))), "no value": part(PENALTIES, part(4, uint(1, 9))), "an empty entry": part(PENALTIES, part(4, b"")),
        "unknown in an entry": part(PENALTIES, part(4, uint(1, 9) + uint(7, 9) + real(2, 1))), "the last id": biases([(VOCABULARY - 1, 100)]),
        "all allowed": allowed(*everything), "one allowed": allowed(9), "one allowed a thousand times": allowed(*[9] * 1000),
        "the allowed one disliked": allowed(9) + biases([(9, -100)]), "only padding allowed": allowed(1), "only the end allowed": allowed(2),
        "hot, one allowed": hot + allowed(9), "hot, all allowed disliked": hot + allowed(*range(300)) + biases((i, -100) for i in range(300)),
        "all penalties at once": part(PENALTIES, real(1, 100.0) + real(2, 100.0) + real(3, 100.0)) + hot,
        "all penalties the other way": part(PENALTIES, real(1, 1e-30) + real(2, -100.0) + real(3, -100.0)) + hot,
        "min_p 1": hot + part(SAMPLING, real(4, 1.0)), "top_k 1, top_p least": hot + part(SAMPLING, uint(2, 1) + bits(3, 1)),
        "logprobs of what is not allowed": allowed(9) + part(OUTPUT, uint(2, 100)),
        "stop at the only one allowed": allowed(9) + part(STOPPING, packed(5, [9])),
    }
    refused = {
        "301 biases": (biases((i, 1) for i in range(301)), "logit_bias"), "50,000 biases": (biases((i, 1) for i in range(50000)), "logit_bias"),
        "of the vocabulary": (biases([(VOCABULARY, 1)]), f"logit_bias[{VOCABULARY}]"), "of -1": (biases([(-1, 1)]), "logit_bias[4294967295]"),
        "of 2^31": (biases([(1 << 31, 1)]), "logit_bias[2147483648]"), "NaN": (biases([(9, 0x7fc00000)]), "logit_bias[9]"),
        "+Inf": (biases([(9, 0x7f800000)]), "logit_bias[9]"), "-Inf for all": (biases((i, 0xff800000) for i in range(300)), "logit_bias["),
        "one bad of 300": (biases([(i, 1) for i in range(299)] + [(400, 101)]), "logit_bias[400]"),
        "an allowed one beyond": (allowed(9, VOCABULARY), "allowed_token_ids[1]"), "-1 allowed": (allowed(-1), "allowed_token_ids[0]"),
        "a million allowed, the last beyond": (allowed(*[9] * 1_000_000, VOCABULARY), "allowed_token_ids[1000000]"),
        "the only one allowed may not come yet": (allowed(2) + part(STOPPING, uint(1, 8) + uint(2, 8)), "leave no token to sample"),
        "a bias that is cut off": (part(PENALTIES, part(4, b"\x08\x09\x15\x00")), "well-formed"),
    }
    cases = [Case(name, method, generate(content), "OK") for name, content in taken.items() for method in ("Generate", "GenerateStream")]
    cases += [Case(name, "Generate", generate(content), INVALID, word) for name, (content, word) in refused.items()]
    groups.run(daemon, 6, cases, at_least=55)


def test_group_7_request_ids(daemon, api):
    ids = {"of 128 bytes": ("x" * 128, True), "of 129 bytes": ("x" * 129, False), "of a mebibyte": ("x" * (1 << 20), False), "all that is allowed": (
        "azAZ09._:-", True), "of a number": ("0", True), "none": ("", True), "-": ("-", True), "..": ("..", True), "a path": ("../../etc/passwd", False),
           "a colon alone": (":", True)}
    ids |= {f"with {code:#04x}": (f"a{chr(code)}b", False) for code in [*range(0x21), *b"\"#$%&'()*+,/;<=>?@[\\]^`{|}~", 0x7f, 0x80, 0xa0, 0x202e, 0x2028]}
    cases = []
    for name, (text, taken) in ids.items():
        cases.append(Case(f"Generate {name}", "Generate", generate(part(1, text)), "OK" if taken else INVALID, "" if taken else "request_id"))
        known = taken and text
        cases.append(Case(f"Abort {name}", "Abort", part(1, text), "OK" if known else INVALID, "" if known else "request_id"))
    cases += [Case(f"Score {name}", "Score", part(1, text) + IDS, "OK" if taken else INVALID, "" if taken else "request_id")
              for name, (text, taken) in list(ids.items())[:12]]
    groups.run(daemon, 7, cases, at_least=140)


def test_group_7_the_same_id_and_aborts(braked, api):
    """Live ones, twice; an abort of a stranger's, twice, and in a race with the end."""
    watched, count = groups.Watched(braked), {"OK": 0, "CANCELLED": 0, "ALREADY_EXISTS": 0}
    abort = lambda id: braked.stub.Abort(api.pb.AbortRequest(request_id=id), timeout=groups.PATIENCE_S).found
    for n in range(3):
        stream = braked.stub.GenerateStream(braked.request(PROMPT, 500, request_id="twice"), timeout=groups.PATIENCE_S)
        next(stream)
        for method, message in (("Generate", generate(part(1, "twice"))), ("GenerateStream", generate(part(1, "twice"))),
                                ("Score", part(1, "twice") + IDS)):
            code, words = groups.send(braked, Case("", method, message, ""))
            assert (code, "twice" in words) == ("ALREADY_EXISTS", True)
            count[code] += 1
        assert not abort("another") and abort("twice")
        with pytest.raises(grpc.RpcError) as error:
            list(stream)
        assert error.value.code().name == "CANCELLED"
        assert not abort("twice") or n == 0  # the call may outlive its answer for a moment
        count["OK"] += 3
        count["CANCELLED"] += 1
    for n in range(20):
        call = braked.stub.Generate.future(braked.request(PROMPT, 2, request_id=f"race-{n}"), timeout=groups.PATIENCE_S)
        abort(f"race-{n}")
        code = call.code().name
        assert code in ("OK", "CANCELLED")
        count[code] += 1
        count["OK"] += 1
    print("group 7, live ids: 38 inputs")
    watched.expect_sound(count)
