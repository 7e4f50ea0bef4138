"""What is decided in docs/api/compatibility.md and docs/api.md, as clients meet it: where a text ends, what fits, what is compressed,
and that log and metrics say the code that the client was given."""
import collections
import gzip
import time
import zlib

import grpc
import pytest

import groups
import http2
from conftest import PATIENCE_S, Daemon, until
from groups import SERVICE
from hardening import resident_mib
from log_lines import lines_of, poll
from wire import part

Code = grpc.StatusCode
CODES = {code.value[0]: code.name for code in Code}
CONTEXT = 512
MOST_BYTES = 32 << 10
MOST_WINDOW = 65535  # that a client may send of a stream before it is asked for more
MIB = 1 << 20
ENHANCE_YOUR_CALM = 11

GENERATION = ["Generate", "GenerateStream", "Score", "Tokenize", "Detokenize", "GetModelInfo", "GetServerInfo", "Abort"]
ADMIN = ["GetEngineState", "SetDefaultTier", "ReloadPredictor", "DumpTrace", "Profile", "AbortRequest", "Drain"]
METHODS = [*(SERVICE + name for name in GENERATION), "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch",
           "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
           "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"]


def refusal(call):
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value.code(), error.value.details()


# --- where a text ends


def test_no_stop_string_ends_a_text_before_min_new_tokens(daemon, api):
    request = api.pb.GenerateRequest(text="It was a dark night, and")
    request.stopping.max_new_tokens = 24
    request.stopping.ignore_eos = True
    whole = [chunk for chunk in daemon.stub.GenerateStream(request, timeout=PATIENCE_S)]
    text = "".join(chunk.text for chunk in whole)
    request.stopping.stop_strings.append(text[6:9])
    early = daemon.stub.Generate(request, timeout=PATIENCE_S)
    assert early.finish.stop_string == text[6:9] and early.text == text[:text.index(text[6:9])]
    first = early.finish.generated_tokens
    assert 1 <= first < 24
    for method in (daemon.stub.Generate, lambda *a, **k: merged(daemon.stub.GenerateStream(*a, **k))):
        # With the token that ends the string it may end; one more is wanted, and that end is text.
        request.stopping.min_new_tokens = first - 1
        assert method(request, timeout=PATIENCE_S).finish.generated_tokens == first
        request.stopping.min_new_tokens = first
        later = method(request, timeout=PATIENCE_S)
        assert later.finish.generated_tokens > first and later.text.startswith(early.text + text[6:9])
        request.stopping.min_new_tokens = 24
        last = method(request, timeout=PATIENCE_S)
        assert (last.text, last.finish.generated_tokens, last.finish.reason) == (text, 24, api.pb.FINISH_REASON_LENGTH)


class merged:
    def __init__(self, chunks):
        self.text = ""
        for chunk in chunks:
            self.text += chunk.text
            if chunk.HasField("finish"):
                self.finish = chunk.finish


# --- what fits


def test_the_context_may_be_full_and_the_last_token_takes_no_place(daemon, api):
    ids = [2] + [5 + i % 700 for i in range(CONTEXT)]
    stub, ask = daemon.stub, daemon.request
    full = stub.Generate(ask(ids[:CONTEXT], 1), timeout=PATIENCE_S)
    assert full.finish.generated_tokens == 1
    assert [t for c in stub.GenerateStream(ask(ids[:CONTEXT], 1), timeout=PATIENCE_S) for t in c.token_ids] == list(full.token_ids)
    score = api.pb.ScoreRequest(top_logprobs=1)
    score.token_ids.ids.extend(ids[:CONTEXT])
    assert stub.Score(score, timeout=PATIENCE_S).tokens[-1].top[0].id == full.token_ids[0]
    # The default is what is left: one.
    left = ask(ids[:CONTEXT], 1)
    left.stopping.ClearField("max_new_tokens")
    assert stub.Generate(left, timeout=PATIENCE_S).prompt.max_new_tokens == 1
    longest = ask([2], CONTEXT)
    longest.stopping.max_time_s = 0.2
    assert stub.Generate(longest, timeout=PATIENCE_S).prompt.max_new_tokens == CONTEXT

    for call, words in (
            (lambda: stub.Generate(ask(ids[:CONTEXT], 2), timeout=PATIENCE_S),
             "stopping.max_new_tokens is 2 after a prompt of 512 tokens; the model's context of 512 leaves 1"),
            (lambda: list(stub.GenerateStream(ask([2, 5, 7], CONTEXT - 1), timeout=PATIENCE_S)),
             "stopping.max_new_tokens is 511 after a prompt of 3 tokens; the model's context of 512 leaves 510"),
            (lambda: stub.Generate(ask(ids, 1), timeout=PATIENCE_S), "token_ids has 513 tokens; the model allows 512")):
        assert refusal(call) == (Code.INVALID_ARGUMENT, words)
    score.token_ids.ids.append(5)
    assert refusal(lambda: stub.Score(score, timeout=PATIENCE_S)) == (
        Code.INVALID_ARGUMENT, "token_ids has 513 tokens; the model allows 512")


# --- compression


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_requests_are_read(daemon, api, compression):
    text = "It was the best of times, it was the worst of times. " * 20
    ask = dict(timeout=PATIENCE_S, compression=compression)
    request = api.pb.GenerateRequest(text=text)
    request.stopping.max_new_tokens = 8
    plain = daemon.stub.Generate(request, timeout=PATIENCE_S)
    assert daemon.stub.Generate(request, **ask).text == plain.text
    assert merged(daemon.stub.GenerateStream(request, **ask)).text == plain.text
    tokens = daemon.stub.Tokenize(api.pb.TokenizeRequest(text=text), **ask).token_ids
    assert list(tokens) == list(daemon.stub.Tokenize(api.pb.TokenizeRequest(text=text), timeout=PATIENCE_S).token_ids)
    detokenize = api.pb.DetokenizeRequest(token_ids=list(tokens) * 4)
    assert daemon.stub.Detokenize(detokenize, **ask).text == text * 4
    assert len(daemon.stub.Score(api.pb.ScoreRequest(text=text), **ask).tokens) == len(tokens)
    assert not daemon.stub.Abort(api.pb.AbortRequest(request_id="a" * 120), **ask).found


def wrapped(kind, content):
    """As a message in that encoding: gzip, deflate."""
    return gzip.compress(content, mtime=0) if kind == "gzip" else zlib.compress(content)


def compressed_call(peer, path, encoding, content, end=True):
    """A call with one message, which is flagged as compressed. Its stream."""
    stream = peer.next_stream()
    message = http2.grpc_message(content, compressed=1)
    pieces = [message[at:at + 16384] for at in range(0, len(message), 16384)]
    peer.send(http2.headers(stream, http2.grpc_headers(path, [("grpc-encoding", encoding)] if encoding else [])),
              *(http2.data(stream, piece, end and piece is pieces[-1]) for piece in pieces))
    return stream


def test_what_compressed_requests_become_is_bounded(start, api):
    """Bombs of a thousand to one, by frames and by a client that knows no better: no more than what is taken is ever made of each."""
    daemon = start("--transport-gateways", "127.0.0.1")
    daemon.stub.Generate(daemon.request([2, 5], 4), timeout=PATIENCE_S)
    before = resident_mib(daemon.pid())
    with http2.Connection(daemon.address) as peer:
        for encoding, size in (("gzip", 48), ("deflate", 48), ("gzip", 5)):
            bomb = wrapped(encoding, part(2, "a" * (size * MIB)))
            assert len(bomb) < 60_000 < MOST_WINDOW
            refused = peer.outcome(compressed_call(peer, SERVICE + "Tokenize", encoding, bomb))
            assert CODES[refused.code] == "RESOURCE_EXHAUSTED", refused
            assert "transport.max_message_bytes" in refused.header("grpc-message")
        # What is just within the limit is read: Tokenize finds its reply too large.
        fits = peer.outcome(compressed_call(peer, SERVICE + "Tokenize", "gzip", wrapped("gzip", part(2, "a" * (4 * MIB - 6)))))
        assert CODES[fits.code] == "INVALID_ARGUMENT" and "split the request" in fits.header("grpc-message")
    large = api.pb.TokenizeRequest(text="a" * (48 * MIB))
    calls = [daemon.stub.Tokenize.future(large, timeout=PATIENCE_S, compression=grpc.Compression.Gzip) for _ in range(4)]
    assert [call.code() for call in calls] == [Code.RESOURCE_EXHAUSTED] * 4
    assert resident_mib(daemon.pid(), "VmHWM") < before + 160
    daemon.expect_idle()


# --- the code that the client was given


class Books:
    """Log and metrics of one daemon. Each `expect` is of calls that have ended for their client since the last one."""

    def __init__(self, daemon):
        self.daemon = daemon
        until(lambda: self._counted()["Watch", "CANCELLED"])  # with which the daemon was awaited
        self.counted, self.lines = self._counted(), self._lines()

    def _counted(self):
        found = collections.Counter()
        for labels, value in groups.samples_of(self.daemon, "dejavu_requests_total").items():
            labels = dict(labels)
            found[labels["method"], labels["code"]] += int(value)
        return found

    def _lines(self):
        return collections.Counter((line["method"], line["code"]) for line in lines_of(self.daemon) if line.get("event") == "request")

    def expect(self, path, *codes):
        method, n = path.rsplit("/", 1)[-1], len(codes)
        wanted = collections.Counter((method, code) for code in codes)
        until(lambda: sum(self._counted().values()) >= sum(self.counted.values()) + n)
        until(lambda: sum(self._lines().values()) >= sum(self.lines.values()) + n)
        counted, lines = self._counted(), self._lines()
        assert counted - self.counted == wanted
        assert lines - self.lines == wanted
        self.counted, self.lines = counted, lines


@pytest.fixture(scope="module")
def booked(api, tmp_path_factory):
    """Every call has its line, and limits are small. Its steps take 10 ms."""
    folder = tmp_path_factory.mktemp("booked")
    daemon = Daemon(api, folder, "--transport-max-message-bytes", str(MOST_BYTES), "--log-refused-per-s", "0", "--log-level", "debug",
                    "--log-engine-every-s", "0", "--transport-gateways", "127.0.0.1", "--transport-request-timeout-s", "0.5",
                    "--transport-stall-timeout-s", "0.5", "--scheduler-fault", "slow@10", "--scheduler-deadline-slack", "0",
                    "--admin-listen", "127.0.0.1:0", "--admin-port-file", folder / "admin_port")
    daemon.admin_address = f"127.0.0.1:{int((folder / 'admin_port').read_text())}"
    until(lambda: "method=Watch" in daemon.log())
    yield daemon
    daemon.expect_idle()
    daemon.stop()
    assert daemon.process.returncode == 0, daemon.log()


def expect_codes(books, address, paths):
    """What no method reads: too large, plainly or once it is decompressed; damaged; no protobuf."""
    noise, zeros = b"\xff" * 100, b"\0" * (MOST_BYTES * 8)
    large = [("gzip", wrapped("gzip", zeros)), ("deflate", wrapped("deflate", zeros))]
    broken = [("gzip", noise), ("gzip", wrapped("gzip", noise)[:-4]), ("gzip", wrapped("gzip", b"") + b"more"),
              ("gzip", wrapped("deflate", noise)), ("br", noise), (None, noise)]
    for path in paths:
        codes = []
        with http2.Connection(address) as peer:
            def call(code, stream):
                assert CODES[peer.outcome(stream).code] == code, (path, peer.stream(stream))
                codes.append(code)

            call("RESOURCE_EXHAUSTED", peer.call(path, b"x" * (MOST_BYTES + 1)))
            for encoding, content in large:
                call("RESOURCE_EXHAUSTED", compressed_call(peer, path, encoding, content))
            for encoding, content in broken:
                call("INVALID_ARGUMENT", compressed_call(peer, path, encoding, content))
            call("INVALID_ARGUMENT", peer.call(path, noise))
        books.expect(path, *codes)


def test_what_cannot_be_read_is_in_the_books_as_the_client_heard_it(booked):
    expect_codes(Books(booked), booked.address, METHODS)


def test_nor_does_an_operators_port_read_it(booked):
    expect_codes(Books(booked), booked.admin_address, ["/dejavu.v1.AdminService/" + name for name in ADMIN])


def test_what_the_transport_ends_is_in_the_books_as_the_client_heard_it(booked):
    books, path = Books(booked), SERVICE + "GenerateStream"
    request = booked.request([2, 5], 480).SerializeToString()
    with http2.Connection(booked.address) as peer:
        for stream, code in (
                (lambda: peer.call(path, request, timeout="0n"), "DEADLINE_EXCEEDED"),
                (lambda: peer.call(path, request, timeout="200m"), "DEADLINE_EXCEEDED"),  # no client ends it first
                (lambda: peer.call(path, request, metadata=[("x-large", "x" * 15000)] * 2), "RESOURCE_EXHAUSTED"),
                (lambda: peer.call(path, end=False), "DEADLINE_EXCEEDED"),  # transport.request_timeout_s
                (lambda: peer.call(path), "INVALID_ARGUMENT")):  # half-closed without a message
            assert CODES[peer.outcome(stream()).code] == code
            books.expect(path, code)
    # A client that takes nothing, of a stream or of one reply.
    with http2.Connection(booked.address, settings_sent={http2.INITIAL_WINDOW: 0}) as peer:
        for name, message in ((path, request), (SERVICE + "Tokenize", part(2, "It was"))):
            ended = peer.outcome(peer.call(name, message))
            assert ended.code in (8, None)  # gRPC may reset the stream instead
            books.expect(name, "RESOURCE_EXHAUSTED")
    # A client that gives up, with its message sent or not.
    with http2.Connection(booked.address) as peer:
        for name, message, end in ((path, None, False), (path, request, True), ("/grpc.health.v1.Health/Watch", b"", True),
                                   ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", part(7, ""), False)):
            stream = peer.call(name, message, end=end)
            peer.until(lambda: message is None or peer.stream(stream).data)
            peer.send(http2.reset(stream))
            books.expect(name, "CANCELLED")


def test_a_connection_that_the_server_closes_leaves_its_calls_unavailable(start):
    daemon = start("--log-refused-per-s", "0", "--scheduler-fault", "slow@10")
    books = Books(daemon)
    with http2.Connection(daemon.address, source="127.0.0.2") as peer:
        stream = peer.call(SERVICE + "GenerateStream", daemon.request([2, 5], 480).SerializeToString())
        peer.until(lambda: peer.stream(stream).data)
        end = time.monotonic() + PATIENCE_S
        while peer.pour(http2.settings_changes(20_000), end):
            assert time.monotonic() < end
    books.expect("GenerateStream", "UNAVAILABLE")
    closed = groups.samples_of(daemon, "dejavu_connections_closed_total")
    assert sum(value for labels, value in closed.items() if ("reason", "unexplained_bytes") in labels) == 1


def test_a_call_that_waits_for_its_message_hears_of_the_servers_end(start):
    daemon = start("--log-level", "debug", "--log-refused-per-s", "0", "--transport-request-timeout-s", "0")
    reflection = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
    with http2.Connection(daemon.address) as peer:
        waiting = [peer.call(SERVICE + "Generate", end=False), peer.call(SERVICE + "Abort", end=False),
                   peer.call(reflection, part(7, ""), end=False)]
        peer.until(lambda: peer.stream(waiting[2]).data)
        daemon.terminate()
        assert [CODES[peer.outcome(stream).code] for stream in waiting] == ["UNAVAILABLE"] * 3
    assert daemon.wait() == 0
    lines = [(line["method"], line["code"]) for line in lines_of(daemon) if line.get("event") == "request"]
    wanted = [(method, "UNAVAILABLE") for method in ("Generate", "Abort", "ServerReflectionInfo")]
    assert sorted(line for line in lines if line[0] not in ("Watch", "Check")) == sorted(wanted)


def test_a_client_that_pings_too_often_is_told_why(booked):
    """More than one in ten seconds without anything between them, three times."""
    with http2.Connection(booked.address) as peer:
        peer.send(http2.pings(8))
        assert peer.is_closed() or peer.goaway
    assert peer.goaway == (ENHANCE_YOUR_CALM, b"too_many_pings")


# --- counts


def test_received_and_refused_count_every_request_that_was_read(start, api):
    daemon = start()
    stub, ask = daemon.stub, daemon.request
    account = lambda: stub.GetServerInfo(api.pb.GetServerInfoRequest(), timeout=PATIENCE_S).admission  # noqa: E731
    assert account().received == 0
    bad = ask([2], 1)
    bad.sampling.temperature = -1
    two = ask([2], 1)
    two.sampling.samples, two.sampling.temperature = 2, 1
    three = ask([2], 1, model="another")
    stub.Generate(two, timeout=PATIENCE_S)
    for call in (lambda: stub.Generate(bad, timeout=PATIENCE_S), lambda: list(stub.GenerateStream(bad, timeout=PATIENCE_S)),
                 lambda: stub.Generate(three, timeout=PATIENCE_S), lambda: stub.Score(api.pb.ScoreRequest(), timeout=PATIENCE_S),
                 lambda: daemon.channel.unary_unary(SERVICE + "Score")(b"\xff", timeout=PATIENCE_S)):
        refusal(call)
    until(lambda: account().live == 0)
    a = account()
    assert (a.received, a.finished, dict(a.refused)["INVALID"], sum(a.refused.values())) == (7, 2, 5, 5)
    counted = groups.samples_of(daemon, "dejavu_requests_rejected_total")
    assert sum(value for labels, value in counted.items() if ("reason", "invalid") in labels) == 5


# --- who calls


def forwarded(daemon, *values, source="127.0.0.1"):
    """The peer in the log of a call with these headers."""
    before = len(lines_of(daemon))
    with http2.Connection(daemon.address, source=source) as peer:
        assert peer.outcome(peer.call(SERVICE + "GetModelInfo", b"", [("x-forwarded-for", value) for value in values])).code == 0
        local = f"ipv4:{source}:{peer.socket.getsockname()[1]}"
        line = poll(lambda: [l for l in lines_of(daemon)[before:] if l.get("method") == "GetModelInfo"], daemon.log)[0]
    return "itself" if line["peer"] == local else line["peer"]


def test_a_gateway_says_who_calls_and_nobody_else_does(start):
    daemon = start("--transport-gateways", "127.0.0.1")
    for values, seen in {
            ("203.0.113.7",): "ipv4:203.0.113.7", ("2001:db8::7",): "ipv6:%5B2001:db8::7%5D",
            ("::ffff:203.0.113.7",): "ipv4:203.0.113.7", ("10.0.0.1, 203.0.113.7",): "ipv4:203.0.113.7",
            ("10.0.0.1,10.0.0.2 ,\t203.0.113.7 ",): "ipv4:203.0.113.7", ("10.0.0.1", "203.0.113.7"): "ipv4:203.0.113.7",
            ("2001:DB8:0:0::7",): "ipv6:%5B2001:db8::7%5D"}.items():
        assert forwarded(daemon, *values) == seen, values
    for value in ("", "unknown", "203.0.113.7,", "203.0.113.7:4711", "[2001:db8::7]", "203.0.113.7 10.0.0.1", "203.0.113.256", "1",
                  "_hidden", "a" * 5000, "fe80::1%eth0", "203.0.113.7\n", "203.0.113.7\x1b[2J"):
        assert forwarded(daemon, value) in ("itself", "ipv4:203.0.113.7"), value  # white space around it is no matter
    assert forwarded(daemon) == "itself"
    # From elsewhere it is a header like any other.
    assert forwarded(daemon, "203.0.113.7", source="127.0.0.2") == "itself"
