"""dejavu-cli as scripts use it: what it writes, and its exit codes."""
from concurrent import futures
import json
import os
import signal
import socket
import subprocess

import grpc
import pytest

from conftest import BIN, PATIENCE_S

IDS = [2, 100, 200]
IDS_FLAG = "2,100,200"


def run(daemon, *arguments, stdin=b"", server=None):
    environment = {k: v for k, v in os.environ.items() if k != "DEJAVU_SERVER"}
    command = [BIN / "dejavu-cli", "--server", server or daemon.address, *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=PATIENCE_S, env=environment)


def succeed(daemon, *arguments, **options):
    done = run(daemon, *arguments, **options)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_generate_prints_one_object_that_agrees_with_the_api(daemon):
    reply = daemon.stub.Generate(daemon.request(IDS, 12), timeout=PATIENCE_S)
    out = succeed(daemon, "generate", "--token-ids", IDS_FLAG, "--max-new-tokens", "12", "--ignore-eos", "--json")
    assert out.count("\n") == 1
    result = json.loads(out)
    assert result["token_ids"] == list(reply.token_ids)
    assert result["text"] == reply.text
    assert result["finish_reason"] == "length"
    assert result["prompt_tokens"] == 3 and result["generated_tokens"] == 12
    assert result["ttft_ms"] > 0 and result["mean_itl_ms"] >= 0  # so few may all come in one message
    assert result["model"] == reply.prompt.model and result["request_id"]


def test_the_seed_that_is_printed_repeats_the_answer(daemon):
    flags = ["generate", "--token-ids", IDS_FLAG, "--max-new-tokens", "12", "--temperature", "1", "--json"]
    first = json.loads(succeed(daemon, *flags))
    again = json.loads(succeed(daemon, *flags, "--seed", str(first["seed"])))
    assert again["token_ids"] == first["token_ids"]


def test_several_samples_are_those_of_their_seeds(daemon):
    flags = ["generate", "--token-ids", IDS_FLAG, "--max-new-tokens", "12", "--temperature", "1", "--ignore-eos"]
    alone = [json.loads(succeed(daemon, *flags, "--json", "--seed", str(seed))) for seed in (3, 4)]
    flags += ["--seed", "3", "--samples", "2"]
    samples = json.loads(succeed(daemon, *flags, "--json"))["samples"]
    assert [(s["seed"], s["token_ids"], s["text"]) for s in samples] == [(s["seed"], s["token_ids"], s["text"]) for s in alone]
    chunks = [json.loads(line) for line in succeed(daemon, *flags, "--json", "--stream").splitlines()]
    for i, sample in enumerate(alone):
        assert "".join(c["text"] for c in chunks if c["sample"] == i) == sample["text"]
    text = succeed(daemon, *flags)
    for i, sample in enumerate(alone):
        assert f"--- sample {i}, seed {sample['seed']}\n{sample['text']}" in text


def test_a_stream_of_objects_adds_up_to_the_whole(daemon):
    flags = ["generate", "--token-ids", IDS_FLAG, "--max-new-tokens", "12", "--ignore-eos", "--json"]
    whole = json.loads(succeed(daemon, *flags, "--top-logprobs", "2"))
    chunks = [json.loads(line) for line in succeed(daemon, *flags, "--top-logprobs", "2", "--stream").splitlines()]
    assert "".join(c["text"] for c in chunks) == whole["text"]
    assert [i for c in chunks for i in c["token_ids"]] == whole["token_ids"]
    assert [p for c in chunks for p in c.get("logprobs", [])] == whole["logprobs"]
    assert len(whole["logprobs"]) == 12 and all(len(p["top"]) == 2 for p in whole["logprobs"])
    assert "seed" in chunks[0] and chunks[0]["prompt_tokens"] == 3
    assert chunks[-1]["finish_reason"] == "length" and "mean_itl_ms" in chunks[-1]
    assert not any("finish_reason" in c for c in chunks[:-1])


SPARSITY_KEYS = {"tier", "decode_tokens", "mlp_density", "mlp_selected", "mlp_active", "mlp_union_density", "head_density",
                 "fallback_share", "shadow"}


def test_the_object_tells_tier_and_densities(daemon):
    flags = ["generate", "--token-ids", IDS_FLAG, "--max-new-tokens", "12", "--ignore-eos", "--json"]
    by_default = json.loads(succeed(daemon, *flags))
    dense = json.loads(succeed(daemon, *flags, "--tier", "dense", "--deterministic", "--shadow-every", "1"))
    assert by_default["tier"] == "exact" and dense["tier"] == "dense"
    assert dense["token_ids"] == by_default["token_ids"]
    for result in (by_default, dense):
        assert SPARSITY_KEYS <= set(result)
        assert result["shadow"] is None  # only predicted tiers are compared
        assert result["head_density"] == 1 and 0 < result["mlp_density"] <= 1
    *chunks, last = [json.loads(line) for line in succeed(daemon, *flags, "--tier", "dense", "--stream").splitlines()]
    assert last["tier"] == "dense" and SPARSITY_KEYS <= set(last)
    assert not any("tier" in c or "mlp_density" in c for c in chunks)


def test_sparsity_flags_reach_the_server(start):
    daemon = start("--predictor", "none", "--sparsity-min-shadow-every", "100")
    flags = ["generate", "--token-ids", IDS_FLAG, "--max-new-tokens", "2"]
    for tier in ("high", "balanced", "fast"):
        done = run(daemon, *flags, "--tier", tier, "--json")
        assert done.returncode == 1
        error = json.loads(done.stdout)["error"]
        assert error["code"] == "FAILED_PRECONDITION" and tier in error["message"]
        assert (error["details"][0]["type"], error["details"][0]["subject"]) == ("FEATURE", "predictor")
    done = run(daemon, *flags, "--shadow-every", "7", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["details"][0]["field"] == "sparsity.shadow_every"
    succeed(daemon, *flags, "--shadow-every", "0")


@pytest.fixture
def scripted(api):
    """A server that answers with a report of every field, and keeps the last request."""
    report = api.pb.SparsityReport(tier=api.pb.TIER_HIGH, decode_tokens=4, mlp_density=0.25, mlp_selected=0.375,
                                   mlp_active=0.125, mlp_union_density=0.5, head_density=0.75, fallback_share=0.0625)
    report.shadow.CopyFrom(api.pb.ShadowReport(tokens=3, top1_agreement=0.875, kl_nats=0.03125, recall=0.9375, precision=0.625,
                                               missed_mass=0.015625))

    class Scripted(api.rpc.GenerationServiceServicer):
        def GenerateStream(self, request, context):
            self.request = request
            yield api.pb.GenerateChunk(prompt=api.pb.PromptInfo(request_id="r", tier=api.pb.TIER_HIGH))
            yield api.pb.GenerateChunk(token_ids=[7], text="x", finish=api.pb.Finish(reason=1, sparsity=report))

        def GetServerInfo(self, request, context):
            info = api.pb.SparsityInfo(
                default_tier=api.pb.TIER_HIGH, highest_tier=api.pb.TIER_EXACT, lowest_tier=api.pb.TIER_FAST,
                available_tiers=[api.pb.TIER_EXACT, api.pb.TIER_HIGH], predictor="p.safetensors", predictor_tap="mlp-norm",
                predictor_bytes=99, shadow_every=64, shadow_tokens=8, shadow_top1_agreement=0.75, shadow_kl_nats=0.25,
                fallbacks=5, recoveries=4)
            info.exact_layers.add(tier=api.pb.TIER_HIGH, layer=3)
            return api.pb.GetServerInfoResponse(sparsity=info)

        def GetModelInfo(self, request, context):
            return api.pb.GetModelInfoResponse()

    server = grpc.server(futures.ThreadPoolExecutor(2))
    servicer = Scripted()
    api.rpc.add_GenerationServiceServicer_to_server(servicer, server)
    servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield servicer
    server.stop(None).wait()


def test_the_whole_report_is_in_the_object(scripted, api):
    result = json.loads(succeed(scripted, "generate", "--token-ids", "2", "--tier", "balanced", "--deterministic",
                                "--shadow-every", "5", "--json"))
    assert {k: v for k, v in result.items() if k in SPARSITY_KEYS} == {
        "tier": "high", "decode_tokens": 4, "mlp_density": 0.25, "mlp_selected": 0.375, "mlp_active": 0.125,
        "mlp_union_density": 0.5, "head_density": 0.75, "fallback_share": 0.0625,
        "shadow": {"tokens": 3, "top1_agreement": 0.875, "kl_nats": 0.03125, "recall": 0.9375, "precision": 0.625,
                   "missed_mass": 0.015625}}
    sent = scripted.request.sparsity
    assert sent.tier == api.pb.TIER_BALANCED and sent.deterministic and sent.shadow_every == 5
    line = run(scripted, "generate", "--token-ids", "2", "--stats").stderr.decode().splitlines()[-1]
    assert line.split(maxsplit=1) == [
        "sparsity", "tier high, 25.0 % of MLP rows and 75.0 % of heads; same most likely token as dense in 87.5 % of 3 tokens"]
    sent = scripted.request.sparsity
    assert sent.tier == api.pb.TIER_UNSPECIFIED and not sent.deterministic and not sent.HasField("shadow_every")
    succeed(scripted, "generate", "--token-ids", "2", "--shadow-every", "0")
    assert scripted.request.sparsity.HasField("shadow_every")  # never, which is not the server's own number


def test_info_tells_what_shadow_checks_have_found(scripted):
    assert json.loads(succeed(scripted, "info", "--json"))["server"]["sparsity"] == {
        "default_tier": "high", "highest_tier": "exact", "lowest_tier": "fast", "available_tiers": ["exact", "high"],
        "predictor": "p.safetensors", "predictor_tap": "mlp-norm", "predictor_bytes": 99, "shadow_every": 64,
        "shadow_tokens": 8, "shadow_top1_agreement": 0.75, "shadow_kl_nats": 0.25,
        "exact_layers": [{"tier": "high", "layer": 3}], "fallbacks": 5, "recoveries": 4}


def test_plain_text_goes_to_stdout_and_statistics_to_stderr(daemon):
    flags = ["generate", "It was", "--max-new-tokens", "12"]
    text = json.loads(succeed(daemon, *flags, "--json"))["text"]
    done = run(daemon, *flags, "--stats")
    assert done.returncode == 0
    assert done.stdout.decode().rstrip("\n") == text.rstrip("\n")
    assert b"time to first token" in done.stderr and b"per token" in done.stderr
    assert b"tier exact" in done.stderr and b"of MLP rows" in done.stderr


def test_the_prompt_may_come_from_anywhere(daemon, tmp_path):
    prompt = "The sea, naïve — [1,2] {}"
    file = tmp_path / "prompt"
    file.write_bytes(prompt.encode())
    ids = json.loads(succeed(daemon, "tokenize", "--prompt", prompt, "--json"))["token_ids"]
    flags = ["--max-new-tokens", "4", "--json"]
    answers = [
        succeed(daemon, "generate", prompt, *flags),
        succeed(daemon, "generate", "--prompt", prompt, *flags),
        succeed(daemon, "generate", "--prompt-file", file, *flags),
        succeed(daemon, "generate", *flags, stdin=prompt.encode()),
        succeed(daemon, "generate", "--token-ids", ",".join(map(str, ids)), *flags),
    ]
    tokens = [json.loads(answer)["token_ids"] for answer in answers]
    assert all(t == tokens[0] for t in tokens)
    assert json.loads(answers[0])["prompt_tokens"] == len(ids)


def test_sampling_flags_reach_the_server(daemon):
    flags = ["generate", "--token-ids", IDS_FLAG, "--max-new-tokens", "6", "--ignore-eos", "--json"]
    only = json.loads(succeed(daemon, *flags, "--allowed-token-ids", "100,101", "--temperature", "1"))
    assert set(only["token_ids"]) <= {100, 101}
    biased = json.loads(succeed(daemon, *flags, "--logit-bias", "300:100", "--logit-bias", "301:-100"))
    assert biased["token_ids"] == [300] * 6
    stopped = json.loads(succeed(daemon, *flags, "--logit-bias", "300:100", "--stop-token-ids", "300"))
    assert stopped["finish_reason"] == "stop_token" and stopped["stop_token_id"] == 300


def test_the_prompt_is_written_too_where_it_is_asked_for(daemon):
    text = "It was a dark night, and"
    plain = succeed(daemon, "generate", text, "--max-new-tokens", "8", "--ignore-eos")
    assert succeed(daemon, "generate", text, "--max-new-tokens", "8", "--ignore-eos", "--echo") == text + plain
    assert succeed(daemon, "generate", text, "--max-new-tokens", "0", "--echo") == text + "\n"
    scored = json.loads(succeed(daemon, "score", text, "--top-logprobs", "2", "--json"))
    both = json.loads(succeed(daemon, "generate", text, "--max-new-tokens", "8", "--ignore-eos", "--echo", "--prompt-top-logprobs", "2", "--json"))
    assert both["prompt_logprobs"] == scored["tokens"] and both["prompt"] == text
    assert both["prompt_token_ids"] == [token["id"] for token in scored["tokens"]]
    assert both["text"] + "\n" == plain or both["text"] == plain
    alone = json.loads(succeed(daemon, "generate", text, "--max-new-tokens", "0", "--prompt-logprobs", "--json"))
    assert alone["token_ids"] == [] and [t["logprob"] for t in alone["prompt_logprobs"]] == [t["logprob"] for t in scored["tokens"]]
    kept = json.loads(succeed(daemon, "score", text, "--truncate-prompt-tokens", "3", "--json"))
    assert [t["id"] for t in kept["tokens"]] == both["prompt_token_ids"][-3:]


def test_a_file_of_prompts_is_scored_in_one_call(daemon, tmp_path):
    prompts = ["It was a dark night, and", "", "Call me Ishmael."]
    lines = tmp_path / "prompts.txt"
    lines.write_text("".join(f"{prompt}\n" for prompt in prompts))
    result = json.loads(succeed(daemon, "score", "--prompts-file", str(lines), "--top-logprobs", "1", "--json"))
    alone = [json.loads(succeed(daemon, "score", "--prompt", prompt, "--top-logprobs", "1", "--json"))["tokens"] for prompt in prompts]
    assert [score["tokens"] for score in result["scores"]] == alone
    assert succeed(daemon, "score", "--prompts-file", str(lines)).count("logprob") == len(prompts)
    failed = run(daemon, "score", "--prompts-file", str(lines), "--token-ids", "2")
    assert failed.returncode == 2 and b"excludes" in failed.stderr


def test_score_has_one_entry_for_each_token_and_none_for_the_first(daemon, api):
    result = json.loads(succeed(daemon, "score", "--token-ids", IDS_FLAG, "--top-logprobs", "3", "--json"))
    request = api.pb.ScoreRequest(top_logprobs=3)
    request.token_ids.ids.extend(IDS)
    reply = daemon.stub.Score(request, timeout=PATIENCE_S)
    assert [t["id"] for t in result["tokens"]] == IDS
    assert result["tokens"][0]["logprob"] is None
    for token, expected in zip(result["tokens"][1:], reply.tokens[1:]):
        assert token["logprob"] == pytest.approx(expected.logprob, rel=1e-7)
        assert token["rank"] == expected.rank
    for token, expected in zip(result["tokens"], reply.tokens):
        assert [a["id"] for a in token["top"]] == [a.id for a in expected.top]
        assert len(token["top"]) == 3


def test_tokens_go_to_text_and_back(daemon):
    ids = json.loads(succeed(daemon, "tokenize", "--prompt", "Hello, wörld", "--json"))["token_ids"]
    assert ids[0] == 2
    flag = ",".join(map(str, ids))
    assert json.loads(succeed(daemon, "detokenize", "--token-ids", flag, "--json")) == {"text": "Hello, wörld"}
    assert succeed(daemon, "detokenize", "--token-ids", flag, "--keep-special") == "</s>Hello, wörld\n"
    ids_of = lambda *flags: json.loads(succeed(daemon, "tokenize", "--prompt", "one</s>two", "--json", *flags))["token_ids"]  # noqa: E731
    assert ids_of().count(ids[0]) == 1 and ids_of("--parse-special").count(ids[0]) == 2


def test_info_tells_of_server_and_model(daemon):
    info = json.loads(succeed(daemon, "info", "--json"))
    assert info["server"]["state"] == "SERVING"
    assert info["model"]["architecture"] == "opt" and info["model"]["layers"] == 8
    assert "context_tokens" in succeed(daemon, "info")


def test_info_tells_of_tiers_and_predictor(start):
    daemon = start("--predictor", "none", "--sparsity-lowest-tier", "balanced", "--sparsity-shadow-every", "64")
    sparsity = json.loads(succeed(daemon, "info", "--json"))["server"]["sparsity"]
    assert sparsity["default_tier"] == "exact"
    assert sparsity["highest_tier"] == "dense" and sparsity["lowest_tier"] == "balanced"
    assert sparsity["available_tiers"] == ["dense", "exact"]
    assert sparsity["predictor"] == "" and sparsity["predictor_bytes"] == 0
    assert sparsity["shadow_every"] == 64 and sparsity["shadow_tokens"] == 0 and sparsity["exact_layers"] == []
    text = succeed(daemon, "info")
    assert "server sparsity" in text and "lowest_tier              balanced" in text


def test_health_succeeds_only_when_serving(daemon):
    assert succeed(daemon, "health") == "SERVING\n"
    assert run(daemon, "health", "--service", "no.such.Service").returncode == 1


def test_nobody_there_is_exit_code_3(daemon):
    with socket.socket() as closed:  # bound, but not listening
        closed.bind(("127.0.0.1", 0))
        server = f"127.0.0.1:{closed.getsockname()[1]}"
        for command in (["health"], ["generate", "a", "--wait", "0"]):
            done = run(daemon, *command, server=server)
            assert done.returncode == 3, done.stderr
            assert b"UNAVAILABLE" in done.stderr


@pytest.mark.parametrize("arguments", [
    [], ["nothing"], ["generate", "--top-k", "-1", "a"], ["generate", "--token-ids", "2,x"],
    ["generate", "a", "--token-ids", "2"], ["generate", "a", "--logit-bias", "5"], ["generate", "a", "--logprobs"],
    ["generate", b"\xff"], ["generate", "a", "--stop", b"\xff"], ["generate", "--prompt-file", "/nowhere"], ["abort"],
    ["generate", "a", "--tier", "best"], ["generate", "a", "--tier", "EXACT"], ["generate", "a", "--shadow-every", "-1"],
])
def test_wrong_usage_is_exit_code_2(daemon, arguments):
    done = run(daemon, *arguments)
    assert done.returncode == 2
    assert done.stdout == b"" and done.stderr != b""


def test_standard_input_that_is_not_text_is_refused(daemon):
    done = run(daemon, "generate", stdin=b"abc\xff")
    assert done.returncode == 2
    assert b"not valid UTF-8 at byte 3" in done.stderr


def test_a_refused_request_is_exit_code_1_with_the_field(daemon):
    done = run(daemon, "generate", "a", "--temperature", "101", "--json")
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "INVALID_ARGUMENT"
    assert error["details"][0]["field"] == "sampling.temperature"
    assert b"sampling.temperature" in done.stderr


def test_a_deadline_is_exit_code_4(daemon):
    flags = ["--token-ids", IDS_FLAG, "--max-new-tokens", "500", "--ignore-eos"]
    assert run(daemon, "--timeout", "0.001", "generate", *flags).returncode == 4
    daemon.expect_idle()


def test_ctrl_c_cancels_the_request_and_is_exit_code_130(braked):
    command = [BIN / "dejavu-cli", "--server", braked.address, "generate", "--token-ids", IDS_FLAG, "--max-new-tokens",
               "500", "--ignore-eos", "--json", "--stream"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(timeout=PATIENCE_S) == 130
    braked.expect_idle()


def test_abort_of_an_unknown_request_is_exit_code_1(daemon):
    assert run(daemon, "abort", "no-such-request").returncode == 1
