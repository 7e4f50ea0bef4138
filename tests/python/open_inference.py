"""The Open Inference Protocol by hand: requests as stock clients send them, and what a reply's tensors hold."""
import json
import struct

SERVICE = "inference.GRPCInferenceService"
NUMBERS = {"INT32": "i", "UINT32": "I", "FP32": "f", "INT64": "q"}


def generate(out):
    """The modules of proto/kserve. `out`: a folder for them."""
    from conftest import compile_protos
    compile_protos(out, "kserve/inference.proto")
    from kserve import inference_pb2, inference_pb2_grpc
    return inference_pb2, inference_pb2_grpc


def raw(datatype, values):
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(value)) + value for value in values)
    if datatype == "BOOL":
        return bytes(values)
    return struct.pack(f"<{len(values)}{NUMBERS[datatype]}", *values)


def add(request, name, datatype, values, shape=None):
    tensor = request.inputs.add(name=name, datatype=datatype, shape=[len(values)] if shape is None else shape)
    request.raw_input_contents.append(raw(datatype, values))
    return tensor


def infer(pb, text=None, ids=None, stream=None, exclude=None, outputs=(), id="", flags=(), model="", **sampling):
    """A ModelInferRequest with tensors in raw bytes."""
    request = pb.ModelInferRequest(model_name=model, id=id)
    if text is not None:
        add(request, "text_input", "BYTES", [text.encode()])
    if ids is not None:
        add(request, "input_ids", "INT32", ids)
    if stream is not None:
        add(request, "stream", "BOOL", [stream])
    if exclude is not None:
        add(request, "exclude_input_in_output", "BOOL", [exclude])
    for flag in flags:
        add(request, flag, "BOOL", [True])
    if sampling:
        add(request, "sampling_parameters", "BYTES", [json.dumps(sampling).encode()])
    for name in outputs:
        request.outputs.add(name=name)
    return request


def tensors(response):
    """Name to list of values."""
    found = {}
    for tensor, content in zip(response.outputs, response.raw_output_contents, strict=True):
        values = []
        if tensor.datatype == "BYTES":
            at = 0
            while at < len(content):
                (length,) = struct.unpack_from("<I", content, at)
                values.append(content[at + 4:at + 4 + length])
                at += 4 + length
        else:
            code = NUMBERS[tensor.datatype]
            values = list(struct.unpack(f"<{len(content) // struct.calcsize(code)}{code}", content))
        assert list(tensor.shape) == [len(values)]
        found[tensor.name] = values
    return found
