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
        return {"names": names, "metadata": file.metadata() or {}}


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
