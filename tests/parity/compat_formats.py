"""Files as bytes: what the reference implementation of safetensors takes and refuses."""
import json

from safetensors import safe_open

import compat

F16 = '"dtype":"F16"'


def reference(directory):
    """All names and what each holds, so that nothing is left unread."""
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        names = sorted(file.keys())
        for name in names:
            file.get_slice(name).get_shape()
        return {"names": names, "metadata": dict(sorted((file.metadata() or {}).items()))}


def raw(header, data, length=None):
    header = header if isinstance(header, bytes) else header.encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def case(name, about, contents, *refused, decision=""):
    compat.add("file-" + name, about, "opt", lambda directory: (directory / "model.safetensors").write_bytes(contents),
               {"file": reference}, ("model.safetensors", *refused) if refused else (), decision)


def entries(*tensors):
    """A header of (name, dtype, shape, begin, end)."""
    return "{" + ",".join(f'{json.dumps(name)}:{{"dtype":{json.dumps(dtype)},"shape":{json.dumps(shape)},"data_offsets":[{begin},{end}]}}'
                          for name, dtype, shape, begin, end in tensors) + "}"


W = ("w", "F16", [2, 2], 0, 8)
EIGHT = bytes(range(8))

# What is taken.
case("plain", "one tensor", raw(entries(W), EIGHT))
case("empty", "no tensor at all", raw("{}", b""))
case("space-first", "a header that begins with a space", raw(" " + entries(W), EIGHT))
case("padded", "a header that is padded with spaces", raw(entries(W) + "     ", EIGHT))
case("out-of-order", "a header whose order is not that of the data", raw(entries(("a", "F16", [2], 4, 8), ("b", "F16", [2], 0, 4)), EIGHT))
case("scalar-and-nothing", "a scalar, and tensors without elements", raw(entries(("s", "F32", [], 0, 4), ("none", "F32", [0, 7], 4, 4), ("t", "F32", [1], 4, 8)), EIGHT))
case("foreign-types", "types that are no weights here", raw(entries(*[(name, dtype, [8 * 8 // bits], 8 * i, 8 * i + 8) for i, (name, dtype, bits) in enumerate(
    [("a", "F64", 64), ("b", "I64", 64), ("c", "I32", 32), ("d", "I16", 16), ("e", "U8", 8), ("f", "BOOL", 8), ("g", "F8_E4M3", 8), ("h", "F8_E5M2", 8), ("i", "U16", 16),
     ("j", "U32", 32), ("k", "U64", 64), ("l", "I8", 8)])]), EIGHT * 12))
case("half-bytes", "types of fewer bits than a byte", raw(entries(("a", "F4", [4], 0, 2), ("b", "F6_E2M3", [4], 2, 5), ("c", "F8_E8M0", [3], 5, 8)), EIGHT))
case("complex", "a complex number", raw(entries(("w", "C64", [1], 0, 8)), EIGHT))
case("metadata", "metadata of strings", raw('{"__metadata__":{"format":"pt","note":""},"w":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]}}', EIGHT))
case("metadata-null", "metadata that is null", raw('{"__metadata__":null,"w":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]}}', EIGHT))
case("more-fields", "an entry with a field that nobody knows", raw('{"w":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8],"more":[1]}}', EIGHT))
case("nine-dimensions", "a tensor of nine dimensions", raw(entries(("w", "F16", [1] * 7 + [2, 2], 0, 8)), EIGHT))
case("escaped-name", "a name with escapes", raw('{"a\\u00e9\\n":{"dtype":"F16","shape":[4],"data_offsets":[0,8]}}', EIGHT))

# What lies outside the tensors.
case("trailing-bytes", "bytes behind the last tensor", raw(entries(W), EIGHT + b"x"), "1 bytes")
case("only-trailing-bytes", "data of which no tensor is made", raw("{}", EIGHT), "8 bytes")
case("hole-at-start", "data that begins with bytes of no tensor", raw(entries(("w", "F16", [2], 4, 8)), EIGHT), '"w"', "4")
case("hole-between", "bytes of no tensor between two", raw(entries(("a", "F16", [1], 0, 2), ("b", "F16", [2], 4, 8)), EIGHT), '"b"', "4")
case("overlap", "two tensors that share bytes", raw(entries(("a", "F16", [3], 0, 6), ("b", "F16", [2], 4, 8)), EIGHT), '"b"', "overlap")
case("same-bytes", "two names for the same bytes", raw(entries(("a", "F16", [4], 0, 8), ("b", "F16", [4], 0, 8)), EIGHT), "overlap")
case("cut", "a file that ends early", raw(entries(W), EIGHT[:-1]), '"w"', "7")
case("foreign-hole", "a hole between tensors that are no weights here", raw(entries(("a", "I64", [1], 0, 8), ("b", "I64", [1], 16, 24)), EIGHT * 3), '"b"')
case("nothing-in-a-hole", "a tensor without elements that lies beyond the data", raw(entries(W, ("z", "F16", [0], 100, 100)), EIGHT), '"z"')
case("nothing-elsewhere", "a tensor without elements in the midst of another", raw(entries(W, ("z", "F16", [0], 2, 2)), EIGHT), '"z"')

# Types, shapes and sizes.
case("unknown-type", "a type that there is not", raw(entries(("w", "F12", [2, 2], 0, 8)), EIGHT), '"w"', "F12")
case("lower-case-type", "a type in lower case", raw(entries(("w", "f16", [2, 2], 0, 8)), EIGHT), '"w"', "f16")
case("size-of-type", "half as many bytes as the type needs", raw(entries(("w", "F32", [2, 2], 0, 8)), EIGHT), '"w"', "16", "8")
case("foreign-size", "the same for a type that is no weight here", raw(entries(("w", "F64", [2, 2], 0, 8)), EIGHT), '"w"', "32", "8")
case("size-of-nothing", "bytes for no elements", raw(entries(("w", "F16", [0], 0, 8)), EIGHT), '"w"', "0", "8")
case("overflow", "a shape whose product overflows", raw(entries(("w", "F16", [1 << 32, 1 << 32], 0, 8)), EIGHT), '"w"', "shape")
case("overflow-to-zero", "one that overflows before it is multiplied with 0", raw(entries(("w", "F16", [1 << 32, 1 << 32, 0], 0, 0)), b""), '"w"', "shape")
case("half-a-byte", "elements that end within a byte", raw(entries(("w", "F4", [3], 0, 2)), EIGHT[:2]), '"w"', "no bytes")
case("many-dimensions", "a tensor of 66 dimensions", raw(entries(("w", "F16", [1] * 64 + [2, 2], 0, 8)), EIGHT), '"w"', "66 dimensions", decision="more than 64 dimensions")
case("entry-as-list", "an entry written as a list", raw('{"w":["F16",[4],[0,8]]}', EIGHT), '"w"', "not described by an object", decision="written as a list")
case("type-as-object", "a type written as an object", raw('{"w":{"dtype":{"F16":null},"shape":[4],"data_offsets":[0,8]}}', EIGHT), '"w"', "dtype", decision="type as an object")
case("deep", "a field that is nested deep", raw('{"w":{"dtype":"F16","shape":[4],"data_offsets":[0,8],"more":' + "[" * 60 + "]" * 60 + "}}", EIGHT), "nested deeper than 32",
     decision="nested deeper than 32")
case("negative-shape", "a negative dimension", raw(entries(("w", "F16", [-4], 0, 8)), EIGHT), '"w"', "shape")
case("fraction-in-shape", "a dimension that is no integer", raw(entries(("w", "F16", [4.0], 0, 8)), EIGHT), '"w"', "shape")
case("reversed-offsets", "an end before the begin", raw(entries(("w", "F16", [0], 8, 0)), EIGHT), '"w"', "8 to 0")
case("three-offsets", "three offsets", raw('{"w":{"dtype":"F16","shape":[4],"data_offsets":[0,8,8]}}', EIGHT), '"w"', "data_offsets")
case("no-offsets", "an entry without offsets", raw('{"w":{"dtype":"F16","shape":[4]}}', EIGHT), '"w"', "data_offsets")
case("no-type", "an entry without a type", raw('{"w":{"shape":[4],"data_offsets":[0,8]}}', EIGHT), '"w"', "dtype")
case("no-shape", "an entry without a shape", raw('{"w":{"dtype":"F16","data_offsets":[0,8]}}', EIGHT), '"w"', "shape")
case("null-entry", "an entry that is null", raw('{"w":null}', b""), '"w"')
case("type-twice", "an entry that gives its type twice", raw('{"w":{"dtype":"F16","dtype":"F16","shape":[4],"data_offsets":[0,8]}}', EIGHT), '"dtype" appears twice')

# Metadata.
for label, value in (("number", "7"), ("null-value", "null"), ("object", '{"a":"b"}'), ("list", '["a"]')):
    case(f"metadata-{label}", "metadata that is no string", raw(f'{{"__metadata__":{{"x":{value}}},{entries(W)[1:]}', EIGHT), "__metadata__", '"x"')
case("metadata-is-list", "metadata that is a list", raw(f'{{"__metadata__":[],{entries(W)[1:]}', EIGHT), "__metadata__")
case("metadata-is-text", "metadata that is a text", raw(f'{{"__metadata__":"pt",{entries(W)[1:]}', EIGHT), "__metadata__")
case("metadata-twice", "metadata twice", raw(f'{{"__metadata__":{{}},"__metadata__":{{}},{entries(W)[1:]}', EIGHT), '"__metadata__" appears twice')

# The header as text.
case("no-bytes", "an empty file", b"", "0 bytes")
case("seven-bytes", "a file that is too short for a header", b"\x02\0\0\0\0\0\0", "7 bytes")
case("no-header", "a header of no bytes", raw("", b""), "JSON")
case("long-header", "a header that is longer than the file", raw(entries(W), EIGHT, length=4096), "header of 4096")
case("huge-header", "a header of more than 100 MB", raw(entries(W), EIGHT, length=100_000_001), "header of 100000001")
case("byte-order-mark", "a header that begins with a byte order mark", raw("\ufeff" + entries(W), EIGHT), "byte order mark")
case("not-json", "a header that is no JSON", raw("{w: 1}", b""), "JSON")
case("not-an-object", "a header that is a list", raw("[]", b""), "object")
case("text-behind", "text behind the header's object", raw(entries(W) + "{}", EIGHT), "JSON")
case("zeros-behind", "zeros behind the header's object", raw(entries(W) + "\0\0", EIGHT), "JSON")
case("not-utf8", "a name that is not UTF-8", raw(b'{"w\xff":{"dtype":"F16","shape":[4],"data_offsets":[0,8]}}', EIGHT), "JSON")
case("half-a-character", "a name with half a surrogate", raw('{"w\\ud800":{"dtype":"F16","shape":[4],"data_offsets":[0,8]}}', EIGHT), "JSON")
case("control-character", "a name with a raw line feed", raw('{"w\n":{"dtype":"F16","shape":[4],"data_offsets":[0,8]}}', EIGHT), "JSON")
case("name-twice", "one name for two tensors", raw(entries(("w", "F16", [2], 0, 4), ("w", "F16", [2], 4, 8)), EIGHT), '"w" appears twice')
case("name-twice-same", "one name twice for the same tensor", raw(entries(W, W), EIGHT), '"w" appears twice', decision="twice")
case("not-a-number", "NaN as Python writes it", raw(f'{{"__metadata__":NaN,{entries(W)[1:]}', EIGHT), "JSON")
