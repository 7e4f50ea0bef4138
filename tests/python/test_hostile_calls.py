"""Bad input around requests, groups 8 to 10: frames and headers, protobuf's encoding, and the small methods. KServe's protocol is not
spoken here (yet): group 10 is malformed input of our own other methods instead."""
import contextlib
import random
import ssl

import grpc
import pytest

import groups
import hpack
import http2
from certificates import Authority
from conftest import PATIENCE_S, Daemon
from groups import PROMPT, SERVICE, Case
from test_hostile_requests import IDS, INVALID, ONE_TOKEN, generate
from wire import fixed64, group, packed, part, real, tag, uint, varint

# What may come of a frame: an answer of gRPC's (its code), the end of the stream (RESET) or of the connection (CLOSED), or nothing at
# all, the connection going on (IGNORED).
RESET, CLOSED, IGNORED = "reset", "closed", "ignored"
NAMES = {code.value[0]: code.name for code in grpc.StatusCode}
PATH = SERVICE + "Generate"
GOOD = generate()


@pytest.fixture(scope="module")
def gateway(api, tmp_path_factory):
    """A daemon that takes 127.0.0.1 for a proxy: nobody is banned for what a frame did."""
    daemon = Daemon(api, tmp_path_factory.mktemp("gateway"), "--transport-gateways", "127.0.0.1", "--transport-request-timeout-s", "2")
    yield daemon
    daemon.stop()
    assert daemon.process.returncode == 0, daemon.log()


def outcome(peer, stream, wanted):
    """In one word. A stream that neither ends nor breaks its connection is IGNORED, where that is wanted: a PING that is
    sent after the frames has been answered, and nothing has come for a while."""
    state = peer.stream(stream)
    try:
        if wanted == IGNORED:
            peer.send(http2.ping())
            peer.until(lambda: state.ended or peer.pongs > 0)
            with contextlib.suppress(http2.Closed):
                peer.until(lambda: state.ended, 0.2)
            if not state.ended and not peer.closed:
                return IGNORED
        peer.until(lambda: state.ended)
    except http2.Closed:
        return CLOSED if peer.closed else "hangs"
    return NAMES[state.code] if state.code is not None else f"http {state.header(':status')}" if state.headers else RESET


def call(method=None, message=GOOD, **fields):
    """A call's frames, whose headers are grpc_headers(path, **fields)."""
    block = hpack.encode(http2.grpc_headers(PATH if method is None else method, **fields))
    return http2.headers(1, block, end_stream=message is None) + (b"" if message is None else http2.data(1, http2.grpc_message(message), True))


def run_frames(gateway, number, table, at_least):
    """outcome: {name: frames}. Each on a connection of its own; one that goes on must be good for another call."""
    watched, wrong = groups.Watched(gateway), []
    cases = [(wanted, name, frames) for wanted, named in table.items() for name, frames in named.items()]
    for wanted, name, frames in cases:
        with http2.Connection(gateway.address, patience_s=20) as peer:
            peer.next_stream()
            try:
                peer.send(frames)
                got = outcome(peer, 1, wanted)
                if got == IGNORED and (code := peer.outcome(peer.call(PATH, GOOD)).code) != 0:
                    got = f"ignored, and a call after it {code}"
            except http2.Closed:
                got = CLOSED
            if got != wanted:
                wrong.append(f"{name}: {got}, not {wanted}")
    print(f"group {number}: {len(cases)} inputs of frames")
    assert not wrong, "\n".join(wrong)
    assert len(cases) >= at_least
    watched.expect_sound()


def bare(*headers, message=GOOD):
    """Only these headers."""
    return http2.headers(1, list(headers)) + http2.data(1, http2.grpc_message(message), True)


def without(name):
    return bare(*(pair for pair in http2.grpc_headers(PATH) if pair[0] != name))


def with_(*pairs):
    return call(metadata=list(pairs))


def replaced(name, value):
    return bare(*((name, value) if pair[0] == name else pair for pair in http2.grpc_headers(PATH)))


def test_group_8_headers(gateway):
    digits = lambda version, trace, span, flags: f"{version}-{trace * 32}-{span * 16}-{flags}"  # noqa: E731
    table = {
        # Units are H, M, S, m, u and n, after at most eight digits. gRPC takes what it cannot read for no deadline.
        "DEADLINE_EXCEEDED": {f"timeout {text!r}": call(timeout=text) for text in ("0n", "0S", "0H", "00000000u")},
        "OK": {
            **{f"timeout {text!r}": call(timeout=text) for text in (
                "1H", "99999999H", "99999999M", "99999999S", "60000000u", "30S", "60000m", " 60S", "-1S", "1x", "S", "1.5S", "999999999999S",
                "1 S x", "0x10S", "\u0661S")},
            # All that gRPC does not mind, and that means nothing to us.
            **{f"content type {text[:30]!r}": call(content_type=text) for text in (
                "text/plain", "application/json", "application/grpc-web", "", "application/grpc+json", "x" * 5000)},
            "no content type": without("content-type"),
            **{f"encoding {text[:30]}": with_(("grpc-encoding", text)) for text in ("identity", "gzip", "deflate", "br", "x" * 1000)},
            **{f"traceparent {text[:30]!r}": with_(("traceparent", text)) for text in (
                "", "00", "00-0-0-0", digits("ff", "1", "1", "01"), digits("00", "0", "1", "01"), digits("00", "G", "1", "01"),
                digits("00", "1", "0", "01"), digits("00", "1", "1", "01-x"), "x" * 4000, digits("00", "1", "1", "01").replace("-", "_"))},
            "traceparent twice": with_(*[("traceparent", digits("00", "1", "1", "01"))] * 2),
            **{f"a value with {code:#04x}": with_(("x-odd", f"a{chr(code)}b")) for code in (0x0a, 0x0d, 0x00, 0x07, 0x7f, 0x1b)},
            **{f"the name {name!r}": with_((name, "v")) for name in (
                "X-Upper", "x y", "x\n", "", "connection", "transfer-encoding", "content-length", "grpc-status", "grpc-message", "host",
                "user-agent")},
            "an unknown pseudo-header": with_((":x", "y")), "three hundred small ones": with_(*((f"x-{i}", "") for i in range(300))),
        },
        "UNIMPLEMENTED": {
            **{f"path {path[:60]!r}": call(path) for path in (
                "/", "//", "/x", SERVICE, SERVICE + "generate", SERVICE + "Generate/", SERVICE + "Generate?x=1",
                "/dejavu.v1.AdminService/Drain", SERVICE + "../Generate", SERVICE + "%47enerate", "/a/b/c", "/" + "p" * 8000, "*",
                "http://localhost" + PATH, SERVICE + "\u202e", "/grpc.health.v1.Health/", "/grpc.health.v1.Health/List2", "no slash")},
            "an empty path": replaced(":path", ""), "two paths": with_((":path", "/x")),
        },
        "UNKNOWN": {"no path": without(":path"), "GET": replaced(":method", "GET"), "no method": without(":method"),
                    "no authority": without(":authority"), "no te": without("te"), "te: gzip": replaced("te", "gzip"),
                    "scheme odd": call(scheme="gopher")},
        INVALID: {
            **{f"x-tenant {text[:30]!r}": with_(("x-tenant", text)) for text in (
                "a b", "a/b", "x" * 129, "\u202e", "a:b", "a=b", "\x1b[2J", "a\tb", "a\r\nb", "a\0")},
            "x-tenant twice": with_(("x-tenant", "a"), ("x-tenant", "b")), "the same twice": with_(("x-tenant", "a"), ("x-tenant", "a"))},
    }
    run_frames(gateway, 8, table, at_least=95)
    # What is logged stays within its line.
    assert all(line.startswith("20") for line in gateway.log().splitlines() if line), gateway.log()


# Each ends a header block that is else in order.
BLOCKS = {
    "OK": {"a table update at the end": b"\x20", "Huffman's end": b"\0\x84\xff\xff\xff\xff\x01a", "Huffman of much padding": b"\0\x82\x1f\xff\x01a",
           "a name that is empty": b"\0\0\0", "never indexed": b"\x10\x01a\x01b"},
    # gRPC's word for a stream that it gave up.
    "UNAVAILABLE": {
        "index 0": b"\x80", "index 9999": b"\xff\x90\x4d", "a table of a gigabyte": b"\x3f\xe1\xff\xff\xff\x03",
        "a string beyond the block": b"\0\x05ab", "a length of 2^62": b"\0\x7f" + b"\xff" * 8 + b"\x3f", "an integer of ten bytes": b"\xff" + b"\x80" * 10,
        "Huffman alone": b"\0\x81", "a name by an index that there is not": b"\x7f\x80\x01\x01a", "cut off": b"\x40",
        "an entry cut off": b"\x40\x01a\x7f\x81\x2f" + b"v" * 6000},
}


def test_group_8_frames(gateway):
    block, message, frame = hpack.encode(http2.grpc_headers(PATH)), http2.grpc_message(GOOD), http2.frame
    half, body = http2.headers(1, block), http2.data(1, message, True)
    split = lambda pieces: http2.headers(1, pieces[0], end_headers=False) + b"".join(  # noqa: E731
        http2.continuation(1, piece, i == len(pieces) - 2) for i, piece in enumerate(pieces[1:])) + body
    table = {
        "OK": {
            "headers in bytes": split([block[i:i + 1] for i in range(len(block))]), "continuations of nothing": split([block] + [b""] * 10),
            "data in bytes": half + b"".join(http2.data(1, message[i:i + 1], i == len(message) - 1) for i in range(len(message))),
            "empty data": half + http2.data(1, b"") * 20 + body, "two messages": half + http2.data(1, message * 2, True),
            "bytes after the message": half + http2.data(1, message + b"\0", True),
            "a flag of compression and no encoding": half + http2.data(1, http2.grpc_message(GOOD, compressed=1), True),
            "trailers": half + http2.data(1, message) + http2.headers(1, [("x-trailer", "t")], True),
            "data after the end": call() + http2.data(1, b"x"), "unknown frames": frame(0x42, 0xff, 1, b"anything") * 10 + call(),
            "unknown settings": http2.settings({0x99: 7, 0xffff: 0}) + call(), "priority": frame(http2.PRIORITY, 0, 1, b"\0\0\0\0\x10") + call(),
            "goaway from the client": call() + http2.goaway(0), "goaway first": http2.goaway(0) + call(), "pings": http2.pings(2) + call(),
            "data on stream 0": http2.data(0, b"x") + call(), "data on an idle stream": http2.data(7, b"x") + call(),
            "a reset of stream 0": http2.reset(0) + call(),
        },
        INVALID: {
            "no message": http2.headers(1, block, end_stream=True), "no message, later": half + http2.data(1, b"", True),
            "a message of no bytes": half + http2.data(1, http2.grpc_message(b""), True),
            "cut off in the prefix": half + http2.data(1, message[:3], True), "cut off in the message": half + http2.data(1, message[:-1], True),
            "a flag that there is not": half + http2.data(1, http2.grpc_message(GOOD, compressed=7), True),
            "a message of 2^32 - 1": half + http2.data(1, http2.grpc_message(GOOD, length=(1 << 32) - 1), True),
            "a message of 2^31": half + http2.data(1, http2.grpc_message(GOOD, length=1 << 31), True),
        },
        "CANCELLED": {"reset before the message": half + http2.reset(1), "reset after the message": call() + http2.reset(1),
                      "reset twice": half + http2.reset(1) * 2, "reset with an unknown error": half + http2.reset(1, 0xffffffff)},
        RESET: {"padded data": half + frame(http2.DATA, 0x8 | 1, 1, b"\x05" + message + b"\0" * 5),  # gRPC 1.51 knows no padding
                "data that is only padding": half + frame(http2.DATA, 0x8, 1, b"\xff" + b"\0" * 20)},
        "UNAVAILABLE": {
            "headers twice": half + http2.headers(1, block), "a window of 0 more": half + http2.window_update(1, 0),
            "a reset of 3": half + frame(http2.RST_STREAM, 0, 1, b"123"), "headers too large for a frame": frame(http2.HEADERS, 4, 1, b"\0" * 20000),
            "a frame between continuations": http2.headers(1, block, end_headers=False) + http2.ping() + http2.continuation(1, b"", True),
            "a continuation of another stream": http2.headers(1, block, end_headers=False) + http2.continuation(3, b"", True),
            "padding longer than the frame": frame(http2.HEADERS, 0x8 | 4, 1, b"\xff" + block[:20]),
        },
        IGNORED: {
            "headers on stream 0": http2.headers(0, block), "an even stream": http2.headers(2, block),
            "a window beyond 2^31": half + http2.window_update(1, http2.WIDE) * 2, "the connection's window beyond 2^31": http2.window_update(0, http2.WIDE) * 3,
            "a ping on a stream": frame(http2.PING, 0, 1, b"12345678"), "a push promise": frame(http2.PUSH_PROMISE, 4, 1, b"\0\0\0\2" + block),
        },
        CLOSED: {
            "settings of 5 bytes": frame(http2.SETTINGS, 0, 0, b"12345"), "settings on a stream": frame(http2.SETTINGS, 0, 1),
            "an answer to settings with bytes": frame(http2.SETTINGS, http2.ACK, 0, b"123456"),
            "a window of 2^31": http2.settings({http2.INITIAL_WINDOW: 1 << 31}), "frames of 0": http2.settings({http2.MAX_FRAME: 0}),
            "push of 2": http2.settings({http2.ENABLE_PUSH: 2}) + call(), "a ping of 7": frame(http2.PING, 0, 0, b"1234567"),
            "a goaway of 4": frame(http2.GOAWAY, 0, 0, b"1234"), "a window update of 3": frame(http2.WINDOW_UPDATE, 0, 0, b"123"),
            "a frame of 2^24 - 1": b"\xff\xff\xff" + bytes([http2.DATA, 0, 0, 0, 0, 1]) + b"x" * 100,
            "a continuation alone": http2.continuation(1, block, True),
        },
    }
    for wanted, tails in BLOCKS.items():
        table[wanted].update({f"header block: {name}": http2.headers(1, block + tail) + body for name, tail in tails.items()})
    run_frames(gateway, 8, table, at_least=65)


def test_group_8_other_protocols(gateway, start, api, tmp_path):
    """Bytes of anything else on the plain port and on one of TLS: closed, and no answer that a browser could take for one."""
    authority = Authority(tmp_path, "ours")
    for name, content in zip(("cert", "key"), authority.issue()):
        (tmp_path / name).write_bytes(content)
    good = lambda address: grpc.secure_channel(address, grpc.ssl_channel_credentials(authority.pem))  # noqa: E731
    tls = start("--tls-cert", tmp_path / "cert", "--tls-key", tmp_path / "key", "--transport-gateways", "127.0.0.1", connect=good)
    noise = random.Random(7)
    hello = ssl.MemoryBIO()
    shaking = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), hello, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        shaking.do_handshake()
    client_hello = hello.read()
    inputs = [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"POST / HTTP/1.0\r\nContent-Length: 99999999999\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\n",
              b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nGET", b"SSH-2.0-x\r\n", b"\0" * 1000, b"\xff" * 1000, b"\n", b"\x05\x01\0", b"*1\r\n$4\r\nPING\r\n",
              client_hello, client_hello[:50], client_hello[:-1] + b"x", client_hello[:5] + b"\xff" * 200, b"\x16\x03\x01\xff\xff" + b"x" * 100,
              b"\x15\x03\x03\0\x02\x02\x28", b"\x80\x2e\x01\0\x02", *(noise.randbytes(noise.randint(1, 3000)) for _ in range(15))]
    watched = groups.Watched(gateway)
    for daemon in (gateway, tls):
        for content in inputs:
            if daemon is tls and content.startswith(client_hello):
                continue  # is what it wants
            got, _ = http2.exchange(daemon.address, content, patience_s=0.2)
            assert not got.startswith(b"HTTP/1.1 200"), content
    # TLS's own: another protocol by ALPN, none, and a plain client; a handshake that stops half-way.
    for protocols in ([], ["http/1.1"], ["h3", "x"]):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if protocols:
            context.set_alpn_protocols(protocols)
        try:
            got, _ = http2.exchange(tls.address, http2.PREFACE + http2.settings() + call(), patience_s=1, tls=context)
            assert b"grpc-status" not in got
        except (ssl.SSLError, OSError):
            pass
    print(f"group 8: {2 * len(inputs) + 2} inputs of other protocols")
    assert len(tls.stub.Generate(tls.request(PROMPT, 2), timeout=PATIENCE_S).token_ids) == 2
    tls.expect_idle()
    watched.expect_sound()


def test_group_8_readers_and_cancels(gateway):
    """Windows that are hardly opened, readers that are slow, calls that are left at any moment."""
    watched, request = groups.Watched(gateway), generate(stopping=part(7, uint(1, 40)))
    with http2.Connection(gateway.address, settings_sent={http2.INITIAL_WINDOW: 1}, credit=False) as peer:
        stream = peer.call(SERVICE + "GenerateStream", request)
        for _ in range(30):
            peer.until(lambda: True)
            peer.send(http2.window_update(stream, 1))
        peer.send(http2.window_update(stream, 1 << 20))
        assert peer.outcome(stream).code == 0
        assert len(peer.stream(stream).messages) > 0
    noise = random.Random(3)
    for n in range(60):  # cancelled, or its connection cut, at any moment
        peer = http2.Connection(gateway.address)
        stream = peer.call(SERVICE + noise.choice(("GenerateStream", "Generate", "Score")), request if n % 3 else IDS)
        for _ in range(noise.randint(0, 6)):
            if not peer.stream(stream).ended:
                peer.read()
        if n % 2 and not peer.stream(stream).ended:
            peer.send(http2.reset(stream))
            assert peer.answers()
        peer.close(abruptly=bool(n % 4 == 0))
    # Of a compressed bomb no more is unfolded than is taken.
    import gzip
    bomb = gzip.compress(b"\0" * (64 << 20))
    before = groups.resident_mib(gateway.pid())
    with http2.Connection(gateway.address) as peer:
        block = http2.grpc_headers(PATH, [("grpc-encoding", "gzip")])
        content = http2.grpc_message(bomb, compressed=1)
        peer.send(http2.headers(1, block), *(http2.data(1, content[at:at + 16384]) for at in range(0, len(content), 16384)))
        peer.next_stream()
        assert peer.outcome(1).code == 8
    assert groups.resident_mib(gateway.pid(), "VmHWM") < before + 200
    print("group 8: 62 inputs of readers and cancels")
    watched.expect_sound()


def test_a_message_beyond_the_limit_is_refused_alone(start):
    """Of a few bytes more: the connection goes on, and so do the streams on it."""
    daemon = start()
    watched = groups.Watched(daemon)
    case = Case("", "Tokenize", part(2, "a" * (4 << 20)), "RESOURCE_EXHAUSTED")
    for _ in range(3):
        assert groups.send(daemon, case)[0] == case.code
        assert groups.send(daemon, Case("", "Tokenize", part(2, "a"), "OK"))[0] == "OK"
    watched.expect_sound({"RESOURCE_EXHAUSTED": 3, "OK": 3})


def test_a_message_of_twice_the_limit_is_refused_alone(start):
    """Of more than that the connection may be closed while they come."""
    daemon = start()
    for _ in range(3):
        assert groups.send(daemon, Case("", "Generate", part(4, packed(1, [5] * 8_400_000)), ""))[0] == "RESOURCE_EXHAUSTED"
        assert groups.send(daemon, Case("", "Tokenize", part(2, "a"), "OK"))[0] == "OK"


def test_group_9_encodings(daemon, api):
    """Whether it is well-formed, Python's protobuf says; what must come of it follows."""
    whole = (generate(part(1, "id"), part(5, real(1, 0.5) + uint(2, 40) + real(3, 0.9) + uint(5, 7)), part(6, part(4, uint(1, 9) + real(2, 1.0))),
                      part(9, uint(1, 2)), part(10, uint(1, 2) + part(5, "salt"))))

    def code_of(message):
        request = api.pb.GenerateRequest()
        try:
            request.ParseFromString(message)
        except Exception:  # whatever it raises, it is not well-formed
            return INVALID
        return "OK" if request.WhichOneof("prompt") and request.token_ids.ids else INVALID

    inputs = {f"cut after {n} bytes": whole[:n] for n in range(len(whole) + 1)}
    noise = random.Random(5)
    for n in range(60):  # a bit turned: what it is then, nobody knows beforehand, but it is no crash
        at = noise.randrange(len(whole))
        inputs[f"bit {n}"] = whole[:at] + bytes([whole[at] ^ 1 << noise.randrange(8)]) + whole[at + 1:]
    known = {
        "unknown fields of all types": (GOOD + uint(900, 5) + fixed64(901, 5) + part(902, "x") + group(903, uint(1, 1)) + real(904, 1.0), "OK"),
        "unknown in all parts": (GOOD + b"".join(part(n, uint(900, 1)) for n in range(5, 11)), "OK"),
        "a thousand unknown": (GOOD + b"".join(uint(1000 + n, n) for n in range(1000)), "OK"),
        "the largest number of a field": (GOOD + uint((1 << 29) - 1, 1), "OK"),
        "field 0": (GOOD + b"\x00\x01", INVALID), "wire type 6": (GOOD + b"\x0e", INVALID), "wire type 7": (GOOD + b"\x0f", INVALID),
        "an end of no group": (GOOD + tag(900, 4), INVALID), "a group without an end": (GOOD + tag(900, 3), INVALID),
        "a group ended by another": (GOOD + tag(900, 3) + tag(901, 4), INVALID),
        "groups 50 deep": (GOOD + tag(900, 3) * 50 + tag(900, 4) * 50, "OK"),
        "groups 1000 deep": (GOOD + tag(900, 3) * 1000 + tag(900, 4) * 1000, INVALID),
        "a million groups": (GOOD + tag(900, 3) * 1_000_000, INVALID),
        "messages in messages, 100,000 deep": (GOOD + part(4, b"\x22" * 100_000), INVALID),
        "a prompt of the wrong type": (uint(4, 5) + ONE_TOKEN, INVALID), "ids of the wrong type": (part(4, real(1, 1.0)) + ONE_TOKEN, INVALID),
        "a sampling of the wrong type": (GOOD + fixed64(5, 1), "OK"), "a temperature of the wrong type": (GOOD + part(5, uint(1, 7)), "OK"),
        "packed where there is one": (GOOD + part(7, packed(1, [1, 2])), "OK"), "packed and not": (part(4, uint(1, 2) + packed(1, [5]) + uint(1, 7)) + ONE_TOKEN, "OK"),
        "the last of two": (GOOD + part(7, uint(1, 0)) + part(7, uint(1, 1)), "OK"), "the last of two is bad": (GOOD + part(7, uint(1, 0)), INVALID),
        "a hundred thousand samplings": (GOOD + part(5, real(1, 0.0)) * 100_000, "OK"), "the same key twice": (GOOD + part(6, part(4, uint(1, 9) + real(2, 1.0)) * 2), "OK"),
        "a key twice, the last bad": (GOOD + part(6, part(4, uint(1, 9) + real(2, 1.0)) + part(4, uint(1, 9) + real(2, 1000.0))), INVALID),
        "a length of 2^31": (GOOD + tag(1, 2) + varint(1 << 31), INVALID), "a length of 2^32 - 1": (GOOD + tag(1, 2) + varint((1 << 32) - 1), INVALID),
        "a length of 2^63": (GOOD + tag(1, 2) + varint(1 << 63), INVALID), "a length of -1": (GOOD + tag(1, 2) + varint(-1), INVALID),
        "a packed length beyond": (part(4, tag(1, 2) + varint(1 << 28) + b"\x02") + ONE_TOKEN, INVALID),
        "a tag of ten bytes": (GOOD + b"\xff" * 9 + b"\x01", INVALID), "a tag of eleven bytes": (GOOD + b"\xff" * 10 + b"\x01", INVALID),
        "a number of eleven bytes": (GOOD + tag(900, 0) + b"\x80" * 10 + b"\x01", INVALID), "nothing but 0xff": (b"\xff" * 1000, INVALID),
        "nothing but 0": (b"\0" * 1000, INVALID), "zeros after it": (GOOD + b"\0", INVALID), "padded numbers": (part(4, tag(1, 2) + b"\x03\x82\x80\x00") + ONE_TOKEN, "OK"),
        "text of another protocol": (b'{"prompt": "It was"}', INVALID), "nothing": (b"", INVALID),
    }
    cases = [Case(name, "Generate", message, code_of(message)) for name, message in inputs.items() if not name.startswith("bit")]
    cases += [Case(name, method, message, code) for name, (message, code) in known.items() for method in ("Generate", "GenerateStream")]
    groups.run(daemon, 9, cases, at_least=130)
    # Each of those with a turned bit has an answer that is about the request, and none is our fault.
    watched, seen = groups.Watched(daemon), {}
    for name, message in inputs.items():
        if name.startswith("bit"):
            code, words = groups.send(daemon, Case(name, "Generate", message, ""))
            seen[code] = seen.get(code, 0) + 1
            assert code in ("OK", INVALID, "NOT_FOUND", "FAILED_PRECONDITION") and (code != "OK" or code_of(message) == "OK"), (name, code, words)
    watched.expect_sound(seen)


def test_group_10_streams_of_large_requests(daemon):
    """Each goes through the pool, whose thread may still be at one when the client has its reply, sends the next, or ends."""
    large = part(4, "x" * 20_000)  # an unknown symbol
    rounds, streams = 40, 8
    watched = groups.Watched(daemon)
    with grpc.insecure_channel(daemon.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        for _ in range(rounds):
            for replies in [call(iter([large] * 3), timeout=PATIENCE_S) for _ in range(streams)]:
                assert len(list(replies)) == 3
    watched.expect_sound({"OK": rounds * streams})


def test_group_10_the_other_methods(daemon):
    """Unknown methods of every protocol, and those that we have get nonsense. What is malformed in other protocols' own ways is in
    test_kserve.py and test_vllm.py."""
    oip, vllm = "/inference.GRPCInferenceService/", "/vllm.grpc.engine.VllmEngine/"
    others = [oip + name for name in ("ServerLive", "ServerReady", "ModelReady", "ModelInfer", "ModelMetadata", "ServerMetadata", "RepositoryIndex",
                                      "RepositoryModelLoad", "SystemSharedMemoryRegister", "CudaSharedMemoryRegister", "TraceSetting")]
    others += [vllm + name for name in ("Generate", "Abort", "GetModelInfo", "GetLoads", "GetTokenizer")]
    unknown = [oip + "ModelDelete", vllm + "Embed", vllm + "SubscribeKvEvents", "/inference.GRPCInferenceServiceV3/ModelInfer"]
    unknown += ["/fmaas.GenerationService/Generate", "/dejavu.v1.AdminService/GetEngineState",
                "/dejavu.v1.AdminService/Drain", "/dejavu.v2.GenerationService/Generate", "/grpc.channelz.v1.Channelz/GetServers"]
    cases = [Case(path, path, content, "UNIMPLEMENTED") for path in unknown for content in (b"", b"\xff" * 50)]
    health, reflection = "/grpc.health.v1.Health/Check", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    nonsense = {"0xff": b"\xff" * 20, "a length beyond": b"\x0a\x7f", "broken text": part(1, b"\xc3"), "a group without an end": tag(9, 3)}
    cases += [Case(f"{path} {name}", path, content, INVALID) for path in others for name, content in nonsense.items() if name != "broken text"]
    for method in ("Generate", "GenerateStream", "Score", "Tokenize", "Detokenize", "GetModelInfo", "Abort", health):
        for name, content in nonsense.items():
            # Field 1 of DetokenizeRequest and its like is `model`, of the others `request_id`: text everywhere.
            cases.append(Case(f"{method} {name}", method, content, INVALID))
    cases += [Case(f"GetServerInfo {name}", "GetServerInfo", content, INVALID) for name, content in nonsense.items() if name != "broken text"]
    cases += [Case(f"{method} of another model", method, part(field, "another") + rest, "NOT_FOUND", "another") for method, field, rest in (
        ("Generate", 2, GOOD), ("GenerateStream", 2, GOOD), ("Score", 2, IDS), ("Tokenize", 1, part(2, "a")), ("Detokenize", 1, b""), ("GetModelInfo", 1, b""))]
    cases += [Case(f"health of {name[:20]!r}", health, part(1, name), "NOT_FOUND") for name in ("x", "/", "dejavu.v1", "a" * 100_000, "\0")]
    cases += [Case(f"health of {name!r}", health, part(1, name), "OK") for name in ("", "liveness", "dejavu.v1.GenerationService")]
    cases += [Case(f"reflection {name}", reflection, content, code) for name, content, code in (
        ("of nothing", b"", "OK"), ("of an unknown symbol", part(4, "no.such"), "OK"), ("of an unknown file", part(3, "../../etc/passwd"), "OK"),
        ("of a long name", part(4, "x" * 1_000_000), "OK"), ("of an extension", part(5, part(1, "a") + uint(2, -1)), "OK"),
        ("of nonsense", b"\xff", INVALID), ("of broken text", part(4, b"\xc3"), INVALID), ("of all at once", part(3, "a") + part(4, "b") + part(7, "c"), "OK"))]
    groups.run(daemon, 10, cases, at_least=90)
