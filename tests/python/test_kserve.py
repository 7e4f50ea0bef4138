"""The Open Inference Protocol: what a client of KServe or Triton sends and hears. Stock clients are ./run protocols' part."""
import json
import queue
import signal
import struct
import threading
import time
import types

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import groups
import open_inference as oip
from conftest import PATIENCE_S
from groups import Case
from test_client import details, expect_error
from test_security import token_lines

PROMPT = "It was a dark night, and"
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="session")
def kserve(tmp_path_factory):
    return oip.generate(tmp_path_factory.mktemp("kserve"))


def stub_of(daemon, kserve):
    return kserve[1].GRPCInferenceServiceStub(daemon.channel)


@pytest.fixture
def stub(daemon, kserve):
    return stub_of(daemon, kserve)


@pytest.fixture
def pb(kserve):
    return kserve[0]


class Stream:
    """A ModelStreamInfer whose requests are sent when the test wants."""

    def __init__(self, stub, **options):
        self._requests = queue.Queue()
        self.call = stub.ModelStreamInfer(iter(self._requests.get, None), timeout=PATIENCE_S, **options)

    def send(self, *requests):
        for request in requests:
            self._requests.put(request)

    def close(self):
        self._requests.put(None)

    def read(self):
        return next(self.call)

    def read_until_final(self, id):
        """All replies of a request."""
        replies = []
        while True:
            reply = self.read()
            assert not reply.error_message and reply.infer_response.id == id, reply
            replies.append(oip.tensors(reply.infer_response))
            if reply.infer_response.parameters["triton_final_response"].bool_param:
                return replies


def native(daemon, text, tokens, **fields):
    request = daemon.api.pb.GenerateRequest(text=text, **fields)
    request.stopping.max_new_tokens = tokens
    request.stopping.ignore_eos = True
    return daemon.stub.Generate(request, timeout=PATIENCE_S)


def test_an_inference_says_what_generate_says(daemon, stub, pb):
    ours = native(daemon, PROMPT, 20)
    reply = stub.ModelInfer(oip.infer(pb, PROMPT, exclude=True, id="a", outputs=["text_output", "output_ids", "finish_reason"],
                                      max_tokens=20, **GREEDY), timeout=PATIENCE_S)
    assert (reply.id, reply.model_version) == ("a", "1")
    found = oip.tensors(reply)
    assert found == {"text_output": [ours.text.encode()], "output_ids": list(ours.token_ids), "finish_reason": [b"length"]}


def test_the_prompt_stands_before_the_output_unless_it_is_excluded(daemon, stub, pb):
    ours = native(daemon, PROMPT, 8)
    reply = stub.ModelInfer(oip.infer(pb, PROMPT, max_tokens=8, **GREEDY), timeout=PATIENCE_S)
    assert oip.tensors(reply) == {"text_output": [(PROMPT + ours.text).encode()]}


def test_a_prompt_of_ids_may_stand_before_the_output_too(daemon, stub, pb):
    ids = list(daemon.stub.Tokenize(daemon.api.pb.TokenizeRequest(text=PROMPT), timeout=PATIENCE_S).token_ids)
    ours = native(daemon, PROMPT, 8)
    reply = stub.ModelInfer(oip.infer(pb, ids=ids, exclude=False, max_tokens=8, **GREEDY), timeout=PATIENCE_S)
    assert oip.tensors(reply) == {"text_output": [(PROMPT + ours.text).encode()]}


def test_prompt_logprobs_are_told_once(daemon, stub, pb):
    score = daemon.api.pb.ScoreRequest(text=PROMPT, top_logprobs=2)
    ours = daemon.stub.Score(score, timeout=PATIENCE_S).tokens
    plain = oip.tensors(stub.ModelInfer(oip.infer(pb, PROMPT, max_tokens=6, **GREEDY), timeout=PATIENCE_S))

    def expect(found, top):
        (text,) = found["prompt_logprobs"]
        told = json.loads(text)
        assert len(told) == len(ours) and told[0] is None
        for before, token, entries in zip(ours, ours[1:], told[1:]):
            own = entries[str(token.id)]
            assert (own["logprob"], own["rank"]) == (pytest.approx(token.logprob, abs=1e-6), token.rank)
            others = {str(a.id): pytest.approx(a.logprob, abs=1e-6) for a in before.top[:top]}
            assert {id: e["logprob"] for id, e in entries.items() if id != str(token.id)} == {
                id: logprob for id, logprob in others.items() if id != str(token.id)}
            assert own["decoded_token"] == daemon.stub.Detokenize(daemon.api.pb.DetokenizeRequest(token_ids=[token.id])).text

    for top in (0, 2):
        found = oip.tensors(stub.ModelInfer(oip.infer(pb, PROMPT, max_tokens=6, prompt_logprobs=top, **GREEDY), timeout=PATIENCE_S))
        expect(found, top)
        assert found["text_output"] == plain["text_output"]
    found = oip.tensors(stub.ModelInfer(oip.infer(pb, PROMPT, outputs=["prompt_logprobs"], max_tokens=0, prompt_logprobs=1), timeout=PATIENCE_S))
    assert list(found) == ["prompt_logprobs"]
    expect(found, 1)
    found = oip.tensors(stub.ModelInfer(oip.infer(pb, PROMPT, outputs=["text_output"], max_tokens=1, prompt_logprobs=1), timeout=PATIENCE_S))
    assert list(found) == ["text_output"]
    stream = Stream(stub)
    stream.send(oip.infer(pb, PROMPT, stream=True, id="s", max_tokens=6, prompt_logprobs=2, **GREEDY))
    replies = stream.read_until_final("s")
    expect(replies[0], 2)
    assert not any("prompt_logprobs" in reply for reply in replies[1:])
    # As many as a reply among others may hold.
    stream.send(oip.infer(pb, ids=[5] * 300, id="t", max_tokens=1, prompt_logprobs=20))
    assert "prompt_logprobs makes a reply of up to 6300 entries; at most 4096" in stream.read().error_message
    stream.close()


def test_the_end_of_a_prompt_is_kept(daemon, stub, pb):
    ids = [2] + [5 + i % 700 for i in range(700)]
    for most, kept in ((7, ids[-7:]), (-1, ids[-(512 - 4):])):
        request = oip.infer(pb, ids=ids, outputs=["output_ids", "num_input_tokens"], max_tokens=5, truncate_prompt_tokens=most, **GREEDY)
        found = oip.tensors(stub.ModelInfer(request, timeout=PATIENCE_S))
        assert found["num_input_tokens"] == [len(kept)]
        assert found["output_ids"] == list(daemon.stub.Generate(daemon.request(kept, 5), timeout=PATIENCE_S).token_ids)


@pytest.mark.parametrize("datatype", ["INT32", "UINT32", "INT64"])
def test_token_ids_are_taken_as_they_are(daemon, stub, pb, datatype):
    ours = daemon.stub.Generate(daemon.request([2, 100, 200], 12), timeout=PATIENCE_S)
    request = oip.infer(pb, outputs=["output_ids"], max_tokens=12, **GREEDY)
    oip.add(request, "input_ids", datatype, [2, 100, 200], shape=[1, 3])
    assert oip.tensors(stub.ModelInfer(request, timeout=PATIENCE_S)) == {"output_ids": list(ours.token_ids)}


def test_contents_may_stand_in_the_tensors(daemon, stub, pb):
    ours = daemon.stub.Generate(daemon.request([2, 100, 200], 5), timeout=PATIENCE_S)
    request = pb.ModelInferRequest(outputs=[{"name": "output_ids"}])
    request.inputs.add(name="input_ids", datatype="INT32", shape=[3]).contents.int_contents.extend([2, 100, 200])
    sampling = request.inputs.add(name="sampling_parameters", datatype="BYTES", shape=[1])
    sampling.contents.bytes_contents.append(json.dumps({"max_tokens": 5, **GREEDY}).encode())
    request.inputs.add(name="return_num_output_tokens", datatype="BOOL", shape=[1]).contents.bool_contents.append(True)
    assert oip.tensors(stub.ModelInfer(request, timeout=PATIENCE_S))["output_ids"] == list(ours.token_ids)


def test_every_sampling_parameter_reaches_the_engine(daemon, stub, pb):
    """Each beside the same field of our own API, where it changes the tokens."""
    request = daemon.request([2, 100, 200], 24)
    request.sampling.temperature, request.sampling.top_k, request.sampling.top_p = 0.9, 40, 0.95
    request.sampling.min_p, request.sampling.seed = 0.01, 11
    request.penalties.repetition, request.penalties.presence, request.penalties.frequency = 1.2, 0.5, 0.25
    request.penalties.logit_bias[300] = 3.5
    ours = daemon.stub.Generate(request, timeout=PATIENCE_S)
    # As Triton's own sample does: numbers as strings.
    theirs = {"temperature": "0.9", "top_k": "40", "top_p": 0.95, "min_p": 0.01, "seed": 11, "repetition_penalty": 1.2,
              "presence_penalty": 0.5, "frequency_penalty": 0.25, "logit_bias": {"300": 3.5}, "max_tokens": "24", "ignore_eos": True,
              "n": 1, "stop": None, "best_of": 1, "skip_special_tokens": True}
    reply = stub.ModelInfer(oip.infer(pb, ids=[2, 100, 200], outputs=["output_ids"], **theirs), timeout=PATIENCE_S)
    assert oip.tensors(reply)["output_ids"] == list(ours.token_ids)
    # The same as parameters of the request, where there is no tensor of them.
    request = oip.infer(pb, ids=[2, 100, 200], outputs=["output_ids"])
    for name, value in {"temperature": 0.9, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2, "presence_penalty": 0.5,
                        "frequency_penalty": 0.25}.items():
        request.parameters[name].double_param = value
    for name, value in {"top_k": 40, "seed": 11, "max_tokens": 24}.items():
        request.parameters[name].int64_param = value
    request.parameters["ignore_eos"].bool_param = True
    biased = daemon.request([2, 100, 200], 24)
    biased.CopyFrom(request_without_bias(daemon))
    ours = daemon.stub.Generate(biased, timeout=PATIENCE_S)
    assert oip.tensors(stub.ModelInfer(request, timeout=PATIENCE_S))["output_ids"] == list(ours.token_ids)


def request_without_bias(daemon):
    request = daemon.request([2, 100, 200], 24)
    request.sampling.temperature, request.sampling.top_k, request.sampling.top_p = 0.9, 40, 0.95
    request.sampling.min_p, request.sampling.seed = 0.01, 11
    request.penalties.repetition, request.penalties.presence, request.penalties.frequency = 1.2, 0.5, 0.25
    return request


def test_stop_strings_and_what_ended_the_text(daemon, stub, pb):
    free = native(daemon, PROMPT, 40).text
    stop = free[len(free) // 2:len(free) // 2 + 6]
    for stops in (stop, [stop, "in a string \\\"" + "[" * 20]):
        reply = stub.ModelInfer(oip.infer(pb, PROMPT, exclude=True, flags=["return_finish_reason"], max_tokens=40, stop=stops, **GREEDY),
                                timeout=PATIENCE_S)
        assert oip.tensors(reply) == {"text_output": [free[:free.index(stop)].encode()], "finish_reason": [b"stop"]}
    reply = stub.ModelInfer(oip.infer(pb, PROMPT, exclude=True, max_tokens=40, stop=stop, include_stop_str_in_output=True, **GREEDY),
                            timeout=PATIENCE_S)
    assert oip.tensors(reply)["text_output"] == [free[:free.index(stop) + len(stop)].encode()]


def test_samples_are_rows_of_the_outputs(daemon, stub, pb):
    request = daemon.api.pb.GenerateRequest(text=PROMPT)
    request.sampling.temperature, request.sampling.seed, request.sampling.samples = 1.0, 5, 3
    request.stopping.max_new_tokens, request.stopping.ignore_eos = 10, True
    ours = daemon.stub.Generate(request, timeout=PATIENCE_S)
    reply = stub.ModelInfer(oip.infer(pb, PROMPT, exclude=True, flags=["return_num_output_tokens", "return_num_input_tokens"], n=3, seed=5,
                                      max_tokens=10, ignore_eos=True), timeout=PATIENCE_S)
    assert oip.tensors(reply) == {"text_output": [s.text.encode() for s in (ours, *ours.more_samples)],
                                  "num_output_tokens": [10, 10, 10], "num_input_tokens": [ours.prompt.prompt_tokens]}


def test_logprobs_are_those_of_our_api(daemon, stub, pb):
    request = daemon.request([2, 100, 200], 6)
    request.output.top_logprobs = 2
    ours = daemon.stub.Generate(request, timeout=PATIENCE_S)
    reply = stub.ModelInfer(oip.infer(pb, ids=[2, 100, 200], flags=["return_logprobs", "return_cumulative_logprob"], logprobs=2, max_tokens=6,
                                      **GREEDY), timeout=PATIENCE_S)
    found = oip.tensors(reply)
    tokens = json.loads(found["logprobs"][0])
    assert len(tokens) == 6
    for token, id, logprobs in zip(tokens, ours.token_ids, ours.logprobs):
        assert token[str(id)]["logprob"] == pytest.approx(logprobs.logprob) and token[str(id)]["rank"] == logprobs.rank == 1
        assert {int(other) for other in token} == {id, *(top.id for top in logprobs.top)}
        assert token[str(id)]["decoded_token"] == daemon.stub.Detokenize(daemon.api.pb.DetokenizeRequest(token_ids=[id])).text
    assert found["cumulative_logprob"][0] == pytest.approx(sum(l.logprob for l in ours.logprobs), rel=1e-5)


def test_outputs_that_nothing_asks_to_make_are_left_out(stub, pb):
    """As Triton's backend does it; perf_analyzer names all that the model has."""
    names = [each.name for each in stub.ModelMetadata(pb.ModelMetadataRequest(name=stub.RepositoryIndex(pb.RepositoryIndexRequest()).models[0].name)).outputs]
    found = oip.tensors(stub.ModelInfer(oip.infer(pb, PROMPT, outputs=names, max_tokens=4, **GREEDY), timeout=PATIENCE_S))
    assert set(names) - set(found) == {"cumulative_logprob", "logprobs", "prompt_logprobs"}


def test_a_stream_gives_the_text_in_pieces(braked, kserve):
    stub, pb = stub_of(braked, kserve), kserve[0]
    ours = native(braked, PROMPT, 60)
    stream = Stream(stub)
    stream.send(oip.infer(pb, PROMPT, stream=True, id="s", outputs=["text_output", "output_ids"], max_tokens=60, **GREEDY))
    replies = stream.read_until_final("s")
    assert len(replies) > 1
    assert b"".join(r["text_output"][0] for r in replies) == ours.text.encode()
    assert [i for r in replies for i in r["output_ids"]] == list(ours.token_ids)
    # Another one, that does not stream.
    stream.send(oip.infer(pb, PROMPT, stream=False, exclude=True, id="t", max_tokens=60, **GREEDY))
    assert stream.read_until_final("t") == [{"text_output": [ours.text.encode()]}]
    stream.close()
    assert list(stream.call) == [] and stream.call.code() == grpc.StatusCode.OK


def test_requests_of_a_stream_run_side_by_side_and_the_half_close_loses_none(daemon, stub, pb):
    count = 100  # more than are read at once
    stream = Stream(stub)
    stream.send(*(oip.infer(pb, ids=[2, 100 + i], stream=bool(i % 2), id=str(i), outputs=["output_ids"], max_tokens=8, **GREEDY)
                  for i in range(count)))
    stream.close()
    found, finals = {str(i): [] for i in range(count)}, set()
    for reply in stream.call:
        assert not reply.error_message, reply
        id = reply.infer_response.id
        assert id not in finals
        found[id] += oip.tensors(reply.infer_response)["output_ids"]
        if reply.infer_response.parameters["triton_final_response"].bool_param:
            finals.add(id)
    assert stream.call.code() == grpc.StatusCode.OK and len(finals) == count
    for i in range(0, count, 7):
        assert found[str(i)] == list(daemon.stub.Generate(daemon.request([2, 100 + i], 8), timeout=PATIENCE_S).token_ids)
    daemon.expect_idle()


def test_what_fails_in_a_stream_is_told_by_its_id_and_the_stream_goes_on(daemon, stub, pb):
    stream = Stream(stub)
    bad = oip.infer(pb, PROMPT, id="bad", temperature=-1)
    good = oip.infer(pb, PROMPT, stream=True, id="good", max_tokens=3, **GREEDY)
    stream.send(bad)
    reply = stream.read()
    assert reply.infer_response.id == "bad" and reply.error_message.startswith("temperature is -1"), reply
    stream.send(oip.infer(pb, PROMPT, id="x" * 2000))
    reply = stream.read()
    assert reply.infer_response.id == "" and reply.error_message == "id has 2000 bytes; at most 1024 are allowed", reply
    # A large reply would hold up the others.
    large = oip.infer(pb, PROMPT, exclude=True, id="large", flags=["return_logprobs"], max_tokens=300, logprobs=20, **GREEDY)
    stream.send(large)
    reply = stream.read()
    assert reply.infer_response.id == "large" and "about 6300 entries; at most 4096" in reply.error_message, reply
    assert len(json.loads(oip.tensors(stub.ModelInfer(large, timeout=PATIENCE_S))["logprobs"][0])) == 300
    stream.send(good)
    assert stream.read_until_final("good")
    stream.close()
    assert list(stream.call) == []
    daemon.expect_idle()


def test_the_same_id_may_be_used_by_several_at_once(daemon, stub, pb):
    calls = [stub.ModelInfer.future(oip.infer(pb, PROMPT, id="1", max_tokens=20, **GREEDY), timeout=PATIENCE_S) for _ in range(4)]
    assert len({oip.tensors(call.result())["text_output"][0] for call in calls}) == 1


def test_cancels_and_deadlines_free_everything(braked, kserve):
    stub, pb = stub_of(braked, kserve), kserve[0]
    long = oip.infer(pb, PROMPT, stream=True, max_tokens=400, **GREEDY)
    stream = Stream(stub)
    stream.send(long, long, long)
    for _ in range(5):
        stream.read()
    stream.call.cancel()
    expect_error(lambda: list(stream.call), grpc.StatusCode.CANCELLED)
    braked.expect_idle()

    call = stub.ModelInfer.future(oip.infer(pb, PROMPT, max_tokens=400, **GREEDY), timeout=PATIENCE_S)
    call.cancel()
    braked.expect_idle()
    whole = oip.infer(pb, PROMPT, max_tokens=400, **GREEDY)
    expect_error(lambda: stub.ModelInfer(whole, timeout=0.5), grpc.StatusCode.DEADLINE_EXCEEDED)
    braked.expect_idle()
    # The request's own, in microseconds.
    whole.parameters["timeout"].int64_param = 300_000
    error = expect_error(lambda: stub.ModelInfer(whole, timeout=PATIENCE_S), grpc.StatusCode.DEADLINE_EXCEEDED)
    assert "the deadline passed after" in error.details()
    stream = Stream(stub)
    long.parameters["timeout"].int64_param = 300_000
    stream.send(long)
    *_, last = iter_to_error(stream)
    assert "the deadline passed after" in last.error_message
    stream.close()
    assert list(stream.call) == []
    braked.expect_idle()


def iter_to_error(stream):
    while True:
        reply = stream.read()
        yield reply
        if reply.error_message:
            return


def test_a_drain_lets_requests_of_streams_end_and_refuses_new_ones(start, kserve):
    daemon = start("--scheduler-fault", "slow@10", "--scheduler-deadline-slack", "0")
    stub, pb = stub_of(daemon, kserve), kserve[0]
    assert stub.ServerReady(pb.ServerReadyRequest(), timeout=PATIENCE_S).ready
    stream = Stream(stub)
    stream.send(oip.infer(pb, PROMPT, stream=True, id="running", max_tokens=400, **GREEDY))
    stream.read()
    daemon.terminate()
    while stub.ServerReady(pb.ServerReadyRequest(), timeout=PATIENCE_S).ready:
        time.sleep(0.01)
    refused = ""
    for _ in range(100):  # a server that is about to drain still takes some; each has one reply, a step or more later
        stream.send(oip.infer(pb, PROMPT, id="late", max_tokens=1, **GREEDY))
        while (reply := stream.read()).infer_response.id == "running":
            assert not reply.error_message, reply
        refused = reply.error_message
        if refused:
            break
    assert "shutting down" in refused
    assert stream.read_until_final("running")
    assert daemon.wait() == 0


def test_a_stop_ends_a_stream_that_reads_no_more(start, kserve):
    daemon = start("--scheduler-fault", "slow@10", "--scheduler-deadline-slack", "0", "--drain-timeout-s", "0")
    stub, pb = stub_of(daemon, kserve), kserve[0]
    stream = Stream(stub)
    ids = {str(i) for i in range(64)}  # as many as run at once
    stream.send(*(oip.infer(pb, PROMPT, id=id, max_tokens=400, **GREEDY) for id in ids))
    groups.until(lambda: daemon.load().running_requests + daemon.load().waiting_requests == 64, daemon.load)
    daemon.terminate()
    stopped = set()

    def read():
        for reply in stream.call:
            assert reply.error_message, reply
            stopped.add(reply.infer_response.id)

    error = expect_error(read, grpc.StatusCode.UNAVAILABLE)
    assert (error.details(), stopped) == ("the server has stopped", ids)
    daemon.wait()


def test_what_clients_ask_at_start_is_answered(daemon, stub, pb):
    model = daemon.stub.GetModelInfo(daemon.api.pb.GetModelInfoRequest()).model
    assert stub.ServerLive(pb.ServerLiveRequest()).live and stub.ServerReady(pb.ServerReadyRequest()).ready
    assert stub.ModelReady(pb.ModelReadyRequest(name=model)).ready and stub.ModelReady(pb.ModelReadyRequest(name=model, version="1")).ready
    assert not stub.ModelReady(pb.ModelReadyRequest(name="other")).ready
    assert not stub.ModelReady(pb.ModelReadyRequest(name=model, version="2")).ready
    assert stub.ServerMetadata(pb.ServerMetadataRequest()).name == "dejavud"
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name=model))
    config = stub.ModelConfig(pb.ModelConfigRequest(name=model)).config
    assert [t.name for t in metadata.inputs] == [t.name for t in config.input] and "sampling_parameters" in [t.name for t in config.input]
    assert {t.name: t.datatype for t in metadata.outputs}["output_ids"] == "INT32"
    assert config.model_transaction_policy.decoupled and config.max_batch_size == 0 and config.backend == "vllm"
    (index,) = stub.RepositoryIndex(pb.RepositoryIndexRequest()).models
    assert (index.name, index.version, index.state) == (model, "1", "READY")
    before = stub.ModelStatistics(pb.ModelStatisticsRequest(name=model)).model_stats[0]
    for tokens in (4, 1):
        stub.ModelInfer(oip.infer(pb, PROMPT, max_tokens=tokens, **GREEDY), timeout=PATIENCE_S)
    after = stub.ModelStatistics(pb.ModelStatisticsRequest(name=model)).model_stats[0]
    assert after.inference_count == before.inference_count + 2 and after.inference_stats.success.ns > before.inference_stats.success.ns
    computed = lambda of: {getattr(of.inference_stats, f"compute_{part}").count for part in ("input", "infer", "output")}
    assert computed(after) == {count + 2 for count in computed(before)} and len(computed(after)) == 1  # or perf_analyzer ends itself
    assert not stub.SystemSharedMemoryStatus(pb.SystemSharedMemoryStatusRequest()).regions
    stub.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest())
    stub.CudaSharedMemoryUnregister(pb.CudaSharedMemoryUnregisterRequest())
    assert stub.TraceSetting(pb.TraceSettingRequest()).settings["trace_level"].value == ["OFF"]
    assert stub.LogSettings(pb.LogSettingsRequest()).settings["log_error"].bool_param
    unavailable = grpc.StatusCode.UNAVAILABLE
    expect_error(lambda: stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=model)), unavailable)
    expect_error(lambda: stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name=model)), unavailable)
    expect_error(lambda: stub.SystemSharedMemoryRegister(pb.SystemSharedMemoryRegisterRequest(name="a")), unavailable)
    expect_error(lambda: stub.TraceSetting(pb.TraceSettingRequest(settings={"trace_level": {"value": ["TIMESTAMPS"]}})), unavailable)
    expect_error(lambda: stub.LogSettings(pb.LogSettingsRequest(settings={"log_info": {"bool_param": False}})), unavailable)


def test_reflection_knows_the_service(daemon):
    assert oip.SERVICE in ProtoReflectionDescriptorDatabase(daemon.channel).get_services()


def test_each_request_of_a_stream_is_counted_by_itself(start, kserve):
    daemon = start()
    stub, pb = stub_of(daemon, kserve), kserve[0]

    def counted():
        found = {}
        for labels, value in groups.samples_of(daemon, "dejavu_requests_total").items():
            labels = dict(labels)
            if labels["api"] == "kserve" and labels["method"] == "ModelStreamInfer":
                key = labels["code"], labels["finish_reason"]
                found[key] = found.get(key, 0) + value
        return found

    stream = Stream(stub)
    stream.send(*[oip.infer(pb, PROMPT, max_tokens=2, **GREEDY)] * 3, oip.infer(pb, PROMPT, temperature=-1))
    stream.close()
    assert len(list(stream.call)) == 4
    # Three requests, one that was refused, and the stream itself.
    wanted = {("OK", "length"): 3, ("INVALID_ARGUMENT", "none"): 1, ("OK", "none"): 1}
    groups.until(lambda: {key: value for key, value in counted().items() if value} == wanted, counted)


def test_tokens_hold_for_this_protocol_too(start, kserve, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text(token_lines({"a": "secret-of-a", "operators": "secret-of-operators"}))
    daemon = start("--auth-tokens-file", tokens, wait=False)
    stub, pb = stub_of(daemon, kserve), kserve[0]
    while not stub.ServerReady(pb.ServerReadyRequest(), timeout=PATIENCE_S).ready:  # without a token
        time.sleep(0.02)
    of_a = (("authorization", "Bearer secret-of-a"),)
    request = oip.infer(pb, PROMPT, max_tokens=2, **GREEDY)
    expect_error(lambda: stub.ModelInfer(request, timeout=PATIENCE_S), grpc.StatusCode.UNAUTHENTICATED)
    assert oip.tensors(stub.ModelInfer(request, timeout=PATIENCE_S, metadata=of_a))["text_output"]
    refused = Stream(stub)
    expect_error(refused.read, grpc.StatusCode.UNAUTHENTICATED)
    statistics = pb.ModelStatisticsRequest()
    expect_error(lambda: stub.ModelStatistics(statistics, timeout=PATIENCE_S, metadata=of_a), grpc.StatusCode.PERMISSION_DENIED)
    assert stub.ModelStatistics(statistics, timeout=PATIENCE_S, metadata=(("authorization", "Bearer secret-of-operators"),)).model_stats


INVALID = "INVALID_ARGUMENT"
INFER = f"/{oip.SERVICE}/ModelInfer"


def malformed(pb):
    """Case by case: a request as it comes, and a word of the error."""
    def case(name, request, word, code=INVALID):
        return Case(name, INFER, request if isinstance(request, bytes) else request.SerializeToString(), code, word)

    def tensor(name, datatype, content, shape=(1,), base=True):
        request = oip.infer(pb, PROMPT if base else None, max_tokens=1)
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(content)
        return request

    def edited(edit):
        request = oip.infer(pb, PROMPT, max_tokens=1)
        edit(request)
        return request

    def parameter(name, **value):
        request = oip.infer(pb, PROMPT, max_tokens=1)
        request.parameters[name].CopyFrom(pb.InferParameter(**value))
        return request

    sampling = lambda text: tensor("sampling_parameters", "BYTES", oip.raw("BYTES", [text]), base=True)
    only = lambda text: alone(pb, text)
    bad_values = {
        "n": [0.5, -1, "two", True, [1], 17, 1 << 40], "temperature": [-1, "hot", [1], 1e40, True, {}], "top_p": [0, 1.5, "x"], "top_k": [-2, 1.5],
        "min_p": [-0.1, 2], "seed": [-2, 1.5, "x", 1 << 70], "stop": [1, [1], [""], ["x" * 300], ["a"] * 9], "stop_token_ids": [1, ["x"], [-1], [8192]],
        "max_tokens": [0, -1, 1.5, 10000, "many"], "min_tokens": [17, -1], "logprobs": [-1, 101, "x"], "logit_bias": [1, {"x": 1}, {"8192": 1}, {"1": "x"}, {"1": 1e3}],
        "allowed_token_ids": [[], 1, [8192]], "ignore_eos": ["true", 1], "presence_penalty": [101], "frequency_penalty": [-101], "repetition_penalty": [0],
        "include_stop_str_in_output": [0], "prompt_logprobs": [-1, 101, "x"], "best_of": [2], "use_beam_search": [True], "guided_decoding": [{}], "structured_outputs": [{}],
        "bad_words": [["x"]], "lora_name": ["x"], "skip_special_tokens": [False], "truncate_prompt_tokens": [0, -2, 513, 1.5, "x"], "no_such_parameter": [1]}
    cases = [case(f"{name} {value}", only({"max_tokens": 16, name: value}), name) for name, values in bad_values.items() for value in values]
    cases += [
        case("garbage", b"\xff\xff\xff", "well-formed"),
        case("no prompt", pb.ModelInferRequest(), "prompt is missing"),
        case("an unknown input", tensor("image", "BYTES", oip.raw("BYTES", [b"x"])), "image"),
        case("twice", tensor("text_input", "BYTES", oip.raw("BYTES", [b"x"])), "text_input is given twice"),
        case("text and ids", tensor("input_ids", "INT32", oip.raw("INT32", [2])), "beside"),
        case("text that is no UTF-8", tensor("text_input", "BYTES", oip.raw("BYTES", [b"\xff"]), base=False), "text_input is not valid UTF-8"),
        case("too long a length", tensor("text_input", "BYTES", struct.pack("<I", 9) + b"x", base=False), "text_input has 5 raw bytes"),
        case("no length", tensor("text_input", "BYTES", b"x", base=False), "text_input has 1 raw bytes"),
        case("two elements", tensor("text_input", "BYTES", oip.raw("BYTES", [b"x", b"y"]), (2,), base=False), "text_input has the shape [2]"),
        case("text as INT32", tensor("text_input", "INT32", b"\0\0\0\0", base=False), "text_input has the datatype"),
        case("ids as FP32", tensor("input_ids", "FP32", b"\0\0\0\0", base=False), "input_ids has the datatype"),
        case("ids below zero", tensor("input_ids", "INT32", oip.raw("INT32", [2, -1]), (2,), base=False), "input_ids[1] is -1"),
        case("ids beyond the vocabulary", tensor("input_ids", "INT32", oip.raw("INT32", [8192]), base=False), "input_ids[0] is 8192"),
        case("ids of another length", tensor("input_ids", "INT32", oip.raw("INT32", [2, 5]), (3,), base=False), "input_ids has 8 raw bytes"),
        case("ids of two prompts", tensor("input_ids", "INT32", oip.raw("INT32", [2, 5]), (2, 1), base=False), "input_ids has the shape"),
        case("no ids", tensor("input_ids", "INT32", b"", (0,), base=False), "input_ids is empty"),
        case("a negative shape", tensor("input_ids", "INT32", b"\2\0\0\0", (-1,), base=False), "input_ids has the shape [-1]"),
        case("a huge shape", tensor("input_ids", "INT32", b"\2\0\0\0", (1, 1 << 62), base=False), "input_ids has the shape"),
        case("too many ids", tensor("input_ids", "INT32", oip.raw("INT32", [5] * 600), (600,), base=False), "input_ids has 600 tokens"),
        case("stream as text", tensor("stream", "BYTES", oip.raw("BYTES", [b"true"])), "stream has the datatype"),
        case("stream of two", tensor("stream", "BOOL", b"\1\1", (2,)), "stream has the shape"),
        case("stream of two bytes", tensor("stream", "BOOL", b"\1\1"), "stream has 2 raw bytes"),
        case("a stream of one reply", tensor("stream", "BOOL", b"\1"), "stream is true"),
        case("sampling parameters twice", sampling(b"{}"), "sampling_parameters is given twice"),
        case("no JSON", alone_text(pb, b"{"), "sampling_parameters is not JSON"),
        case("a JSON list", alone_text(pb, b"[]"), "sampling_parameters is"),
        case("JSON that is no UTF-8", alone_text(pb, b'{"\xff": 1}'), "sampling_parameters is not valid UTF-8"),
        case("deep JSON", alone_text(pb, b"[" * 100_000 + b"]" * 100_000), "nested deeper"),
        case("deep JSON in a parameter", alone_text(pb, b'{"stop": ' + b"[" * 250_000 + b"]" * 250_000 + b"}"), "nested deeper"),
        case("deep JSON that never ends", alone_text(pb, b'{"stop": "\\"", "seed": ' + b"[" * 9), "nested deeper"),
        case("wide JSON", alone_text(pb, b'{"stop": [' + b"{}," * 100_000 + b"{}]}"), 'stop holds "{}"'),
        case("long JSON", alone_text(pb, b'{"stop": [' + b"{}," * 1_000_000 + b"{}]}"), "sampling_parameters has 3000014 bytes; at most 524288"),
        case("more logprobs than 64 bits count", oip.infer(pb, PROMPT, flags=["return_logprobs"], n=2**32 - 1, max_tokens=2**32 - 1, logprobs=2**32 - 1),
             "logprobs makes a reply of about"),
        case("a long id", edited(lambda r: setattr(r, "id", "x" * 1025)), "id has 1025 bytes; at most 1024"),
        case("a number of a thousand digits", alone_text(pb, b'{"temperature": ' + b"9" * 1000 + b"}"), ""),
        case("fewer contents", edited(lambda r: r.raw_input_contents.pop()), "raw_input_contents has 1 entries for 2 inputs"),
        case("contents twice", edited(lambda r: r.inputs[0].contents.bytes_contents.append(b"x")), "beside raw_input_contents"),
        case("no contents", edited(lambda r: r.ClearField("raw_input_contents")), "text_input has contents of 0 elements"),
        case("shared memory", edited(lambda r: r.inputs[0].parameters["shared_memory_region"].MergeFrom(pb.InferParameter(string_param="x"))), "shared_memory_region"),
        case("an unknown output", edited(lambda r: r.outputs.add(name="embedding")), "embedding"),
        case("an output as classes", edited(lambda r: r.outputs.add(name="text_output").parameters["classification"].MergeFrom(pb.InferParameter(int64_param=1))), "classification"),
        case("another model", edited(lambda r: setattr(r, "model_name", "other")), "other", "NOT_FOUND"),
        case("another version", edited(lambda r: setattr(r, "model_version", "2")), "version 2", "NOT_FOUND"),
        case("a version that is none", edited(lambda r: setattr(r, "model_version", "x")), "model_version"),
        case("a sequence", parameter("sequence_id", int64_param=7), "sequence_id"),
        case("a parameter with control characters", parameter("sequence_\x01\n", int64_param=1), "\\x01"),
        case("a priority", parameter("priority", uint64_param=1), "priority"),
        case("a timeout below zero", parameter("timeout", int64_param=-1), "timeout"),
        case("a timeout in words", parameter("timeout", string_param="soon"), "timeout"),
        case("a parameter beside the tensor", parameter("temperature", double_param=0.5), "temperature"),
    ]
    return cases


def alone(pb, sampling):
    request = oip.infer(pb, PROMPT)
    oip.add(request, "sampling_parameters", "BYTES", [json.dumps(sampling).encode()])
    return request


def alone_text(pb, text):
    request = oip.infer(pb, PROMPT)
    oip.add(request, "sampling_parameters", "BYTES", [text])
    return request


def test_malformed_requests_are_refused_by_name(daemon, pb):
    groups.run(daemon, "kserve", malformed(pb), at_least=100)


def test_malformed_requests_of_a_stream_are_refused_one_by_one(daemon, pb):
    """In replies: the stream goes on after each."""
    raw = daemon.channel.stream_stream(f"/{oip.SERVICE}/ModelStreamInfer", response_deserializer=pb.ModelStreamInferResponse.FromString)
    stream = Stream(types.SimpleNamespace(ModelStreamInfer=raw))
    cases = [case for case in malformed(pb) if case.name != "a stream of one reply"]
    wrong = []
    for case in cases:
        stream.send(case.message)
        reply = stream.read()
        if not reply.error_message or case.words not in reply.error_message:
            wrong.append(f"{case.name}: {reply.error_message[:200]}, not {case.words}")
    assert wrong == [] and len(cases) >= 100
    stream.send(oip.infer(pb, PROMPT, id="good", max_tokens=3, **GREEDY).SerializeToString())
    assert stream.read_until_final("good")
    stream.close()
    assert list(stream.call) == []
    daemon.expect_idle()


def test_a_refusal_names_the_field_in_its_details(stub, pb):
    error = expect_error(lambda: stub.ModelInfer(oip.infer(pb, PROMPT, min_tokens=5, max_tokens=4), timeout=PATIENCE_S),
                         grpc.StatusCode.INVALID_ARGUMENT)
    assert details(error, error_details_pb2.BadRequest).field_violations[0].field == "min_tokens"
