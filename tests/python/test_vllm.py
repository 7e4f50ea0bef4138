"""vLLM's engine protocol: what a gateway sends and hears. The gateway itself is ./run protocols' part."""
import hashlib
import io
import zipfile

import grpc
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import groups
from conftest import MODEL, PATIENCE_S
from groups import Case
from test_client import expect_error
from test_security import token_lines
from vllm_engine import SERVICE, ask, generate, stubs
from wire import part, uint


@pytest.fixture(scope="session")
def vllm(tmp_path_factory):
    return stubs(tmp_path_factory.mktemp("vllm"))


def stub_of(daemon, vllm):
    return vllm[1].VllmEngineStub(daemon.channel)


@pytest.fixture
def stub(daemon, vllm):
    return stub_of(daemon, vllm)


@pytest.fixture
def pb(vllm):
    return vllm[0]


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_those_of_our_own_api(daemon, stub, pb, stream):
    ours = daemon.stub.Generate(daemon.request([2, 100, 200], 20), timeout=PATIENCE_S)
    tokens, completes, chunks = generate(stub, ask(pb, ids=[2, 100, 200], stream=stream))
    assert tokens == {0: list(ours.token_ids)}
    assert (completes[0].finish_reason, completes[0].prompt_tokens) == ("length", 3)
    assert bool(chunks) == stream
    ours = daemon.stub.Generate(daemon.api.pb.GenerateRequest(text="It was", stopping={"max_new_tokens": 20, "ignore_eos": True}))
    assert generate(stub, ask(pb, text="It was", stream=stream))[0] == {0: list(ours.token_ids)}


@pytest.mark.parametrize("stream", [False, True])
def test_samples_have_their_index(daemon, stub, pb, stream):
    request = daemon.request([2, 100, 200], 12)
    request.sampling.temperature, request.sampling.seed, request.sampling.samples = 1, 7, 3
    ours = daemon.stub.Generate(request, timeout=PATIENCE_S)
    tokens, completes, _ = generate(stub, ask(pb, ids=[2, 100, 200], stream=stream, temperature=1, seed=7, n=3, max_tokens=12))
    assert tokens == {i: list(sample.token_ids) for i, sample in enumerate((ours, *ours.more_samples))}
    assert {c.finish_reason for c in completes.values()} == {"length"}


def test_every_sampling_parameter_reaches_the_engine(daemon, stub, pb):
    request = daemon.request([2, 100, 200], 24)
    request.sampling.temperature, request.sampling.top_k, request.sampling.top_p = 0.9, 40, 0.95
    request.sampling.min_p, request.sampling.seed = 0.01, 11
    request.penalties.repetition, request.penalties.presence, request.penalties.frequency = 1.2, 0.5, 0.25
    request.penalties.logit_bias[300] = 3.5
    ours = daemon.stub.Generate(request, timeout=PATIENCE_S)
    theirs = dict(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=11, repetition_penalty=1.2, presence_penalty=0.5,
                  frequency_penalty=0.25, logit_bias={300: 3.5}, max_tokens=24, skip_special_tokens=True, spaces_between_special_tokens=True, n=1)
    assert generate(stub, ask(pb, ids=[2, 100, 200], **theirs))[0] == {0: list(ours.token_ids)}


def test_without_a_temperature_it_is_one(daemon, stub, pb):
    request = daemon.request([2, 100, 200], 24)
    request.sampling.temperature, request.sampling.seed = 1, 3
    ours = daemon.stub.Generate(request, timeout=PATIENCE_S)
    assert generate(stub, ask(pb, ids=[2, 100, 200], temperature=None, seed=3, max_tokens=24))[0] == {0: list(ours.token_ids)}


@pytest.mark.parametrize("stream", [False, True])
def test_what_ended_a_sample(daemon, stub, pb, stream):
    text = daemon.stub.Generate(daemon.api.pb.GenerateRequest(text="It was a dark night, and", stopping={"max_new_tokens": 40, "ignore_eos": True}))
    stop = text.text[len(text.text) // 2:][:6]
    _, completes, _ = generate(stub, ask(pb, text="It was a dark night, and", stream=stream, max_tokens=40, stop=[stop]))
    assert (completes[0].finish_reason, completes[0].matched_stop_str) == ("stop", stop)
    id = text.token_ids[5]
    _, completes, _ = generate(stub, ask(pb, text="It was a dark night, and", stream=stream, max_tokens=40, stop_token_ids=[id]))
    assert (completes[0].finish_reason, completes[0].matched_token_id) == ("stop", id)
    _, completes, _ = generate(stub, ask(pb, text="It was", stream=stream, max_tokens=40, ignore_eos=False, logit_bias={2: 100}))
    assert completes[0].finish_reason == "stop" and completes[0].WhichOneof("matched_stop") is None  # the end token


def test_logprobs(daemon, stub, pb):
    request = daemon.request([2, 100, 200], 6)
    request.output.top_logprobs = 2
    ours = daemon.stub.Generate(request, timeout=PATIENCE_S)
    _, completes, _ = generate(stub, ask(pb, ids=[2, 100, 200], max_tokens=6, logprobs=2))
    theirs = completes[0].output_logprobs
    assert list(theirs.token_ids) == list(ours.token_ids)
    assert list(theirs.token_logprobs) == [l.logprob for l in ours.logprobs]
    assert [list(top.token_ids) for top in theirs.top_logprobs] == [[t.id for t in l.top] for l in ours.logprobs]
    _, _, chunks = generate(stub, ask(pb, ids=[2, 100, 200], max_tokens=6, logprobs=0, stream=True))
    assert [l for c in chunks for l in c.output_logprobs.token_logprobs] == [l.logprob for l in ours.logprobs]
    assert not any(c.output_logprobs.top_logprobs for c in chunks)
    _, completes, _ = generate(stub, ask(pb, ids=[2, 100, 200], max_tokens=6))
    assert not completes[0].HasField("output_logprobs")


def test_prompt_logprobs_come_with_the_first_reply(daemon, stub, pb):
    ids = [2] + [5 + i * 7 % 700 for i in range(150)]  # of several steps
    score = daemon.api.pb.ScoreRequest(top_logprobs=2)
    score.token_ids.ids.extend(ids)
    ours = daemon.stub.Score(score, timeout=PATIENCE_S).tokens
    plain, _, _ = generate(stub, ask(pb, ids=ids))

    def expect(found, tops):
        assert list(found.token_ids) == ids
        assert [l.value if l.HasField("value") else None for l in found.token_logprobs] == [
            t.logprob if t.HasField("logprob") else None for t in ours]
        # Of the token, where ours are of what follows it.
        assert [[*zip(top.token_ids, top.values)] for top in found.top_logprobs] == (
            [[]] + [[(a.id, a.logprob) for a in t.top] for t in ours[:-1]] if tops else [])

    for tops in (2, 0):
        tokens, completes, _ = generate(stub, ask(pb, ids=ids, prompt_logprobs=tops))
        assert tokens == plain and not completes[0].HasField("output_logprobs")
        expect(completes[0].input_logprobs, tops)
        tokens, completes, chunks = generate(stub, ask(pb, ids=ids, prompt_logprobs=tops, stream=True))
        assert tokens == plain and not completes[0].HasField("input_logprobs")
        expect(chunks[0].input_logprobs, tops)
        assert not any(chunk.HasField("input_logprobs") for chunk in chunks[1:])
    # The prompt alone, and of several samples the first.
    for stream in (False, True):
        (reply,) = stub.Generate(ask(pb, ids=ids, prompt_logprobs=2, max_tokens=0, stream=stream), timeout=PATIENCE_S)
        expect(reply.complete.input_logprobs, 2)
        assert (list(reply.complete.output_ids), reply.complete.finish_reason, reply.complete.prompt_tokens) == ([], "length", len(ids))
    _, completes, _ = generate(stub, ask(pb, ids=ids, prompt_logprobs=2, n=2, temperature=1))
    expect(completes[0].input_logprobs, 2)
    assert not completes[1].HasField("input_logprobs")


@pytest.mark.parametrize("stream", [False, True])
def test_the_end_of_a_prompt_is_kept(daemon, stub, pb, stream):
    ids = [2] + [5 + i % 700 for i in range(700)]
    for most, kept in ((7, ids[-7:]), (-1, ids[-(512 - 19):])):
        tokens, completes, _ = generate(stub, ask(pb, ids=ids, truncate_prompt_tokens=most, stream=stream))
        assert completes[0].prompt_tokens == len(kept)
        assert tokens == {0: list(daemon.stub.Generate(daemon.request(kept, 20), timeout=PATIENCE_S).token_ids)}


def test_abort_cancel_and_deadline_free_everything(braked, vllm):
    stub, pb = stub_of(braked, vllm), vllm[0]
    calls = [stub.Generate(ask(pb, ids=[2, 100 + i], stream=True, max_tokens=400, request_id=f"r{i}"), timeout=PATIENCE_S) for i in range(3)]
    for call in calls:
        next(call)
    stub.Abort(pb.AbortRequest(request_ids=["r0", "of-nobody", "r1"]), timeout=PATIENCE_S)
    for call in calls[:2]:
        expect_error(lambda: list(call), grpc.StatusCode.CANCELLED)
    assert next(calls[2]).chunk.token_ids
    calls[2].cancel()
    braked.expect_idle()
    expect_error(lambda: list(stub.Generate(ask(pb, ids=[2], max_tokens=400), timeout=0.5)), grpc.StatusCode.DEADLINE_EXCEEDED)
    braked.expect_idle()


def test_what_a_gateway_asks_at_start(daemon, stub, vllm):
    pb, _, common = vllm
    assert stub.HealthCheck(pb.HealthCheckRequest()).healthy
    model, ours = stub.GetModelInfo(pb.GetModelInfoRequest()), daemon.stub.GetModelInfo(daemon.api.pb.GetModelInfoRequest())
    assert (model.served_model_name, model.max_context_length, model.vocab_size) == (ours.model, ours.context_tokens, ours.vocabulary_size)
    assert list(model.eos_token_ids) == list(ours.eos_token_ids) and model.is_generation and list(model.architectures) == ["OPTForCausalLM"]
    server = stub.GetServerInfo(pb.GetServerInfoRequest())
    assert server.server_type == "vllm-grpc" and server.data_parallel_size == 1 and server.block_size > 0 and server.max_num_seqs > 0
    (load,) = stub.GetLoads(pb.GetLoadsRequest()).loads
    assert (load.num_running_reqs, load.num_waiting_reqs, load.token_usage) == (0, 0, 0) and load.max_total_num_tokens > 0
    chunks = list(stub.GetTokenizer(common.GetTokenizerRequest(), timeout=PATIENCE_S))
    archive = b"".join(chunk.data for chunk in chunks)
    assert [c.sha256 for c in chunks[:-1]] == [""] * (len(chunks) - 1) and chunks[-1].sha256 == hashlib.sha256(archive).hexdigest()
    files = zipfile.ZipFile(io.BytesIO(archive))
    assert files.testzip() is None
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "config.json"):
        assert files.read(name) == (MODEL / name).read_bytes()
    assert SERVICE in ProtoReflectionDescriptorDatabase(daemon.channel).get_services()


def test_loads_show_what_runs(braked, vllm):
    stub, pb = stub_of(braked, vllm), vllm[0]
    calls = [stub.Generate(ask(pb, ids=[2, 100 + i], stream=True, max_tokens=400), timeout=PATIENCE_S) for i in range(3)]
    for call in calls:
        next(call)
    (load,) = stub.GetLoads(pb.GetLoadsRequest(dp_rank=0)).loads
    assert load.num_running_reqs == load.num_total_reqs == 3 and 0 < load.token_usage < 1 and load.num_used_tokens > 0
    for call in calls:
        call.cancel()
    braked.expect_idle()


def test_tokens_hold_for_this_protocol_too(start, vllm, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text(token_lines({"a": "secret-of-a", "b": "secret-of-b", "operators": "secret-of-operators"}))
    daemon = start("--auth-tokens-file", tokens, "--scheduler-fault", "slow@10")
    stub, pb = stub_of(daemon, vllm), vllm[0]
    of = lambda name: (("authorization", f"Bearer secret-of-{name}"),)
    assert stub.HealthCheck(pb.HealthCheckRequest()).healthy  # without a token
    expect_error(lambda: stub.GetModelInfo(pb.GetModelInfoRequest()), grpc.StatusCode.UNAUTHENTICATED)
    expect_error(lambda: list(stub.Generate(ask(pb, ids=[2]))), grpc.StatusCode.UNAUTHENTICATED)
    expect_error(lambda: stub.GetLoads(pb.GetLoadsRequest(), metadata=of("a")), grpc.StatusCode.PERMISSION_DENIED)
    assert stub.GetLoads(pb.GetLoadsRequest(), metadata=of("operators")).loads
    call = stub.Generate(ask(pb, ids=[2, 100], stream=True, max_tokens=400, request_id="r"), metadata=of("a"), timeout=PATIENCE_S)
    next(call)
    stub.Abort(pb.AbortRequest(request_ids=["r"]), metadata=of("b"))  # another tenant's
    assert next(call).chunk.token_ids
    stub.Abort(pb.AbortRequest(request_ids=["r"]), metadata=of("a"))
    expect_error(lambda: list(call), grpc.StatusCode.CANCELLED)


def test_methods_that_are_not_served_are_unimplemented(daemon):
    for method in ("Embed", "SubscribeKvEvents", "FlushCache", "StartProfile", "StopProfile"):
        call = daemon.channel.unary_stream(f"/{SERVICE}/{method}")
        expect_error(lambda: list(call(b"", timeout=PATIENCE_S)), grpc.StatusCode.UNIMPLEMENTED)


def test_malformed_requests_are_refused_by_name(daemon, pb):
    invalid, path = "INVALID_ARGUMENT", f"/{SERVICE}/Generate"

    def case(name, request, word, code=invalid):
        return Case(name, path, request if isinstance(request, bytes) else request.SerializeToString(), code, word)

    params = {"temperature": [-1, float("nan"), float("inf"), 101], "top_p": [1.5, -0.1, float("nan")], "min_p": [-1, 2], "n": [2, 17, 1 << 31],
              "repetition_penalty": [-1, 101], "presence_penalty": [101], "frequency_penalty": [-101], "max_tokens": [0, 513, (1 << 32) - 1],
              "min_tokens": [21], "stop": [[""], ["x" * 300], ["a"] * 9], "stop_token_ids": [[8192], list(range(65))], "logprobs": [-1, 101],
              "prompt_logprobs": [-1, 101], "seed": [-2], "logit_bias": [{-1: 1}, {8192: 1}, {5: 101}], "truncate_prompt_tokens": [-2, 0, 513],
              "json_schema": ["{}"], "regex": [".*"], "grammar": ["x"], "structural_tag": ["x"], "json_object": [True],
              "grammar_from_first_token": [True]}
    cases = [case(f"{name} {value}", ask(pb, ids=[2, 5], **{name: value}), name) for name, values in params.items() for value in values]
    cases.append(case("choice", ask(pb, ids=[2], choice=pb.ChoiceConstraint(choices=["a"])), "choice"))
    base = ask(pb, ids=[2, 5]).SerializeToString()
    cases += [
        case("garbage", b"\xff\xff", "well-formed"),
        case("nothing", b"", "prompt is missing"),
        case("no ids", pb.GenerateRequest(tokenized={}), "input_ids is empty"),
        case("ids that are none", base[:-0] + part(2, part(2, b"\x80\x40")), "input_ids"),
        case("too many ids", ask(pb, ids=[5] * 600), "input_ids has 600 tokens"),
        case("an id", ask(pb, ids=[2], request_id="a b"), "request_id"),
        case("text that is no UTF-8", part(3, b"\xff"), "text is not valid UTF-8"),
        case("images", base + part(7, b""), "mm_inputs"),
        case("more images", base + part(11, b""), "extra_mm_inputs"),
        case("media", base + part(10, b""), "media_refs"),
        case("KV from elsewhere", base + part(6, part(1, "x")), "kv_transfer_params"),
        case("KV as JSON", base + part(8, "{}"), "kv_transfer_params_json"),
        case("another rank", base + uint(9, 1), "data_parallel_rank is 1"),
        case("a field of the future", base + uint(99, 1), "field number 99"),
        case("a parameter of the future", base + part(4, uint(77, 1)), "field number 77"),
    ]
    groups.run(daemon, "vllm", cases, at_least=50)
