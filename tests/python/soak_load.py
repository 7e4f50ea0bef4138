"""The load of a soak on one daemon, in a process of its own: soak.py starts it, with its orders as JSON in the first argument.

Well-behaved callers stream in all tiers, generate, score and tokenize; whatever they ask has been asked before anything else came, and
must be answered the same again. Others send bad input, cancel, do not read, and speak broken HTTP/2. Prints a JSON line every two
seconds, and the last one when its standard input has ended.
"""
import collections
import json
import os
import pathlib
import random
import ssl
import sys
import threading
import time

import grpc

import http2
from conftest import PATIENCE_S, generate_api

INTERVAL_S = 2
TOKENS = 24
Code = grpc.StatusCode
STREAM = "/dejavu.v1.GenerationService/GenerateStream"


def bad_requests(pb):
    """Each is INVALID_ARGUMENT, as bytes."""
    def made(change):
        request = pb.GenerateRequest(text="Once")
        change(request)
        return request

    nan, infinity = float("nan"), float("inf")
    changes = [lambda r: setattr(r.stopping, "max_new_tokens", 0), lambda r: setattr(r.stopping, "max_new_tokens", 2**32 - 1),
               lambda r: setattr(r.penalties, "repetition", 0), lambda r: setattr(r.scheduling, "priority", 101),
               lambda r: setattr(r.output, "top_logprobs", 2**31), lambda r: r.stopping.stop_strings.append(""),
               lambda r: r.stopping.stop_strings.extend(["x"] * 1000), lambda r: r.stopping.stop_token_ids.append(50272),
               lambda r: r.penalties.allowed_token_ids.append(2**32 - 1), lambda r: setattr(r.sampling, "samples", 1000),
               lambda r: r.token_ids.ids.extend([50265]), lambda r: r.token_ids.ids.extend([2] * 5000), lambda r: r.Clear()]
    for value in (nan, infinity, -infinity, -1.0, 1e38):
        changes += [lambda r, v=value: setattr(r.sampling, "temperature", v), lambda r, v=value: setattr(r.sampling, "top_p", v),
                    lambda r, v=value: r.penalties.logit_bias.update({5: 101 * v})]
    return [made(change).SerializeToString() for change in changes] + [b"\x0a\xff\xff", b"\xff" * 40, b"\x1a\x04\xc3\x28\x41\x41"]


class Load:
    def __init__(self, orders):
        self.orders, self.random = orders, random.Random(orders["seed"])
        self.api = generate_api(orders["stubs"])
        self.stop, self.lock = threading.Event(), threading.Lock()
        self.gaps, self.firsts, self.done, self.errors = [], [], collections.Counter(), collections.Counter()
        self.metadata = [("authorization", f"Bearer {orders['token']}")] if orders.get("token") else []
        self.tls = None
        if orders.get("ca"):
            self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            self.tls.load_verify_locations(orders["ca"])
            self.tls.load_cert_chain(orders["cert"], orders["key"])
            self.tls.set_alpn_protocols(["h2"])
        self.channel = self.open()
        self.stub = self.api.rpc.GenerationServiceStub(self.channel)

    def open(self):
        options = [("grpc.use_local_subchannel_pool", 1)]
        if self.tls is None:
            return grpc.insecure_channel(self.orders["address"], options)
        read = lambda name: pathlib.Path(self.orders[name]).read_bytes()
        return grpc.secure_channel(self.orders["address"], grpc.ssl_channel_credentials(read("ca"), read("key"), read("cert")), options)

    def count(self, what, by=1):
        with self.lock:
            self.done[what] += by

    def error(self, what):
        with self.lock:
            self.errors[what] += 1

    # --- well-behaved

    def request(self, tier, i):
        request = self.api.pb.GenerateRequest()
        request.token_ids.ids.extend([2, 100 + i, 7])
        request.stopping.max_new_tokens, request.stopping.ignore_eos = TOKENS, True
        request.sparsity.tier = tier
        request.sparsity.deterministic = tier > 2
        return request

    def calls(self):
        """Name to a function that makes the call and returns what must stay the same."""
        pb, stub, fields = self.api.pb, self.stub, dict(timeout=PATIENCE_S, metadata=self.metadata)
        score = pb.ScoreRequest(text="It was a dark night, and the wind blew.", top_logprobs=3)
        text = "An old man said: café, 12 times."
        ids = list(stub.Tokenize(pb.TokenizeRequest(text=text), **fields).token_ids)
        self.count("Tokenize")
        return {"Score": lambda: [token.id for token in stub.Score(score, **fields).tokens],
                "Tokenize": lambda: list(stub.Tokenize(pb.TokenizeRequest(text=text), **fields).token_ids),
                "Detokenize": lambda: stub.Detokenize(pb.DetokenizeRequest(token_ids=ids), **fields).text,
                "GetModelInfo": lambda: stub.GetModelInfo(pb.GetModelInfoRequest(), **fields).model,
                "Generate": lambda: list(stub.Generate(self.request(1, 0), **fields).token_ids)}

    def tokens(self, request, watched=True):
        ids, before, first = [], time.monotonic(), True
        for chunk in self.stub.GenerateStream(request, timeout=PATIENCE_S, metadata=self.metadata):
            now = time.monotonic()
            if chunk.token_ids and watched:
                with self.lock:
                    (self.firsts if first else self.gaps).append(1000 * (now - before))
                before, first = now, False
            ids.extend(chunk.token_ids)
        return ids

    def well_behaved(self, what, call, expected):
        try:
            if call() != expected:
                self.error(f"{what} is answered otherwise than at the start")
            self.count(what)
        except grpc.RpcError as error:
            self.error(f"{what} failed: {error.code().name}: {error.details()}"[:200])

    def streams(self, worker):
        for i in self.until_stopped(self.orders["pause_s"]):
            tier, prompt = (i + worker) % 5 + 1, (i + worker) % len(self.canaries)
            if tier <= 2:  # canaries: what is exact is always the same
                self.well_behaved("GenerateStream", lambda: self.tokens(self.request(tier, prompt)), self.canaries[prompt])
            else:
                self.well_behaved("GenerateStream", lambda: len(self.tokens(self.request(tier, prompt))), TOKENS)

    def unary(self):
        for i in self.until_stopped(self.orders["pause_s"]):
            name = list(self.expected)[i % len(self.expected)]
            self.well_behaved(name, self.calls_by_name[name], self.expected[name])

    # --- the others

    def cancels(self):
        for i in self.until_stopped(3 * self.orders["pause_s"]):
            request = self.request(i % 5 + 1, i % 50)
            request.stopping.max_new_tokens = 400
            stream = self.stub.GenerateStream(request, timeout=PATIENCE_S, metadata=self.metadata)
            try:
                for _ in range(i % 4):
                    next(stream)
            except (grpc.RpcError, StopIteration):
                pass
            stream.cancel()
            self.count("cancelled")

    def bad_input(self):
        bad = bad_requests(self.api.pb)
        with self.open() as channel:
            call = channel.unary_unary("/dejavu.v1.GenerationService/Generate")
            for i in self.until_stopped(self.orders["pause_s"]):
                try:
                    call(bad[i % len(bad)], timeout=PATIENCE_S, metadata=self.metadata)
                    self.error(f"bad request {i % len(bad)} is answered")
                except grpc.RpcError as error:
                    if error.code() != Code.INVALID_ARGUMENT:
                        self.error(f"bad request {i % len(bad)} ends as {error.code().name}: {error.details()}"[:200])
                self.count("bad requests")

    def raw(self, **fields):
        """A connection by frames, from an address of its own: limits per peer shall not meet the well-behaved."""
        return http2.Connection(self.orders["address"], self.tls, source="127.0.0.2", patience_s=10, **fields)

    def slow_readers(self):
        request = self.request(1, 3)
        request.stopping.max_new_tokens, request.output.top_logprobs = 200, 100
        for _ in self.until_stopped(10 * self.orders["pause_s"]):
            try:
                with self.raw(credit=False, connection_window=None) as peer:
                    stream = peer.call(STREAM, request.SerializeToString(), self.metadata)
                    peer.until(lambda: peer.stream(stream).data or peer.stream(stream).ended)
                    self.stop.wait(1)
            except (OSError, http2.Closed):
                pass
            self.count("slow readers")

    def broken(self):
        for i in self.until_stopped(5 * self.orders["pause_s"]):
            try:
                if i % 4 == 0:
                    with self.raw() as peer:
                        peer.send(http2.rapid_resets(1, 20, STREAM))
                        peer.answers()
                elif i % 4 == 1:
                    with self.raw() as peer:
                        peer.send(http2.open_calls(1, 5, STREAM))
                        peer.close(abruptly=True)
                elif i % 4 == 2:
                    with self.raw() as peer:
                        peer.send(http2.frame(self.random.randrange(12), self.random.randrange(256), self.random.randrange(4),
                                              self.random.randbytes(self.random.randrange(64))))
                        peer.is_closed(0.2)
                else:
                    http2.exchange(self.orders["address"], self.random.randbytes(200), patience_s=0.2)
            except (OSError, http2.Closed):
                pass
            self.count("broken connections")

    # ---

    def until_stopped(self, pause_s):
        i = 0
        while not self.stop.wait(pause_s * self.random.uniform(0.5, 1.5)):
            yield i
            i += 1

    def report(self):
        with self.lock:
            gaps, firsts = sorted(self.gaps), sorted(self.firsts)
            self.gaps, self.firsts = [], []
            line = dict(done=dict(self.done), errors=dict(self.errors))
        at = lambda values, share: values[min(len(values) - 1, int(share * len(values)))] if values else None
        line |= dict(p50_ms=at(gaps, 0.5), p99_ms=at(gaps, 0.99), ttft_p50_ms=at(firsts, 0.5), ttft_p99_ms=at(firsts, 0.99))
        print(json.dumps(line), flush=True)

    def run(self):
        self.canaries = [self.tokens(self.request(1, i), watched=False) for i in range(8)]
        self.count("GenerateStream", 8)
        self.calls_by_name = self.calls()
        self.expected = {name: call() for name, call in self.calls_by_name.items()}
        for name in self.expected:
            self.count(name)
        work = [(self.streams, i) for i in range(self.orders["streams"])]
        work += [(each,) for each in (self.unary, self.cancels, self.bad_input, self.slow_readers, self.broken)]
        threads = [threading.Thread(target=self.guarded, args=each) for each in work]
        for thread in threads:
            thread.start()
        threading.Thread(target=lambda: (sys.stdin.read(), self.stop.set()), daemon=True).start()
        while not self.stop.wait(INTERVAL_S):
            self.report()
        for thread in threads:
            thread.join()
        self.channel.close()
        self.report()

    def guarded(self, work, *args):
        try:
            work(*args)
        except Exception as error:  # a fault of the load's own must not look like a quiet soak
            self.error(f"the load itself failed in {work.__name__}: {error!r}")


if __name__ == "__main__":
    Load(json.loads(sys.argv[1])).run()
    os._exit(0)
