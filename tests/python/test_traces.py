"""Spans for an OpenTelemetry collector."""
import concurrent.futures
import re
import socket
import threading
import time

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from conftest import MODEL, PATIENCE_S, PROCESSES, ROOT, Daemon
from log_lines import PARENT_ID, TRACE_ID, TRACEPARENT, line_of, lines_of, poll

pytestmark = pytest.mark.skipif(PROCESSES > 1, reason="the log of mpirun's processes is mpirun's")


def attributes(span):
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans; or, with `hang`, takes calls and never answers them."""

    def __init__(self, hang=False):
        self.spans = []
        self.resources = []
        self.calls = threading.Semaphore(0)
        self.release = threading.Event()
        self.hang = hang
        self.server = grpc.server(concurrent.futures.ThreadPoolExecutor(4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self.server)
        self.endpoint = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def Export(self, request, context):
        self.calls.release()
        if self.hang:
            self.release.wait(PATIENCE_S)
        for resource in request.resource_spans:
            self.resources.append(resource.resource)
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait(self, count):
        return poll(lambda: len(self.spans) >= count and list(self.spans), lambda: self.spans)

    def stop(self):
        self.release.set()
        self.server.stop(0).wait()


@pytest.fixture
def collectors():
    made = []

    def make(**options):
        made.append(Collector(**options))
        return made[-1]

    yield make
    for collector in made:
        collector.stop()


def traced(daemon, request, traceparent=TRACEPARENT):
    return list(daemon.stub.GenerateStream(request, timeout=PATIENCE_S, metadata=[("traceparent", traceparent)]))


def test_spans_hang_under_the_clients_span(start, api, collectors):
    collector = collectors()
    daemon = start("--trace-otlp-endpoint", collector.endpoint)
    request = daemon.request([2, 100, 200], 20, request_id="r")
    before = time.time_ns()
    finish = traced(daemon, request)[-1].finish
    after = time.time_ns()
    spans = {span.name: span for span in collector.wait(4)}
    top = spans[f"text_completion {MODEL.name}"]
    assert set(spans) == {top.name, "queue", "prefill", "decode"}
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE_ID}
    assert top.parent_span_id.hex() == PARENT_ID and top.kind == top.SPAN_KIND_SERVER
    assert all(spans[name].parent_span_id == top.span_id for name in ("queue", "prefill", "decode"))
    assert len({span.span_id for span in spans.values()}) == 4 and all(len(s.span_id) == 8 for s in spans.values())
    times = [spans["queue"].start_time_unix_nano, spans["queue"].end_time_unix_nano, spans["prefill"].end_time_unix_nano,
             spans["decode"].end_time_unix_nano]
    assert times == sorted(times)
    assert spans["prefill"].start_time_unix_nano == times[1] and spans["decode"].start_time_unix_nano == times[2]
    slack = 10**9  # of the two clocks, and of the end after the client's
    assert before - slack <= top.start_time_unix_nano <= times[0] and times[3] <= top.end_time_unix_nano <= after + slack

    said = attributes(top)
    assert said["gen_ai.operation.name"] == "text_completion" and said["gen_ai.request.model"] == MODEL.name
    assert (said["gen_ai.usage.input_tokens"], said["gen_ai.usage.output_tokens"]) == (3, 20)
    assert said["gen_ai.response.id"] == "r" and said["dejavu.tier"] == "exact"
    assert [v.string_value for v in said["gen_ai.response.finish_reasons"].values] == ["length"]
    assert said["dejavu.density"] == pytest.approx(finish.sparsity.mlp_density)
    assert said["gen_ai.latency.time_to_first_token"] == pytest.approx(finish.timings.ttft_ms / 1e3)
    assert said["gen_ai.latency.time_in_queue"] == pytest.approx(finish.timings.queue_ms / 1e3)
    assert (said["rpc.method"], said["rpc.grpc.status_code"]) == ("GenerateStream", 0)
    assert top.status.code == top.status.STATUS_CODE_UNSET
    assert {a.key: a.value.string_value for a in collector.resources[0].attributes}["service.name"] == "dejavud"

    # Unsampled, malformed and missing contexts give no spans; an error gives one that says so.
    for traceparent in (TRACEPARENT[:-1] + "0", "00-" + "0" * 32 + f"-{PARENT_ID}-01", "nonsense"):
        request.request_id = ""
        traced(daemon, request, traceparent)
    daemon.stub.Generate(request, timeout=PATIENCE_S)
    request.token_ids.ids[1] = 10**6
    with pytest.raises(grpc.RpcError):
        traced(daemon, request)
    daemon.stop()  # sends what it has
    assert len(collector.spans) == 5
    error = collector.spans[-1]
    assert error.status.code == error.status.STATUS_CODE_ERROR and attributes(error)["error.type"] == "INVALID_ARGUMENT"
    assert "5 spans went to" in daemon.log() and "0 were dropped" in daemon.log()
    trace_ids = [line.get("trace_id") for line in lines_of(daemon) if line.get("event") == "request"]
    # Lines may overtake each other: they are written after the call.
    assert sorted(map(str, trace_ids)) == sorted(map(str, [TRACE_ID, TRACE_ID, None, None, None, TRACE_ID]))


def test_a_share_of_the_other_calls_is_traced(start, collectors):
    collector = collectors()
    daemon = start("--trace-otlp-endpoint", collector.endpoint, "--trace-sample-ratio", "1")
    daemon.stub.Generate(daemon.request([2, 100], 3, request_id="r"), timeout=PATIENCE_S)
    roots = [span for span in collector.wait(4) if not span.parent_span_id]
    assert [span.name for span in roots] == [f"text_completion {MODEL.name}"]
    assert line_of(daemon, "r")["trace_id"] == roots[0].trace_id.hex()


def seconds_for(daemon, count):
    """Processor-bound requests, one after another."""
    begin = time.monotonic()
    for _ in range(count):
        assert len(traced(daemon, daemon.request([2, 100], 30))) >= 1
    return time.monotonic() - begin


@pytest.mark.parametrize("kind", ["hanging", "dead"])
def test_a_collector_that_does_not_answer_costs_spans_and_nothing_else(start, api, tmp_path_factory, collectors, kind):
    if kind == "hanging":
        collector = collectors(hang=True)
        endpoint = collector.endpoint
    else:
        with socket.socket() as taken:  # bound, and nobody listens
            taken.bind(("127.0.0.1", 0))
            endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
    plain = Daemon(api, tmp_path_factory.mktemp("plain"))
    daemon = start("--trace-otlp-endpoint", endpoint, "--trace-max-queue", "16")
    seconds_for(daemon, 1)
    if kind == "hanging":
        assert collector.calls.acquire(timeout=PATIENCE_S)  # from here on the exporter is stuck in a call
    # In turns, for the machine has other things to do. One wait for the collector would be five seconds.
    rounds = [(seconds_for(plain, 10), seconds_for(daemon, 10)) for _ in range(6)]
    plain.stop()
    assert min(with_it for _, with_it in rounds) < 1.5 * min(without for without, _ in rounds) + 0.1, rounds
    daemon.stop()
    assert daemon.process.returncode == 0
    said = re.search(r"traces: (\d+) spans went to \S+, (\d+) were dropped", daemon.log())
    assert said and (int(said[1]), int(said[2])) == (0, 4 * 61)
    warnings = [line for line in lines_of(daemon) if line["level"] == "warning" and "took no spans" in line["message"]]
    assert warnings


def test_the_collectors_messages_are_the_public_ones():
    """Our subset has the public names' numbers and types."""
    from google.protobuf import descriptor_pb2, descriptor_pool
    from grpc_tools import protoc
    import tempfile
    with tempfile.NamedTemporaryFile() as out:
        assert protoc.main(["protoc", f"-I{ROOT / 'proto'}", f"--descriptor_set_out={out.name}",
                            "opentelemetry/trace_service.proto"]) == 0
        files = descriptor_pb2.FileDescriptorSet.FromString(out.read())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    package = "opentelemetry.proto.collector.trace.v1"

    def compare(ours, public, seen):
        if ours.full_name in seen:
            return
        seen.add(ours.full_name)
        for field in ours.fields:
            same = public.fields_by_name[field.name]
            assert (field.number, field.type, field.is_repeated) == (same.number, same.type, same.is_repeated), field.full_name
            if field.message_type:
                compare(field.message_type, same.message_type, seen)
            if field.enum_type:
                assert {v.name: v.number for v in field.enum_type.values}.items() <= {
                    v.name: v.number for v in same.enum_type.values}.items()

    seen = set()
    for name in ("ExportTraceServiceRequest", "ExportTraceServiceResponse"):
        compare(pool.FindMessageTypeByName(f"{package}.{name}"),
                getattr(trace_service_pb2, name).DESCRIPTOR, seen)
    assert len(seen) == len(files.file[0].message_type)
