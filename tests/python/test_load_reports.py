"""What the daemon tells clients that balance load: in trailers, and beside calls. What gRPC's policy makes of it is measured by
./run load-balancing."""
import grpc
import pytest

import groups
import orca
from conftest import PATIENCE_S
from test_client import expect_error
from test_security import token_lines


@pytest.fixture(scope="session")
def xds(tmp_path_factory):
    return orca.generate(tmp_path_factory.mktemp("xds"))


GENERATE, STREAM = "/dejavu.v1.GenerationService/Generate", "/dejavu.v1.GenerationService/GenerateStream"
CODES = {code.value[0]: code for code in grpc.StatusCode}


def report_of(xds, daemon, message, path=GENERATE, code=grpc.StatusCode.OK, metadata=()):
    stream = orca.call(daemon.address, path, message, metadata)
    assert CODES[stream.code] == code, stream
    (report,) = orca.reports_in(stream)
    return xds[0].FromString(report)


def reports_beside(xds, daemon, **options):
    request = xds[1]()
    request.report_interval.FromMilliseconds(100)
    return xds[2](daemon.channel).StreamCoreMetrics(request, timeout=PATIENCE_S, **options)


def test_the_trailers_of_every_generation_hold_a_report(daemon, api, xds):
    report = report_of(xds, daemon, daemon.request([2, 100], 10))
    assert report.rps_fractional > 0 and report.application_utilization > 0 and report.mem_utilization >= 0
    assert set(report.utilization) == {"kv_cache", "batch"}
    assert set(report.named_metrics) == {"running_requests", "waiting_requests", "waiting_tokens"}
    assert report_of(xds, daemon, daemon.request([2, 100], 10), STREAM).rps_fractional > 0
    score = api.pb.ScoreRequest()
    score.token_ids.ids.extend([2, 100])
    assert report_of(xds, daemon, score, "/dejavu.v1.GenerationService/Score").rps_fractional > 0
    # What the engine had no part in says nothing of load.
    asked = orca.call(daemon.address, "/dejavu.v1.GenerationService/GetServerInfo", api.pb.GetServerInfoRequest())
    assert asked.code == 0 and orca.reports_in(asked) == []


def test_a_refusal_for_want_of_room_is_an_error_of_the_server_and_a_bad_request_is_not(start, xds):
    daemon = start("--scheduler-fault", "slow@10", "--scheduler-deadline-slack", "0", "--scheduler-max-batch", "1",
                   "--scheduler-max-waiting-requests", "1")
    bad = daemon.request([2, 100], 1)
    bad.sampling.temperature = -1
    assert report_of(xds, daemon, bad, code=grpc.StatusCode.INVALID_ARGUMENT).eps == 0
    held = [daemon.stub.GenerateStream(daemon.request([2, 100], 400), timeout=PATIENCE_S)]
    groups.until(lambda: daemon.load().running_requests == 1, daemon.load)
    held.append(daemon.stub.GenerateStream(daemon.request([2, 101], 400), timeout=PATIENCE_S))
    groups.until(lambda: daemon.load().waiting_requests == 1, daemon.load)
    report = report_of(xds, daemon, daemon.request([2], 1), code=grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert report.eps > 0 and report.named_metrics["waiting_requests"] == 1 and report.named_metrics["running_requests"] == 1
    for stream in held:
        stream.cancel()
    daemon.expect_idle()


def test_rate_over_utilisation_is_one_over_the_time_that_a_request_stays(start, xds):
    """What weighted_round_robin weighs by. Requests one after the other: their number and their times add up to the means exactly."""
    daemon = start("--scheduler-fault", "slow@10", "--scheduler-deadline-slack", "0", "--scheduler-max-batch", "4")
    for _ in range(20):
        reply = daemon.stub.Generate(daemon.request([2, 100], 5), timeout=PATIENCE_S)
    report = report_of(xds, daemon, daemon.request([2, 100], 5))
    # Five steps of at least 10 ms: no more than 20 requests in a second and a sequence, however busy the machine is.
    weight = report.rps_fractional / (report.application_utilization * 4)
    assert 0 < weight < 1 / 0.045  # 10 ms a token and a bias of the fading means of less than 1 %
    # Nor fewer than the slowest of them allows, with all that was outside of the engine.
    assert weight > 0.2 / (reply.finish.timings.total_ms / 1000 + 1)


def test_reports_come_beside_calls_as_often_as_they_are_asked_for(daemon, xds):
    stream = reports_beside(xds, daemon)
    first = next(stream)
    daemon.stub.Generate(daemon.request([2, 100], 10), timeout=PATIENCE_S)
    later = next(report for report in stream if report.rps_fractional > 0)
    assert first.mem_utilization == 0 and later.application_utilization > 0
    stream.cancel()
    negative = xds[1]()
    negative.report_interval.seconds = -1
    expect_error(lambda: next(xds[2](daemon.channel).StreamCoreMetrics(negative, timeout=PATIENCE_S)), grpc.StatusCode.INVALID_ARGUMENT)


def test_a_report_shows_requests_that_run(braked, xds):
    held = [braked.stub.GenerateStream(braked.request([2, 100 + i], 400), timeout=PATIENCE_S) for i in range(3)]
    for stream in held:
        next(stream)
    reports = reports_beside(xds, braked)
    found = next(report for report in reports if report.named_metrics["running_requests"] == 3)
    assert found.mem_utilization > 0 and found.utilization["batch"] > 0
    busy = next(report for report in reports if report.cpu_utilization > 0)
    assert busy.cpu_utilization <= 1
    reports.cancel()
    for stream in held:
        stream.cancel()
    braked.expect_idle()


def test_a_stream_of_reports_ends_with_the_server(start, xds):
    daemon = start()
    stream = reports_beside(xds, daemon)
    next(stream)
    daemon.terminate()
    assert expect_error(lambda: list(stream), grpc.StatusCode.UNAVAILABLE)
    assert daemon.wait() == 0


def test_tenants_are_told_what_a_policy_needs_and_nothing_of_others(start, xds, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text(token_lines({"a": "secret-of-a", "operators": "secret-of-operators"}))
    daemon = start("--auth-tokens-file", tokens)
    metadata = lambda token: (("authorization", f"Bearer {token}"),)
    expect_error(lambda: next(reports_beside(xds, daemon)), grpc.StatusCode.UNAUTHENTICATED)
    for token, counts in (("secret-of-a", 0), ("secret-of-operators", 3)):
        report = report_of(xds, daemon, daemon.request([2, 100], 5), metadata=metadata(token))
        assert report.rps_fractional > 0 and len(report.named_metrics) == counts
        assert set(report.utilization) == ({"kv_cache", "batch"} if counts else set())
        assert len(next(reports_beside(xds, daemon, metadata=metadata(token))).named_metrics) == counts


def test_reports_can_be_switched_off(start, xds):
    daemon = start("--no-load-reports")
    generated = orca.call(daemon.address, GENERATE, daemon.request([2, 100], 5))
    assert generated.code == 0 and orca.reports_in(generated) == []
    expect_error(lambda: next(reports_beside(xds, daemon)), grpc.StatusCode.UNIMPLEMENTED)
