"""One request, given as our own API has it, in each protocol that the daemon speaks: sent, read, and left in the middle."""
import contextlib
import functools
import operator
import socket
import struct
import threading
import typing

import grpc

import open_inference as oip
import vllm_engine
from conftest import PATIENCE_S


class Ended(Exception):
    """A call that ended by an error: its code, or the status of HTTP, and what it said."""

    def __init__(self, code, words):
        super().__init__(f"{code}: {words}")
        self.code, self.words = code, words


class Answer(typing.NamedTuple):
    """What a protocol does not tell is None."""
    tokens: list
    text: str
    count: int

    def says(self, other):
        return all(a is None or b is None or a == b for a, b in zip(self, other))


class Call:
    """One that has begun. `pieces`: what comes, as answers; it raises Ended."""

    def __init__(self, pieces, cancel):
        self._pieces, self._seen, self.cancel = iter(pieces), [], cancel

    def has_begun(self):
        return any(piece.tokens or piece.text for piece in self._seen)

    def first(self):
        """Waits for a token."""
        while not self.has_begun():
            self._seen.append(next(self._pieces))

    def rest(self):
        """All of it, what first() has seen included."""
        for piece in self._pieces:
            self._seen.append(piece)
        parts = [None if None in values else values for values in zip(*self._seen)]
        return Answer(*(part and functools.reduce(operator.add, part) for part in parts))


class Speaker:
    """`begin`: (request, timeout in seconds) -> Call. `streams`: tokens come as they are made. `unavailable`: the code of what may be asked
    again. `path` and `encode`, of those that are gRPC: the method, and the request's bytes."""

    def __init__(self, begin, streams, unavailable="UNAVAILABLE", path=None, encode=None):
        self._begin, self.streams, self.unavailable, self.path, self.encode = begin, streams, unavailable, path, encode

    def begin(self, request, timeout=PATIENCE_S):
        return self._begin(request, timeout)

    def ask(self, request):
        return self.begin(request).rest()


def replies(call, streams, read):
    """Of a call of gRPC, as answers."""
    try:
        yield from (piece for reply in (call if streams else [call.result()]) for piece in read(reply))
    except grpc.FutureCancelledError:
        raise Ended("CANCELLED", "by the client") from None
    except grpc.RpcError as error:
        raise Ended(error.code().name, error.details()) from None


def parameters(request):
    """Under the names of vLLM, which are OpenAI's where that has them."""
    sampling, stopping, penalties = request.sampling, request.stopping, request.penalties
    return {"temperature": sampling.temperature, "top_p": sampling.top_p if sampling.HasField("top_p") else 1.0, "seed": sampling.seed,
            "max_tokens": stopping.max_new_tokens, "top_k": sampling.top_k, "ignore_eos": stopping.ignore_eos,
            "stop_token_ids": list(stopping.stop_token_ids),
            "repetition_penalty": penalties.repetition if penalties.HasField("repetition") else 1.0}


def prompt(request):
    return {"text": request.text} if request.HasField("text") else {"ids": list(request.token_ids.ids)}


def grpc_speakers(channel, api, kserve, vllm):
    """By name. `kserve`, `vllm`: modules of messages and of stubs, ours or published ones."""
    made = {}

    def add(name, service, method, encode, read, streams, requests_stream=False):
        stub = getattr(service, method)
        path = {"dejavu": "/dejavu.v1.GenerationService/", "kserve": f"/{oip.SERVICE}/", "vllm": f"/{vllm_engine.SERVICE}/"}[name.split()[0]] + method

        def begin(request, timeout):
            message = encode(request)
            if requests_stream:
                call = stub(iter([message]), timeout=timeout)
            else:
                call = stub(message, timeout=timeout) if streams or name == "vllm" else stub.future(message, timeout=timeout)
            return Call(replies(call, streams or name == "vllm", read), call.cancel)

        made[name] = Speaker(begin, streams, path=path, encode=lambda request: encode(request).SerializeToString())

    def ours(reply):
        yield Answer(list(reply.token_ids), reply.text, len(reply.token_ids))

    native = api.rpc.GenerationServiceStub(channel)
    add("dejavu", native, "Generate", lambda request: request, ours, False)
    add("dejavu stream", native, "GenerateStream", lambda request: request, ours, True)

    def tensors(reply):
        found = oip.tensors(reply)
        yield Answer(found["output_ids"], b"".join(found["text_output"]).decode(), len(found["output_ids"]))

    def streamed(reply):
        if reply.error_message:
            # The code is not told.
            gone = any(words in reply.error_message for words in ("shutting down", "server has stopped", "server stopped", "draining", "still loading"))
            raise Ended("UNAVAILABLE" if gone else "UNKNOWN", reply.error_message)
        yield from tensors(reply.infer_response)

    def infer(request, stream):
        return oip.infer(kserve[0], **prompt(request), exclude=True, stream=stream, outputs=["text_output", "output_ids"], **parameters(request))

    triton = kserve[1].GRPCInferenceServiceStub(channel)
    add("kserve", triton, "ModelInfer", lambda request: infer(request, False), tensors, False)
    add("kserve stream", triton, "ModelStreamInfer", lambda request: infer(request, True), streamed, True, requests_stream=True)

    def chunk(reply):
        if reply.HasField("chunk"):
            yield Answer(list(reply.chunk.token_ids), None, len(reply.chunk.token_ids))

    def complete(reply):
        yield Answer(list(reply.complete.output_ids), None, len(reply.complete.output_ids))

    def generate(request, stream):
        return vllm_engine.ask(vllm[0], **prompt(request), stream=stream, **parameters(request))

    engine = vllm[1].VllmEngineStub(channel)
    add("vllm", engine, "Generate", lambda request: generate(request, False), complete, False)
    add("vllm stream", engine, "Generate", lambda request: generate(request, True), chunk, True)
    return made


class Relay:
    """Stands before an address until it is cut: then every connection through it is gone, without a word of the protocol."""

    def __init__(self, address):
        host, port = address.rsplit(":", 1)
        self._target, self._sockets, self._lock = (host, int(port)), [], threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "127.0.0.1:%d" % self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                with self._lock:
                    self._sockets += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source, sink):
        with contextlib.suppress(OSError):
            while content := source.recv(1 << 16):
                sink.sendall(content)
            sink.shutdown(socket.SHUT_WR)

    def cut(self):
        self._listener.close()
        with self._lock:
            for each in self._sockets:
                with contextlib.suppress(OSError):  # it has ended by itself
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    each.shutdown(socket.SHUT_RDWR)
                each.close()
