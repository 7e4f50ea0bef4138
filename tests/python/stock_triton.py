"""tritonclient as it comes from PyPI: at once, asynchronously, and in streams. Run by ./run protocols."""
import asyncio
import json
import queue
import threading

import numpy
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from google.protobuf import descriptor_pool
from tritonclient.utils import InferenceServerException

import published
from conftest import PATIENCE_S

PROMPT = "It was a dark night, and"
GREEDY = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}


def tensor(name, datatype, values):
    made = triton.InferInput(name, [len(values)], datatype)
    made.set_data_from_numpy(numpy.array(values, dtype={"BYTES": object, "BOOL": bool, "INT32": numpy.int32}[datatype]))
    return made


def inputs(text=None, ids=None, stream=False, **sampling):
    made = [tensor("sampling_parameters", "BYTES", [json.dumps({**GREEDY, **sampling}).encode()]), tensor("stream", "BOOL", [stream]),
            tensor("exclude_input_in_output", "BOOL", [True])]
    made.append(tensor("text_input", "BYTES", [text.encode()]) if ids is None else tensor("input_ids", "INT32", ids))
    return made


OUTPUTS = [triton.InferRequestedOutput("text_output"), triton.InferRequestedOutput("output_ids")]


@pytest.fixture
def model(daemon):
    return daemon.stub.GetModelInfo(daemon.api.pb.GetModelInfoRequest()).model


@pytest.fixture
def client(daemon):
    client = triton.InferenceServerClient(daemon.address)
    yield client
    client.close()


@pytest.fixture
def expected(daemon):
    request = daemon.api.pb.GenerateRequest(text=PROMPT)
    request.stopping.max_new_tokens, request.stopping.ignore_eos = 20, True
    return daemon.stub.Generate(request, timeout=PATIENCE_S)


def test_our_messages_are_the_published_ones(tmp_path):
    ours = published.ours("kserve/inference.proto", tmp_path)
    assert len(ours.message_types_by_name) > 40
    assert published.differences(ours, descriptor_pool.Default()) == []


def test_the_server_tells_what_it_is(client, model):
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(model) and not client.is_model_ready("other")
    assert client.get_server_metadata().name == "dejavud"
    assert "text_input" in [tensor.name for tensor in client.get_model_metadata(model).inputs]
    assert client.get_model_config(model).config.model_transaction_policy.decoupled
    assert client.get_model_repository_index().models[0].state == "READY"
    assert client.get_inference_statistics(model).model_stats[0].name == model
    assert client.get_trace_settings().settings and client.get_log_settings().settings
    client.unregister_system_shared_memory()
    client.unregister_cuda_shared_memory()
    with pytest.raises(InferenceServerException, match="not allowed"):
        client.load_model(model)


def test_infer(client, model, expected):
    for compression in (None, "gzip"):
        reply = client.infer(model, inputs(PROMPT), outputs=OUTPUTS, request_id="7", client_timeout=PATIENCE_S, compression_algorithm=compression)
        assert reply.as_numpy("text_output").tolist() == [expected.text.encode()]
        assert reply.as_numpy("output_ids").tolist() == list(expected.token_ids)
        assert reply.get_response().id == "7"


def test_async_infer_by_callbacks(client, model, expected):
    done = queue.Queue()
    for _ in range(8):
        client.async_infer(model, inputs(PROMPT), callback=lambda result, error: done.put((result, error)), client_timeout=PATIENCE_S)
    for _ in range(8):
        result, error = done.get(timeout=PATIENCE_S)
        assert error is None and result.as_numpy("text_output").tolist() == [expected.text.encode()]


def test_a_stream_by_callbacks(client, model, expected):
    heard = queue.Queue()
    client.start_stream(callback=lambda result, error: heard.put((result, error)))
    for id in ("a", "b"):
        client.async_stream_infer(model, inputs(PROMPT, stream=True), outputs=OUTPUTS, request_id=id, enable_empty_final_response=True)
    texts, open_ids = {"a": b"", "b": b""}, {"a", "b"}
    while open_ids:
        result, error = heard.get(timeout=PATIENCE_S)
        assert error is None, error
        response = result.get_response()
        texts[response.id] += result.as_numpy("text_output")[0]
        if response.parameters["triton_final_response"].bool_param:
            open_ids.remove(response.id)
    assert set(texts.values()) == {expected.text.encode()}
    client.async_stream_infer(model, inputs(PROMPT, temperature=-1), request_id="bad")
    result, error = heard.get(timeout=PATIENCE_S)
    assert result is None and "temperature is -1" in error.message()
    client.stop_stream()


def test_a_stream_that_is_cancelled_frees_everything(daemon, client, model):
    heard = queue.Queue()
    client.start_stream(callback=lambda result, error: heard.put((result, error)))
    client.async_stream_infer(model, inputs(PROMPT, stream=True, max_tokens=400))
    assert heard.get(timeout=PATIENCE_S)[1] is None
    client.stop_stream(cancel_requests=True)
    daemon.expect_idle()


def test_asyncio(daemon, model, expected):
    async def all():
        async with triton_aio.InferenceServerClient(daemon.address) as client:
            replies = await asyncio.gather(*(client.infer(model, inputs(PROMPT), client_timeout=PATIENCE_S) for _ in range(8)))
            assert {reply.as_numpy("text_output")[0] for reply in replies} == {expected.text.encode()}

            async def requests():
                yield {"model_name": model, "inputs": inputs(PROMPT, stream=True), "request_id": "s"}

            text = b""
            async for result, error in client.stream_infer(requests()):
                assert error is None
                text += result.as_numpy("text_output")[0]
            assert text == expected.text.encode()

    asyncio.run(asyncio.wait_for(all(), PATIENCE_S))


def test_errors_have_their_code_and_their_field(client, model):
    with pytest.raises(InferenceServerException, match="top_p is 2") as error:
        client.infer(model, inputs(PROMPT, top_p=2))
    assert error.value.status() == "StatusCode.INVALID_ARGUMENT"
    with pytest.raises(InferenceServerException) as error:
        client.infer("other", inputs(PROMPT))
    assert error.value.status() == "StatusCode.NOT_FOUND"
