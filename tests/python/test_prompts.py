"""What a request may ask of its prompt: that it is told again, its log-probabilities beside the output, and its end alone."""
import grpc
import pytest

from conftest import PATIENCE_S, until
from test_client import expect_error

TEXT = "It was a dark night, and"
CONTEXT = 512


def generate(daemon, request, stream):
    """Prompt, its log-probabilities, ids and text, of one sample; nothing of the prompt comes after the output has begun."""
    if not stream:
        reply = daemon.stub.Generate(request, timeout=PATIENCE_S)
        return reply.prompt, list(reply.prompt_logprobs), list(reply.token_ids), reply.text
    prompt, scored, ids, text = None, [], [], ""
    for chunk in daemon.stub.GenerateStream(request, timeout=PATIENCE_S):
        assert chunk.HasField("prompt") == (prompt is None)
        prompt = prompt or chunk.prompt
        assert not (ids and chunk.prompt_logprobs)
        scored += chunk.prompt_logprobs
        ids += chunk.token_ids
        text += chunk.text
    return prompt, scored, ids, text


def score(daemon, ids, top):
    request = daemon.api.pb.ScoreRequest(top_logprobs=top)
    request.token_ids.ids.extend(ids)
    return list(daemon.stub.Score(request, timeout=PATIENCE_S).tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_scores_the_prompt_and_goes_on_from_it(daemon, stream):
    ids = [2] + [5 + i * 7 % 700 for i in range(200)]
    request = daemon.request(ids, 20)
    request.output.logprobs = True
    _, none, output, _ = generate(daemon, request, stream)
    assert none == []
    request.output.prompt_top_logprobs = 3
    prompt, scored, ids_after, _ = generate(daemon, request, stream)
    assert ids_after == output and not prompt.token_ids and not prompt.text
    assert scored == score(daemon, ids, 3)
    request.output.prompt_top_logprobs, request.output.prompt_logprobs = 0, True
    assert generate(daemon, request, stream)[1] == score(daemon, ids, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_alone_is_computed_and_told(daemon, stream):
    request = daemon.api.pb.GenerateRequest(text=TEXT, stopping={"max_new_tokens": 0}, output={"echo": True})
    tokens = list(daemon.stub.Tokenize(daemon.api.pb.TokenizeRequest(text=TEXT), timeout=PATIENCE_S).token_ids)
    prompt, scored, ids, text = generate(daemon, request, stream)
    assert (prompt.text, list(prompt.token_ids), prompt.max_new_tokens) == (TEXT, tokens, 0)
    assert (scored, ids, text) == ([], [], "")
    request.output.prompt_logprobs = True
    _, scored, ids, text = generate(daemon, request, stream)
    assert scored == score(daemon, tokens, 0) and (ids, text) == ([], "")
    finish = daemon.stub.Generate(request, timeout=PATIENCE_S).finish
    assert (finish.generated_tokens, finish.prompt_tokens) == (0, len(tokens))
    assert finish.reason == daemon.api.pb.FINISH_REASON_LENGTH
    daemon.expect_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_echo_and_output_are_one_text(daemon, stream):
    pb, stub = daemon.api.pb, daemon.stub
    text = "It was a dark night, and the wind – 風 – blew"
    request = pb.GenerateRequest(text=text, stopping={"max_new_tokens": 12, "ignore_eos": True}, output={"echo": True})
    prompt, _, ids, after = generate(daemon, request, stream)
    assert prompt.text == text
    assert stub.Detokenize(pb.DetokenizeRequest(token_ids=[*prompt.token_ids, *ids]), timeout=PATIENCE_S).text == prompt.text + after
    # A prompt of ids that ends within a character.
    whole = list(prompt.token_ids)
    bytewise = next(i for i in range(len(whole), 0, -1)
                    if "�" in stub.Detokenize(pb.DetokenizeRequest(token_ids=whole[:i]), timeout=PATIENCE_S).text)
    request = daemon.request(whole[:bytewise], 6)
    request.output.echo = True
    prompt, _, ids, after = generate(daemon, request, stream)
    assert list(prompt.token_ids) == whole[:bytewise] and "�" not in prompt.text
    assert stub.Detokenize(pb.DetokenizeRequest(token_ids=whole[:bytewise] + ids), timeout=PATIENCE_S).text == prompt.text + after
    request.stopping.max_new_tokens = 0
    prompt, _, _, after = generate(daemon, request, stream)
    assert after == "�"


def test_of_several_samples_the_first_tells_of_the_prompt(daemon):
    request = daemon.request([2, 100, 200] * 20, 8)
    request.sampling.temperature, request.sampling.seed, request.sampling.samples = 1, 5, 3
    plain = daemon.stub.Generate(request, timeout=PATIENCE_S)
    request.output.echo, request.output.prompt_top_logprobs = True, 1
    reply = daemon.stub.Generate(request, timeout=PATIENCE_S)
    assert list(reply.prompt_logprobs) == score(daemon, [2, 100, 200] * 20, 1)
    assert list(reply.prompt.token_ids) == [2, 100, 200] * 20
    assert [list(s.token_ids) for s in (reply, *reply.more_samples)] == [list(s.token_ids) for s in (plain, *plain.more_samples)]
    assert not any(s.prompt_logprobs or s.prompt.token_ids or s.prompt.text for s in reply.more_samples)
    assert [s.prompt.seed for s in reply.more_samples] == [6, 7]


def test_the_end_of_a_prompt_is_kept(daemon):
    pb, stub = daemon.api.pb, daemon.stub
    ids = [2] + [5 + i % 700 for i in range(2 * CONTEXT)]
    for most, new in ((10, 5), (1, 5), (CONTEXT, 1), (-1, 6), (-1, 1)):
        kept = ids[-most:] if most > 0 else ids[-(CONTEXT - new + 1):]
        request = daemon.request(ids, new, truncate_prompt_tokens=most)
        request.output.echo = True
        reply = stub.Generate(request, timeout=PATIENCE_S)
        assert list(reply.prompt.token_ids) == kept and reply.prompt.prompt_tokens == len(kept)
        assert list(reply.token_ids) == list(stub.Generate(daemon.request(kept, new), timeout=PATIENCE_S).token_ids)
    request = pb.ScoreRequest(truncate_prompt_tokens=-1)
    request.token_ids.ids.extend(ids)
    assert [t.id for t in stub.Score(request, timeout=PATIENCE_S).tokens] == ids[-CONTEXT:]
    # Longer than any text that could fit: what counts is what is kept.
    long = "Call me Ishmael. " * 40_000
    request = pb.GenerateRequest(text=long, truncate_prompt_tokens=7, stopping={"max_new_tokens": 0}, output={"echo": True})
    assert len(stub.Generate(request, timeout=PATIENCE_S).prompt.token_ids) == 7
    for bad in (0, -2, CONTEXT + 1, 2**31 - 1, -2**31):
        request = daemon.request([2, 5], 1, truncate_prompt_tokens=bad)
        for call in (lambda: stub.Generate(request, timeout=PATIENCE_S), lambda: list(stub.GenerateStream(request, timeout=PATIENCE_S))):
            error = expect_error(call, grpc.StatusCode.INVALID_ARGUMENT)
            assert f"truncate_prompt_tokens is {bad}; it must be -1, or 1 ... {CONTEXT}" in error.details()


def test_what_asks_for_nothing_is_refused(daemon):
    request = daemon.request([2, 5], 0)
    error = expect_error(lambda: daemon.stub.Generate(request, timeout=PATIENCE_S), grpc.StatusCode.INVALID_ARGUMENT)
    assert "stopping.max_new_tokens is 0" in error.details()
    request.output.prompt_top_logprobs = 101
    error = expect_error(lambda: daemon.stub.Generate(request, timeout=PATIENCE_S), grpc.StatusCode.INVALID_ARGUMENT)
    assert "output.prompt_top_logprobs is 101; at most 100" in error.details()


def test_a_cancel_amid_a_prompt_that_is_scored_frees_everything(braked):
    request = braked.request([2] + [5 + i % 700 for i in range(300)], 200)
    request.output.prompt_top_logprobs = 50
    stream = braked.stub.GenerateStream(request, timeout=PATIENCE_S)
    for chunk in stream:
        if chunk.prompt_logprobs:
            break
    stream.cancel()
    expect_error(lambda: list(stream), grpc.StatusCode.CANCELLED)
    braked.expect_idle()


def score_all(daemon, *prompts, **fields):
    pb = daemon.api.pb
    request = pb.ScoreRequest(prompts=[pb.ScoredPrompt(text=p) if isinstance(p, str) else pb.ScoredPrompt(token_ids={"ids": p}) for p in prompts], **fields)
    return daemon.stub.Score(request, timeout=PATIENCE_S)


def test_several_prompts_are_scored_in_their_order(daemon):
    pb = daemon.api.pb
    ids = [[2] + [5 + (i * k) % 700 for i in range(length)] for k, length in enumerate((200, 1, 50, 7, 300))]
    reply = score_all(daemon, *ids, TEXT, top_logprobs=2, request_id="many")
    assert reply.request_id == "many" and reply.model and not reply.tokens and not reply.HasField("timings")
    alone = daemon.stub.Score(pb.ScoreRequest(text=TEXT, top_logprobs=2), timeout=PATIENCE_S)
    assert [list(s.tokens) for s in reply.scores] == [score(daemon, p, 2) for p in ids] + [list(alone.tokens)]
    assert all(s.timings.total_ms > 0 for s in reply.scores)
    (one,) = score_all(daemon, ids[2]).scores
    assert list(one.tokens) == score(daemon, ids[2], 0)
    assert [[t.id for t in s.tokens] for s in score_all(daemon, *ids, truncate_prompt_tokens=3).scores] == [p[-3:] for p in ids]
    most = daemon.stub.GetServerInfo(pb.GetServerInfoRequest()).limits.max_score_prompts
    assert len(score_all(daemon, *[[2, 5 + i] for i in range(most)]).scores) == most
    daemon.expect_idle()


def test_where_one_prompt_is_malformed_none_is_scored(daemon):
    before = daemon.load().prompt_tokens
    good = [2, 5, 7]
    for prompts, words in ((([], good), "prompts[0].token_ids.ids is empty"),
                           ((good, good, [2, 8192]), "prompts[2].token_ids.ids[1] is 8192"),
                           ((good, [5] * 513), "prompts[1].token_ids has 513 tokens; the model allows 512"),
                           ([good] * 65, "prompts has 65 entries; at most 64 are allowed"),
                           (("x" * 3_000_000, good), "prompts[0].text has 3000000 bytes")):
        error = expect_error(lambda: score_all(daemon, *prompts), grpc.StatusCode.INVALID_ARGUMENT)
        assert words in error.details()
    error = expect_error(lambda: score_all(daemon, good, text="beside"), grpc.StatusCode.INVALID_ARGUMENT)
    assert "prompts is given beside text or token_ids" in error.details()
    error = expect_error(lambda: score_all(daemon, *[[5] * 500] * 10, top_logprobs=100), grpc.StatusCode.INVALID_ARGUMENT)
    assert "5000 tokens makes a reply of about" in error.details()
    assert daemon.load().prompt_tokens == before


def test_prompts_that_the_queue_does_not_take_all_are_refused_together(start):
    daemon = start("--scheduler-max-waiting-requests", "4", "--scheduler-max-batch", "1", "--scheduler-fault", "slow@10")
    holding = daemon.stub.GenerateStream(daemon.request([2, 100], 400), timeout=PATIENCE_S)
    next(chunk for chunk in holding if chunk.token_ids)
    waiting = [daemon.stub.Generate.future(daemon.request([2, 100], 1), timeout=PATIENCE_S) for _ in range(2)]
    until(lambda: daemon.load().waiting_requests == 2)
    expect_error(lambda: score_all(daemon, *[[2, 5 + i] for i in range(4)]), grpc.StatusCode.RESOURCE_EXHAUSTED)
    for call in (holding, *waiting):
        call.cancel()
    daemon.expect_idle()
    account = daemon.stub.GetServerInfo(daemon.api.pb.GetServerInfoRequest()).admission
    assert account.received == account.finished + account.cancelled + account.failed + account.live + sum(account.refused.values())
    assert account.received == 7 and account.refused["QUEUE_FULL"] == 2
    assert len(score_all(daemon, [2, 5], [2, 6], [2, 7]).scores) == 3


def test_more_prompts_than_the_queue_has_places_are_refused_for_good(start, api):
    """As an invalid request: trying again would be of no use."""
    daemon = start("--scheduler-max-waiting-requests", "4")
    ask = lambda count: daemon.stub.Score(api.pb.ScoreRequest(
        prompts=[api.pb.ScoredPrompt(token_ids=api.pb.TokenIds(ids=[2, 100 + n])) for n in range(count)]), timeout=PATIENCE_S)
    assert len(ask(4).scores) == 4
    with pytest.raises(grpc.RpcError) as error:
        ask(5)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "prompts has 5 entries; the queue holds at most 4 of them" in error.value.details()
