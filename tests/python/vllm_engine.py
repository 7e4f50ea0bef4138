"""vLLM's engine protocol by hand: requests as gateways send them, and what replies add up to."""
from conftest import PATIENCE_S, compile_protos

SERVICE = "vllm.grpc.engine.VllmEngine"


def stubs(out):
    """The modules of proto/vllm and proto/smg. `out`: a folder for them."""
    compile_protos(out, "vllm/engine.proto", "smg/common.proto")
    from smg import common_pb2
    from vllm import engine_pb2, engine_pb2_grpc
    return engine_pb2, engine_pb2_grpc, common_pb2


def ask(pb, ids=None, text=None, stream=False, request_id="", **params):
    params = {"temperature": 0, "ignore_eos": True, "max_tokens": 20, **params}
    params = {name: value for name, value in params.items() if value is not None}
    request = pb.GenerateRequest(request_id=request_id, stream=stream, sampling_params=pb.SamplingParams(**params))
    if text is not None:
        request.text = text
    if ids is not None:
        request.tokenized.input_ids.extend(ids)
    return request


def generate(stub, request):
    """Tokens and last word of each sample, by its index; chunks as they came."""
    tokens, completes, chunks = {}, {}, []
    for reply in stub.Generate(request, timeout=PATIENCE_S):
        if reply.HasField("chunk"):
            assert request.stream and reply.chunk.index not in completes
            assert reply.chunk.completion_tokens == len(reply.chunk.token_ids) > 0
            tokens.setdefault(reply.chunk.index, []).extend(reply.chunk.token_ids)
            chunks.append(reply.chunk)
        else:
            complete = reply.complete
            assert complete.index not in completes
            completes[complete.index] = complete
            if request.stream and complete.output_ids:  # what the last chunk had, as vLLM says it again
                assert tokens[complete.index][-len(complete.output_ids):] == list(complete.output_ids)
            elif not request.stream:
                tokens[complete.index] = list(complete.output_ids)
            assert complete.completion_tokens == len(tokens[complete.index])
    return tokens, completes, chunks
