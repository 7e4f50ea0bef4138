"""Speculation over the API: the answers are those without, whoever guesses, and the counts are told."""
import re
import urllib.request

import grpc
import pytest

from conftest import PATIENCE_S

PROMPTS = ([2, 133, 16, 5, 7, 133, 16, 5, 7, 133, 16], [2, 100, 21, 41, 9, 5], [2, 7, 7, 7, 7], [2, 318, 10, 40])


def requests(daemon, api, mode, **asked):
    """Greedy and drawn, DENSE and EXACT; texts of this model repeat themselves, so that much can be looked up."""
    pb, made = api.pb, []
    for n in range(16):
        request = daemon.request(PROMPTS[n % 4], 60 + n)
        request.sparsity.tier = (pb.TIER_DENSE, pb.TIER_EXACT)[n // 4 % 2]
        request.output.logprobs = True
        request.speculation.CopyFrom(pb.Speculation(mode=mode, **asked))
        if n >= 8:
            request.sampling.temperature = 0.3 + 0.1 * n
            request.sampling.seed = n
        made.append(request)
    return made


def answers(daemon, made):
    calls = [daemon.stub.Generate.future(request, timeout=PATIENCE_S) for request in made]
    return [call.result() for call in calls]


def texts(replies):
    return [(list(r.token_ids), [token.logprob for token in r.logprobs], r.finish.reason) for r in replies]


def gauge(daemon, name):
    with urllib.request.urlopen(f"http://{daemon.metrics_address}/metrics", timeout=PATIENCE_S) as page:
        return float(re.search(rf"^{name}{{[^}}]*}} (\S+)$", page.read().decode(), re.MULTILINE)[1])


def test_the_default_changes_no_answer(start, api):
    daemon = start(environment={"DEJAVUD_SPECULATION_MODE": "auto"})
    info = daemon.stub.GetServerInfo(api.pb.GetServerInfoRequest(), timeout=PATIENCE_S).speculation
    assert info.default_mode == api.pb.SPECULATION_MODE_AUTO and not info.always_allowed
    assert (info.draft_tier, info.lookup, info.most_tokens) == (api.pb.TIER_HIGH, True, 6)
    off = answers(daemon, requests(daemon, api, api.pb.SPECULATION_MODE_OFF))
    assert all(reply.finish.speculation.rounds == 0 for reply in off)
    for _ in range(3):
        assert texts(answers(daemon, requests(daemon, api, api.pb.SPECULATION_MODE_UNSPECIFIED))) == texts(off)
    daemon.expect_idle()


@pytest.mark.parametrize("weights", ("int8", "stored"))
def test_guesses_are_counted_and_change_no_answer(start, api, weights):
    daemon = start("--speculation-allow-always", "--speculation-draft-weights", weights)
    pb = api.pb
    off = texts(answers(daemon, requests(daemon, api, pb.SPECULATION_MODE_OFF)))
    rounds, drafted, accepted = 0, {}, {}
    for asked in ({"draft_tier": pb.TIER_HIGH, "lookup": False, "most_tokens": 4},
                  {"draft_tier": pb.TIER_FAST, "lookup": False, "most_tokens": 1},
                  {"lookup": True, "most_tokens": 16}):
        replies = answers(daemon, requests(daemon, api, pb.SPECULATION_MODE_ALWAYS, **asked))
        assert texts(replies) == off
        for reply in replies:
            report = reply.finish.speculation
            rounds += report.rounds
            for of in (report.tier, report.lookup):
                assert of.accepted <= of.drafted
            if "draft_tier" in asked:
                assert report.rounds > 0 and report.tier.drafted > 0 and report.lookup.drafted == 0
            drafted[report.draft_tier] = drafted.get(report.draft_tier, 0) + report.tier.drafted
            accepted[report.draft_tier] = accepted.get(report.draft_tier, 0) + report.tier.accepted
    daemon.expect_idle()
    info = daemon.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=PATIENCE_S).speculation
    assert info.rounds == rounds
    told = {source.tier: source for source in info.sources}
    for tier in (pb.TIER_HIGH, pb.TIER_FAST):
        assert (told[tier].drafted, told[tier].accepted) == (drafted[tier], accepted[tier])
        assert told[tier].accepted > 0.5 * told[tier].drafted
    copy = gauge(daemon, "dejavu_draft_weight_bytes")
    assert copy > 0.1 * gauge(daemon, "dejavu_weight_bytes") if weights == "int8" else copy == 0


def test_always_has_to_be_allowed(start, api):
    daemon = start()
    with pytest.raises(grpc.RpcError) as error:
        answers(daemon, requests(daemon, api, api.pb.SPECULATION_MODE_ALWAYS))
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT and "speculation.mode" in error.value.details()
