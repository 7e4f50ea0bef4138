"""One server, several protocols: the same requests have the same tokens in each of them, and each leaves nothing behind."""
import random
import threading

import pytest

import open_inference as oip
import vllm_engine
from conftest import PATIENCE_S

REQUESTS = 200


@pytest.fixture(scope="module")
def speakers(daemon, tmp_path_factory):
    """By protocol: the tokens of a request that is given as our API has it."""
    kserve, kserve_rpc = oip.generate(tmp_path_factory.mktemp("kserve"))
    engine, engine_rpc, _ = vllm_engine.stubs(tmp_path_factory.mktemp("vllm"))
    triton, vllm = kserve_rpc.GRPCInferenceServiceStub(daemon.channel), engine_rpc.VllmEngineStub(daemon.channel)

    def parameters(request):
        sampling, stopping, penalties = request.sampling, request.stopping, request.penalties
        return {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p, "seed": sampling.seed,
                "max_tokens": stopping.max_new_tokens, "ignore_eos": stopping.ignore_eos, "stop_token_ids": list(stopping.stop_token_ids),
                "repetition_penalty": penalties.repetition}

    def of_dejavu(request):
        return list(daemon.stub.Generate(request, timeout=PATIENCE_S).token_ids)

    def of_kserve(request):
        asked = oip.infer(kserve, ids=list(request.token_ids.ids), outputs=["output_ids"], **parameters(request))
        return oip.tensors(triton.ModelInfer(asked, timeout=PATIENCE_S))["output_ids"]

    def of_kserve_stream(request):
        asked = oip.infer(kserve, ids=list(request.token_ids.ids), outputs=["output_ids"], stream=True, **parameters(request))
        replies = list(triton.ModelStreamInfer(iter([asked]), timeout=PATIENCE_S))
        return [id for reply in replies for id in oip.tensors(reply.infer_response)["output_ids"]]

    def of_vllm(request, stream=False):
        tokens, _, _ = vllm_engine.generate(vllm, vllm_engine.ask(engine, ids=list(request.token_ids.ids), stream=stream, **parameters(request)))
        return tokens[0]

    return {"dejavu": of_dejavu, "kserve": of_kserve, "kserve stream": of_kserve_stream, "vllm": of_vllm,
            "vllm stream": lambda request: of_vllm(request, stream=True)}


def mixed(daemon, i):
    choose = random.Random(i)
    request = daemon.request([2] + [choose.randrange(4, 8192) for _ in range(choose.randrange(1, 60))], choose.randrange(1, 24))
    request.sampling.temperature = choose.choice([0, 0.5, 1, 1.5])
    request.sampling.top_k, request.sampling.top_p, request.sampling.seed = choose.choice([0, 5, 40]), choose.choice([0.5, 0.75, 1]), i
    request.penalties.repetition = choose.choice([1, 1.5])
    request.stopping.ignore_eos = bool(i % 3)
    request.stopping.stop_token_ids.extend(choose.sample(range(4, 300), i % 4))
    return request


def test_two_hundred_requests_have_the_same_tokens_in_every_protocol(daemon, speakers):
    found = {name: [None] * REQUESTS for name in speakers}
    turns = iter([(name, i) for i in range(REQUESTS) for name in speakers])
    lock = threading.Lock()

    def client():
        while True:
            with lock:
                turn = next(turns, None)
            if turn is None:
                return
            name, i = turn
            found[name][i] = speakers[name](mixed(daemon, i))

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in speakers:
        different = [i for i in range(REQUESTS) if found[name][i] != found["dejavu"][i]]
        assert different == [], name
    assert len({len(tokens) for tokens in found["dejavu"]}) > 10
    daemon.expect_idle()
