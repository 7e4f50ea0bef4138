"""The API through grpcio: what a client sends, what it hears, and what happens when it leaves or lies."""
import random
import threading

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from conftest import PATIENCE_S

SERVICE = "dejavu.v1.GenerationService"
LENGTH = 1


def details(error, kind):
    """The google.rpc detail of that kind in an RpcError."""
    status = rpc_status.from_call(error)
    for detail in status.details:
        if detail.Is(kind.DESCRIPTOR):
            message = kind()
            detail.Unpack(message)
            return message
    raise AssertionError(f"no {kind.DESCRIPTOR.full_name} in {status}")


def expect_error(call, code):
    with pytest.raises(grpc.RpcError) as raised:
        call()
    assert raised.value.code() == code, raised.value
    return raised.value


def test_unary_and_stream_say_the_same(daemon):
    request = daemon.request([2, 100, 200], 20)
    whole = daemon.stub.Generate(request, timeout=PATIENCE_S)
    assert len(whole.token_ids) == 20
    assert whole.finish.reason == LENGTH
    assert whole.finish.prompt_tokens == 3 and whole.finish.generated_tokens == 20

    chunks = list(daemon.stub.GenerateStream(request, timeout=PATIENCE_S))
    assert chunks[0].HasField("prompt") and not any(c.HasField("prompt") for c in chunks[1:])
    assert chunks[-1].HasField("finish") and not any(c.HasField("finish") for c in chunks[:-1])
    assert [i for c in chunks for i in c.token_ids] == list(whole.token_ids)
    assert "".join(c.text for c in chunks) == whole.text
    assert chunks[0].prompt.prompt_tokens == 3


def test_a_drawn_seed_is_returned_and_repeats_the_answer(daemon):
    request = daemon.request([2, 100], 20)
    request.sampling.temperature = 1.0
    first = daemon.stub.Generate(request, timeout=PATIENCE_S)
    request.sampling.seed = first.prompt.seed
    assert list(daemon.stub.Generate(request, timeout=PATIENCE_S).token_ids) == list(first.token_ids)


def test_text_goes_in_and_english_comes_out(daemon, api):
    request = api.pb.GenerateRequest(text="It was a dark night, and")
    request.stopping.max_new_tokens = 30
    reply = daemon.stub.Generate(request, timeout=PATIENCE_S)
    ids = daemon.stub.Tokenize(api.pb.TokenizeRequest(text=request.text)).token_ids
    assert ids[0] == 2 and reply.prompt.prompt_tokens == len(ids)
    assert daemon.stub.Detokenize(api.pb.DetokenizeRequest(token_ids=reply.token_ids)).text == reply.text
    assert set(reply.text.lower().split()) & {"the", "and", "of", "a", "to", "was", "in", "he", "i"}


def test_score_returns_each_tokens_logprob_and_the_alternatives_after_it(daemon, api):
    greedy = daemon.stub.Generate(daemon.request([2, 100, 200], 5), timeout=PATIENCE_S)
    request = api.pb.ScoreRequest(top_logprobs=5)
    request.token_ids.ids.extend([2, 100, 200, *greedy.token_ids])
    tokens = daemon.stub.Score(request, timeout=PATIENCE_S).tokens
    assert [t.id for t in tokens] == list(request.token_ids.ids)
    assert not tokens[0].HasField("logprob")
    for before, token in zip(tokens[2:], tokens[3:]):
        assert token.rank == 1 and before.top[0].id == token.id and before.top[0].logprob == token.logprob
        assert all(a.logprob >= b.logprob for a, b in zip(before.top, before.top[1:]))


def test_logprobs_of_a_completion_match_those_of_its_score(daemon, api):
    request = daemon.request([2, 100, 200], 8)
    request.output.top_logprobs = 2
    reply = daemon.stub.Generate(request, timeout=PATIENCE_S)
    score = api.pb.ScoreRequest()
    score.token_ids.ids.extend([2, 100, 200, *reply.token_ids])
    scored = daemon.stub.Score(score, timeout=PATIENCE_S).tokens[3:]
    assert [l.logprob for l in reply.logprobs] == [s.logprob for s in scored]
    assert all(len(l.top) == 2 for l in reply.logprobs)


def test_a_stop_string_across_tokens_cuts_the_text_there(daemon, api):
    request = api.pb.GenerateRequest(text="It was a dark night, and")
    request.stopping.max_new_tokens = 40
    free = daemon.stub.Generate(request, timeout=PATIENCE_S).text
    middle = len(free) // 2
    stop = free[middle:middle + 7]
    request.stopping.stop_strings.append(stop)
    chunks = list(daemon.stub.GenerateStream(request, timeout=PATIENCE_S))
    assert chunks[-1].finish.stop_string == stop
    assert "".join(c.text for c in chunks) == free[:free.index(stop)]
    request.stopping.include_stop_string = True
    assert daemon.stub.Generate(request, timeout=PATIENCE_S).text == free[:free.index(stop) + len(stop)]


def test_cancel_in_mid_stream_frees_everything(daemon):
    stream = daemon.stub.GenerateStream(daemon.request([2, 100], 500), timeout=PATIENCE_S)
    for chunk in stream:
        if chunk.token_ids:
            break
    stream.cancel()
    assert expect_error(lambda: list(stream), grpc.StatusCode.CANCELLED)
    daemon.expect_idle()


def test_deadline_in_mid_stream_frees_everything(braked):
    streams = [braked.stub.GenerateStream(braked.request([2, i], 500), timeout=0.5) for i in range(16)]
    for stream in streams:
        expect_error(lambda: list(stream), grpc.StatusCode.DEADLINE_EXCEEDED)
    braked.expect_idle()


def test_abort_ends_a_request_by_its_id(braked, api):
    stream = braked.stub.GenerateStream(braked.request([2, 100], 500, request_id="to-abort"), timeout=PATIENCE_S)
    next(stream)
    again = braked.request([2], 1, request_id="to-abort")
    expect_error(lambda: braked.stub.Generate(again, timeout=PATIENCE_S), grpc.StatusCode.ALREADY_EXISTS)
    assert braked.stub.Abort(api.pb.AbortRequest(request_id="to-abort")).found
    expect_error(lambda: list(stream), grpc.StatusCode.CANCELLED)
    assert not braked.stub.Abort(api.pb.AbortRequest(request_id="to-abort")).found
    braked.expect_idle()


def mixed(daemon, i):
    """Request i of a mix of prompt lengths, output lengths, seeds and methods."""
    choose = random.Random(i)
    request = daemon.request([2] + [choose.randrange(4, 8192) for _ in range(1 + 9 * i % 120)], 10 + 7 * i % 60)
    request.sampling.temperature = 0.0 if i % 4 == 0 else 0.4 + 0.1 * i
    request.sampling.seed = i
    request.sampling.top_p = 0.95 if i % 2 else 1.0
    return request


def test_sixteen_streams_at_once_get_what_each_gets_alone(daemon):
    alone = [list(daemon.stub.Generate(mixed(daemon, i), timeout=PATIENCE_S).token_ids) for i in range(16)]
    together = [None] * 16

    def read(i):
        together[i] = [t for c in daemon.stub.GenerateStream(mixed(daemon, i), timeout=PATIENCE_S) for t in c.token_ids]

    threads = [threading.Thread(target=read, args=(i,)) for i in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert together == alone
    daemon.expect_idle()


def test_two_hundred_cancellations_at_random_moments_leave_nothing_behind(daemon):
    choose = random.Random(1)

    def one(i):
        stream = daemon.stub.GenerateStream(daemon.request([2] + [5] * choose.randrange(100), 400), timeout=PATIENCE_S)
        for _ in range(choose.randrange(6)):  # 0: perhaps still queued
            next(stream)
        stream.cancel()

    threads = []
    for i in range(200):
        threads.append(threading.Thread(target=one, args=(i,)))
        threads[-1].start()
        if len(threads) == 20:
            for t in threads:
                t.join()
            threads.clear()
    daemon.expect_idle()
    assert len(daemon.stub.Generate(daemon.request([2, 100], 5), timeout=PATIENCE_S).token_ids) == 5


def test_a_reader_that_never_reads_hurts_only_itself(daemon):
    stuck = [daemon.stub.GenerateStream(daemon.request([2, 100], 500), timeout=PATIENCE_S) for _ in range(3)]
    reply = daemon.stub.Generate(daemon.request([2, 7], 50), timeout=PATIENCE_S)
    assert len(reply.token_ids) == 50
    for stream in stuck:
        stream.cancel()
    daemon.expect_idle()


def raw(daemon, method, message):
    return daemon.channel.unary_unary(f"/{SERVICE}/{method}")(message, timeout=PATIENCE_S)


@pytest.mark.parametrize("message", [b"\xff\xff\xff\xff", b"\x12\x05ab", b"\x12\x02\xc3\x28", b"\x0b" * 1000, b"\x22\xff\xff\xff\xff\x0f"])
@pytest.mark.parametrize("method", ["Generate", "GenerateStream", "Score", "Tokenize"])
def test_malformed_bytes_are_an_invalid_argument(daemon, method, message):
    expect_error(lambda: raw(daemon, method, message), grpc.StatusCode.INVALID_ARGUMENT)


def test_unknown_methods_and_services_are_unimplemented(daemon):
    expect_error(lambda: raw(daemon, "Nonsense", b""), grpc.StatusCode.UNIMPLEMENTED)
    expect_error(lambda: daemon.channel.unary_unary("/no.Such/Thing")(b"", timeout=PATIENCE_S), grpc.StatusCode.UNIMPLEMENTED)


@pytest.mark.parametrize("change, field, part", [
    (lambda r: setattr(r.sampling, "temperature", float("nan")), "sampling.temperature", "finite"),
    (lambda r: setattr(r.sampling, "temperature", -1), "sampling.temperature", "-1"),
    (lambda r: setattr(r.sampling, "top_p", 0), "sampling.top_p", "0"),
    (lambda r: setattr(r.sampling, "min_p", 1.5), "sampling.min_p", "1.5"),
    (lambda r: setattr(r.penalties, "repetition", 0), "penalties.repetition", "0"),
    (lambda r: setattr(r.penalties, "presence", float("inf")), "penalties.presence", "finite"),
    (lambda r: r.penalties.logit_bias.update({8192: 1.0}), "penalties.logit_bias", "8192"),
    (lambda r: r.penalties.logit_bias.update({i: 1.0 for i in range(301)}), "penalties.logit_bias", "300"),
    (lambda r: r.penalties.allowed_token_ids.append(2**32 - 1), "penalties.allowed_token_ids", "4294967295"),
    (lambda r: setattr(r.stopping, "max_new_tokens", 0), "stopping.max_new_tokens", "0"),
    (lambda r: setattr(r.stopping, "max_new_tokens", 2**32 - 1), "stopping.max_new_tokens", "512"),
    (lambda r: setattr(r.stopping, "min_new_tokens", 6), "stopping.min_new_tokens", "5"),
    (lambda r: r.stopping.stop_strings.append(""), "stopping.stop_strings", "empty"),
    (lambda r: r.stopping.stop_strings.append("x" * 257), "stopping.stop_strings", "256"),
    (lambda r: r.stopping.stop_strings.extend(["x"] * 9), "stopping.stop_strings", "8"),
    (lambda r: r.stopping.stop_token_ids.append(8192), "stopping.stop_token_ids", "8192"),
    (lambda r: setattr(r.output, "top_logprobs", 10**6), "output.top_logprobs", "1000000"),
    (lambda r: setattr(r.sparsity, "tier", 6), "sparsity.tier", "0 to 5"),
    (lambda r: setattr(r.sparsity, "shadow_every", 10**9 + 1), "sparsity.shadow_every", "1000000000"),
    (lambda r: setattr(r, "request_id", "line\nbreak"), "request_id", ""),
    (lambda r: setattr(r, "request_id", "x" * 129), "request_id", "128"),
    (lambda r: r.token_ids.ids.append(8192), "token_ids", "8192"),
    (lambda r: r.token_ids.ids.extend([5] * 10000), "token_ids", "512"),
    (lambda r: r.ClearField("token_ids"), "prompt", ""),
])
def test_a_bad_field_is_named_with_its_value_or_limit(daemon, change, field, part):
    request = daemon.request([2, 100], 5)
    change(request)
    error = expect_error(lambda: daemon.stub.Generate(request, timeout=PATIENCE_S), grpc.StatusCode.INVALID_ARGUMENT)
    violation = details(error, error_details_pb2.BadRequest).field_violations[0]
    assert violation.field.startswith(field), violation
    assert part in violation.description and part in error.details(), error
    daemon.expect_idle()


def test_the_tier_of_a_request_comes_back(daemon, api):
    by_default = daemon.stub.Generate(daemon.request([2, 100], 20), timeout=PATIENCE_S)
    assert by_default.prompt.tier == api.pb.TIER_EXACT
    request = daemon.request([2, 100], 20)
    request.sparsity.tier = api.pb.TIER_DENSE
    request.sparsity.deterministic = True
    request.sparsity.shadow_every = 1  # for predicted tiers; harmless elsewhere
    dense = daemon.stub.Generate(request, timeout=PATIENCE_S)
    assert dense.prompt.tier == api.pb.TIER_DENSE
    assert list(dense.token_ids) == list(by_default.token_ids)
    for reply in (dense, by_default):
        assert 0 <= reply.finish.sparsity.mlp_density <= 1 and not reply.finish.sparsity.HasField("shadow")
    *chunks, last = daemon.stub.GenerateStream(request, timeout=PATIENCE_S)
    assert last.finish.HasField("sparsity") and not any(c.HasField("finish") for c in chunks)


def test_a_tier_without_its_predictor_is_a_failed_precondition(start, api):
    daemon = start("--predictor", "none")
    running = daemon.stub.GenerateStream(daemon.request([2, 100], 500), timeout=PATIENCE_S)
    next(running)
    for tier in (api.pb.TIER_HIGH, api.pb.TIER_BALANCED, api.pb.TIER_FAST):
        request = daemon.request([2, 100], 5)
        request.sparsity.tier = tier
        error = expect_error(lambda: daemon.stub.Generate(request, timeout=PATIENCE_S), grpc.StatusCode.FAILED_PRECONDITION)
        violation = details(error, error_details_pb2.PreconditionFailure).violations[0]
        assert (violation.type, violation.subject) == ("FEATURE", "predictor")
        assert "predictor" in error.details() and violation.description == error.details()
    assert [c for c in running][-1].finish.generated_tokens == 500
    info = daemon.stub.GetServerInfo(api.pb.GetServerInfoRequest()).sparsity
    assert list(info.available_tiers) == [api.pb.TIER_DENSE, api.pb.TIER_EXACT] and info.predictor == ""


def test_the_servers_limits_of_tiers_and_shadow_checks_hold(start, api):
    daemon = start("--sparsity-highest-tier", "exact", "--sparsity-lowest-tier", "high",
                   "--sparsity-min-shadow-every", "100")
    for change, field, part in [
        (lambda s: setattr(s, "tier", api.pb.TIER_DENSE), "sparsity.tier", "exact to high"),
        (lambda s: setattr(s, "tier", api.pb.TIER_FAST), "sparsity.tier", "exact to high"),
        (lambda s: setattr(s, "shadow_every", 99), "sparsity.shadow_every", "100"),
    ]:
        request = daemon.request([2, 100], 5)
        change(request.sparsity)
        error = expect_error(lambda: daemon.stub.Generate(request, timeout=PATIENCE_S), grpc.StatusCode.INVALID_ARGUMENT)
        violation = details(error, error_details_pb2.BadRequest).field_violations[0]
        assert violation.field == field and part in violation.description, error
    request = daemon.request([2, 100], 5)
    request.sparsity.shadow_every = 0
    assert daemon.stub.Generate(request, timeout=PATIENCE_S).prompt.tier == api.pb.TIER_EXACT
    info = daemon.stub.GetServerInfo(api.pb.GetServerInfoRequest()).sparsity
    assert (info.default_tier, info.highest_tier, info.lowest_tier) == (
        api.pb.TIER_EXACT, api.pb.TIER_EXACT, api.pb.TIER_HIGH)
    assert info.shadow_every == 256


def test_another_model_is_not_found(daemon):
    expect_error(lambda: daemon.stub.Generate(daemon.request([2], 1, model="gpt-5")), grpc.StatusCode.NOT_FOUND)
    assert daemon.stub.Generate(daemon.request([2], 1, model="opt-8m-books")).prompt.model == "opt-8m-books"


def test_a_deadline_that_has_passed_runs_nothing(daemon, api):
    expect_error(lambda: daemon.stub.Generate(daemon.request([2], 400), timeout=1e-9), grpc.StatusCode.DEADLINE_EXCEEDED)
    daemon.expect_idle()


def test_model_and_server_describe_themselves(daemon, api):
    model = daemon.stub.GetModelInfo(api.pb.GetModelInfoRequest())
    assert (model.architecture, model.layers, model.vocabulary_size, model.context_tokens) == ("opt", 8, 8192, 512)
    assert model.weight_dtype == "float16" and model.has_tokenizer
    server = daemon.stub.GetServerInfo(api.pb.GetServerInfoRequest())
    assert server.version and "cpu" in server.backend and server.limits.max_batch == 16


@pytest.mark.parametrize("version", ["v1alpha", "v1"])
def test_reflection_lists_the_services_and_their_messages(daemon, version):
    listed = daemon.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString)
    replies = list(listed(iter([reflection_pb2.ServerReflectionRequest(list_services=""),
                                reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.such.Symbol")])))
    names = {s.name for s in replies[0].list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= names
    assert replies[1].error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_a_client_can_be_built_from_reflection_alone(daemon):
    from google.protobuf.descriptor_pool import DescriptorPool
    pool = DescriptorPool(ProtoReflectionDescriptorDatabase(daemon.channel))
    service = pool.FindServiceByName(SERVICE)
    assert {m.name for m in service.methods} == {
        "Generate", "GenerateStream", "Score", "Tokenize", "Detokenize", "GetModelInfo", "GetServerInfo", "Abort"}
    assert service.methods_by_name["GenerateStream"].output_type.fields_by_name["token_ids"].number == 3


def test_health_knows_its_services(daemon):
    serving = health_pb2.HealthCheckResponse.SERVING
    for name in ("", "liveness", SERVICE):
        assert daemon.health.Check(health_pb2.HealthCheckRequest(service=name)).status == serving
    expect_error(lambda: daemon.health.Check(health_pb2.HealthCheckRequest(service="nobody")), grpc.StatusCode.NOT_FOUND)
    watch = daemon.health.Watch(health_pb2.HealthCheckRequest(service="nobody"), timeout=PATIENCE_S)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()
