"""Text at both ends of a request: special tokens in prompts and stop strings, half characters, tokenizers that do not fit."""
import json

import grpc
import pytest

from conftest import MODEL, PATIENCE_S
from test_hostile_files import folder_with
from test_lifecycle import run_daemon

END = 2  # </s>


def model_with(folder, **files):
    """The embedded model with other files, as JSON."""
    return folder_with(folder, MODEL, **{name: json.dumps(content).encode() for name, content in files.items()})


def forced(request, *ids):
    """Lets nothing but these be sampled."""
    request.penalties.allowed_token_ids.extend(ids)
    return request


def test_special_tokens_in_a_prompt_are_text_unless_they_are_parsed(daemon, api):
    tokenize = lambda **fields: list(daemon.stub.Tokenize(api.pb.TokenizeRequest(**fields)).token_ids)  # noqa: E731
    as_text, parsed = tokenize(text="one</s>two"), tokenize(text="one</s>two", parse_special_tokens=True)
    assert as_text.count(END) == 1 and as_text[0] == END
    assert parsed.count(END) == 2 and len(parsed) < len(as_text)
    request = api.pb.GenerateRequest(text="one</s>two", parse_special_tokens=True)
    request.stopping.max_new_tokens = 1
    assert daemon.stub.Generate(request, timeout=PATIENCE_S).prompt.prompt_tokens == len(parsed)
    request.parse_special_tokens = False
    assert daemon.stub.Generate(request, timeout=PATIENCE_S).prompt.prompt_tokens == len(as_text)
    score = daemon.stub.Score(api.pb.ScoreRequest(text="one</s>two", parse_special_tokens=True), timeout=PATIENCE_S)
    assert [token.id for token in score.tokens] == parsed


def test_an_empty_text_is_the_end_token_alone(daemon, api):
    request = api.pb.GenerateRequest(text="")
    request.stopping.max_new_tokens = 3
    of_ids = daemon.stub.Generate(daemon.request([END], 3), timeout=PATIENCE_S)
    reply = daemon.stub.Generate(request, timeout=PATIENCE_S)
    assert reply.prompt.prompt_tokens == 1 and reply.token_ids == of_ids.token_ids


def test_a_stop_string_that_is_a_special_token_ends_at_it(daemon, api):
    stop = api.pb.FINISH_REASON_STOP_STRING
    for include in (False, True):
        request = forced(daemon.request([2, 100], 5), 1)  # <pad>
        request.stopping.stop_strings.append("<pad>")
        request.stopping.include_stop_string = include
        reply = daemon.stub.Generate(request, timeout=PATIENCE_S)
        assert (reply.finish.reason, reply.finish.stop_string) == (stop, "<pad>")
        assert list(reply.token_ids) == [1] and reply.text == ("<pad>" if include else "")
    request = forced(daemon.request([2, 100], 5), END)
    request.stopping.stop_strings.append("</s>")
    request.stopping.ignore_eos = False
    assert daemon.stub.Generate(request, timeout=PATIENCE_S).finish.reason == api.pb.FINISH_REASON_EOS
    request.stopping.ignore_eos = True
    reply = daemon.stub.Generate(request, timeout=PATIENCE_S)
    assert (reply.finish.reason, reply.finish.stop_string) == (stop, "</s>") and list(reply.token_ids) == [END]


def test_the_output_continues_a_character_that_the_prompt_begins(daemon, api):
    ids = list(daemon.stub.Tokenize(api.pb.TokenizeRequest(text="a🎈")).token_ids)
    without_last = daemon.stub.Detokenize(api.pb.DetokenizeRequest(token_ids=ids[:-1])).text
    assert without_last == "a\ufffd"
    request = forced(daemon.request(ids[:-1], 1), ids[-1])
    assert daemon.stub.Generate(request, timeout=PATIENCE_S).text == "🎈"
    assert "".join(chunk.text for chunk in daemon.stub.GenerateStream(request, timeout=PATIENCE_S)) == "🎈"


def test_a_tokenizer_that_is_larger_than_the_model_is_named_at_start(start, api, tmp_path):
    config = json.loads((MODEL / "tokenizer_config.json").read_text())
    model = model_with(tmp_path / "larger", tokenizer_config__json=config | {"mask_token": "<mask>"})
    daemon = start(model=model)
    assert "tokens that the model lacks, whose ids are below 8192: <mask> (8192);" in daemon.log()
    request = api.pb.GenerateRequest(text="a <mask>")
    request.stopping.max_new_tokens = 1
    daemon.stub.Generate(request, timeout=PATIENCE_S)
    request.parse_special_tokens = True
    with pytest.raises(grpc.RpcError) as raised:
        daemon.stub.Generate(request, timeout=PATIENCE_S)
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "<mask>" in raised.value.details() and "ids of this model are below 8192" in raised.value.details()

    tokenizer = json.loads((MODEL / "tokenizer.json").read_text())
    tokenizer["post_processor"]["special_tokens"]["</s>"]["ids"] = [8192]
    broken = model_with(tmp_path / "broken", tokenizer__json=tokenizer)
    done = run_daemon("--model", str(broken), "--listen", "127.0.0.1:0")
    assert done.returncode == 1 and "puts token id 8192 around each prompt" in done.stderr, done


def test_ids_that_no_token_has_are_never_sampled(start, api, tmp_path):
    tokenizer = json.loads((MODEL / "tokenizer.json").read_text())
    kept = {token: i for token, i in tokenizer["model"]["vocab"].items() if i < 300 or i == 8191}
    tokenizer["model"] |= {"vocab": kept, "merges": []}
    daemon = start(model=model_with(tmp_path / "holes", tokenizer__json=tokenizer))
    request = daemon.request([2, 100, 200], 100)
    request.stopping.ignore_eos = True
    ids = daemon.stub.Generate(request, timeout=PATIENCE_S).token_ids
    assert len(ids) == 100 and all(i in kept.values() for i in ids)
    request.sampling.temperature, request.sampling.seed = 1.0, 3
    assert all(i in kept.values() for i in daemon.stub.Generate(request, timeout=PATIENCE_S).token_ids)
    refused = forced(daemon.request([2], 1), 300, 301)
    with pytest.raises(grpc.RpcError) as raised:
        daemon.stub.Generate(refused, timeout=PATIENCE_S)
    assert "leaves nothing to sample" in raised.value.details()
