"""The SMG gateway of PyPI in front of one daemon and of two, and OpenAI's client in front of the gateway. Run by ./run protocols."""
import asyncio
import contextlib
import http.client
import json
import os
import pathlib
import queue
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import grpc
import openai
import pytest
import yaml
from google.protobuf import descriptor_pool
from smg_grpc_proto.generated import vllm_engine_pb2, vllm_engine_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

import every_protocol
import groups
import published
from certificates import Authority
from conftest import PATIENCE_S, ROOT, Daemon, until
from every_protocol import BRAKED, WORDS, long_request, mixed, text_request
from pod_list import PodList, pod
from speakers import Answer, Call, Ended, Relay, Speaker, grpc_speakers, parameters

PROMPT = "It was a dark night, and"
# The gateway leaves out what the tokenizer puts before a prompt, and takes a special token that is written for one.
WHOLE = "</s>" + PROMPT


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Gateway:
    """Serves when it has been made. Without daemons it is what `arguments` make of it; {port} and {health} stand for its ports there."""

    def __init__(self, folder, *daemons, policy="round_robin", arguments=None, environment=None, scheme="http", **client):
        self.port, self.health_port, self.log_path = free_port(), free_port(), folder / "gateway.log"
        self.address = f"127.0.0.1:{self.port}"
        if arguments is None:
            arguments = ["--host", "127.0.0.1", "--port", "{port}", "--prometheus-port", str(free_port()), "--health-check-port", "{health}",
                         "--policy", policy, "--health-check-interval-secs", "1", "--health-failure-threshold", "1",
                         "--worker-urls", *(f"grpc://{daemon.address}" for daemon in daemons)]
        arguments = [each.replace("{port}", str(self.port)).replace("{health}", str(self.health_port)) for each in arguments]
        self.process = subprocess.Popen([pathlib.Path(sys.executable).parent / "smg", "launch", *arguments], stdout=open(self.log_path, "wb"),
                                        stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **(environment or {})})
        self.url = f"{scheme}://{self.address}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", timeout=PATIENCE_S, max_retries=0, **{"api_key": "none", **client})
        deadline = time.monotonic() + PATIENCE_S
        while not self._serves():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def _serves(self):
        with contextlib.suppress(OSError, openai.OpenAIError):
            with urllib.request.urlopen(f"http://127.0.0.1:{self.health_port}/readiness", timeout=1):
                pass
            self.client.completions.create(model=self.client.models.list().data[0].id, prompt="a", max_tokens=1)
            return True
        return False

    def log(self):
        return self.log_path.read_text(errors="replace")[-4000:]

    def cut(self):
        os.killpg(self.process.pid, signal.SIGKILL)

    def stop(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(timeout=30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def gateway(daemon, tmp_path_factory):
    gateway = Gateway(tmp_path_factory.mktemp("gateway"), daemon)
    yield gateway
    gateway.stop()


@pytest.fixture(scope="module")
def braked_gateway(braked, tmp_path_factory):
    gateway = Gateway(tmp_path_factory.mktemp("braked_gateway"), braked)
    yield gateway
    gateway.stop()


@pytest.fixture(scope="module")
def loop():
    """Runs in a thread, so that a call can be left at any moment."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


@pytest.fixture
def openai_speakers(loop):
    """OpenAI's client before an address, as speakers by name."""
    def to(address, model="opt-8m-books"):
        client = openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0)

        async def ask(request, stream, timeout, heard):
            fields = parameters(request)
            fields["top_k"] = fields["top_k"] or -1
            extra = {name: fields.pop(name) for name in ("top_k", "ignore_eos", "stop_token_ids", "repetition_penalty")}
            try:
                async with asyncio.timeout(timeout):
                    reply = await client.completions.create(model=model, prompt="</s>" + request.text, stream=stream, extra_body=extra,
                                                            timeout=timeout, **fields)
                    if not stream:
                        heard.put(Answer(None, reply.choices[0].text, reply.usage.completion_tokens))
                        return heard.put(None)
                    async for chunk in reply:
                        heard.put(Answer(None, chunk.choices[0].text, None))
                    heard.put(None)
            except asyncio.CancelledError:
                heard.put(Ended("CANCELLED", "by the client"))
            except (TimeoutError, openai.APITimeoutError) as error:
                heard.put(Ended("DEADLINE_EXCEEDED", str(error)))
            except openai.OpenAIError as error:
                heard.put(Ended(getattr(error, "status_code", type(error).__name__), str(error)))

        def pieces(heard):
            while (piece := heard.get(timeout=PATIENCE_S)) is not None:
                if isinstance(piece, Ended):
                    raise piece
                yield piece

        def speaker(stream):
            def begin(request, timeout):
                heard = queue.Queue()
                return Call(pieces(heard), asyncio.run_coroutine_threadsafe(ask(request, stream, timeout, heard), loop).cancel)

            return Speaker(begin, stream, unavailable=503)

        return {"openai": speaker(False), "openai stream": speaker(True)}

    return to


@pytest.fixture
def everybody(api, openai_speakers):
    """The speakers of a daemon and a gateway before it; the messages and stubs of gRPC are the published ones."""
    with contextlib.ExitStack() as channels:
        def to(daemon, gateway):
            channel = channels.enter_context(grpc.insecure_channel(daemon.address, options=every_protocol.SOON))
            published_ones = (service_pb2, service_pb2_grpc), (vllm_engine_pb2, vllm_engine_pb2_grpc)
            return {**grpc_speakers(channel, api, *published_ones), **openai_speakers(gateway.address)}

        yield to


@pytest.fixture
def model(daemon):
    return daemon.stub.GetModelInfo(daemon.api.pb.GetModelInfoRequest()).model


def ours(daemon, tokens=20, **sampling):
    request = daemon.api.pb.GenerateRequest(text=PROMPT)
    request.stopping.max_new_tokens = tokens
    for name, value in sampling.items():
        setattr(request.sampling, name, value)
    return daemon.stub.Generate(request, timeout=PATIENCE_S)


def test_our_messages_are_the_published_ones(tmp_path):
    from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2  # noqa: F401: into the pool
    for file in ("smg/common.proto", "vllm/engine.proto"):
        assert published.differences(published.ours(file, tmp_path), descriptor_pool.Default()) == []


def test_the_model_is_listed(gateway, model):
    assert [each.id for each in gateway.client.models.list().data] == [model]


def test_a_completion_is_the_daemons_text(daemon, gateway, model):
    reply = gateway.client.completions.create(model=model, prompt=WHOLE, max_tokens=20, temperature=0)
    expected = ours(daemon)
    assert reply.choices[0].text == expected.text
    assert reply.usage.completion_tokens == len(expected.token_ids) and reply.usage.prompt_tokens == expected.prompt.prompt_tokens


def test_a_streamed_completion(daemon, gateway, model):
    stream = gateway.client.completions.create(model=model, prompt=WHOLE, max_tokens=30, temperature=0, stream=True)
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == ours(daemon, 30).text and len(chunks) > 2


def test_seeds_and_samples(daemon, gateway, model):
    reply = gateway.client.completions.create(model=model, prompt=WHOLE, max_tokens=12, temperature=1, seed=5, n=3)
    expected = ours(daemon, 12, temperature=1, seed=5, samples=3)
    assert [c.text for c in sorted(reply.choices, key=lambda c: c.index)] == [s.text for s in (expected, *expected.more_samples)]


def test_stop_strings(daemon, gateway, model):
    free = ours(daemon, 40).text
    stop = free[len(free) // 2:][:6]
    reply = gateway.client.completions.create(model=model, prompt=WHOLE, max_tokens=40, temperature=0, stop=stop)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == (free[:free.index(stop)], "stop")


def test_what_the_daemon_refuses_the_client_hears_by_name(gateway, model):
    with pytest.raises(openai.APIStatusError, match="max_tokens is 9999"):
        gateway.client.completions.create(model=model, prompt=WHOLE, max_tokens=9999)


OPENAI = ("openai", "openai stream")


@pytest.mark.parametrize("name", OPENAI)
def test_a_client_that_cancels_frees_everything(braked, braked_gateway, openai_speakers, name):
    every_protocol.a_cancel_frees_everything(braked, openai_speakers(braked_gateway.address)[name])


@pytest.mark.parametrize("name", OPENAI)
def test_a_client_whose_deadline_passes_frees_everything(braked, braked_gateway, openai_speakers, name):
    every_protocol.a_deadline_frees_everything(braked, openai_speakers(braked_gateway.address)[name])


@pytest.mark.parametrize("name", OPENAI)
def test_a_client_that_is_gone_leaves_nothing_behind(braked, braked_gateway, openai_speakers, name):
    relay = Relay(braked_gateway.address)
    every_protocol.a_client_that_is_gone_leaves_nothing(braked, openai_speakers(relay.address)[name], relay)


def malformed():
    """Bodies, the status of each, and a word of its error. The gateway refuses some by itself, the daemon the rest, by the same names."""
    base = {"model": "opt-8m-books", "prompt": WHOLE, "max_tokens": 5, "temperature": 0}
    bad_values = {
        "temperature": [-1, 3, "hot", [1]], "top_p": [0, 1.5, -1, "x"], "top_k": [-2, 0, 1.5, "x"], "min_p": [-1, 2],
        "max_tokens": [0, -1, 9999, 1.5, 1 << 40, "x"], "n": [0, -1, 17, 200, "x"], "stop": [1, [1], "", ["a"] * 9, ["x" * 300]],
        "seed": [-2, 1.5, "x"], "presence_penalty": [-3, 101, "x"], "frequency_penalty": [3, "x"], "repetition_penalty": [-1, 101],
        "logprobs": [-1, 101, "x"], "logit_bias": [1], "min_tokens": [17], "stop_token_ids": [[8192], [-1], "x"], "ignore_eos": ["x"],
        "json_schema": ["{}"], "regex": [".*"], "stream": ["x"], "prompt": [1, None, {}, [], [[1]]]}
    for name, values in bad_values.items():
        for value in values:
            yield {**base, name: value}, 400, name
    yield {**base, "prompt": ""}, 400, "input_ids is empty"
    yield {**base, "prompt": "</s>" + "a " * 600}, 400, "maximum context length is 512"
    yield {**base, "ebnf": "x"}, 400, "grammar is not served here"
    yield {**base, "model": "other"}, 404, "other"
    yield {}, 400, "model"
    for body in (b"", b"{", b"[]", b"null", b"\xff\xfe"):
        yield body, 400, "JSON"


def test_malformed_requests_have_errors_of_openai(daemon, gateway):
    watched, wrong, cases = groups.Watched(daemon), [], list(malformed())
    for body, status, words in cases:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{gateway.address}/v1/completions", content, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
                wrong.append((content[-80:], reply.status))
        except urllib.error.HTTPError as error:
            said = json.loads(error.read())["error"]
            if error.code != status or said["type"] != "invalid_request_error" or words not in said["message"]:
                wrong.append((content[-80:], error.code, said))
    assert wrong == [] and len(cases) >= 60
    watched.expect_sound()


def test_a_gateway_that_is_gone_leaves_nothing_behind(braked, openai_speakers, tmp_path):
    gateway = Gateway(tmp_path, braked)
    try:
        every_protocol.a_client_that_is_gone_leaves_nothing(braked, openai_speakers(gateway.address)["openai stream"], gateway)
    finally:
        gateway.stop()


def test_two_hundred_requests_have_the_same_tokens_in_every_protocol(daemon, gateway, everybody):
    every_protocol.same_answers(daemon, everybody(daemon, gateway), [mixed(daemon.api, i) for i in range(200)])


def test_a_drain_loses_nothing_in_any_protocol(daemon, start, everybody, gateway, tmp_path):
    calm = everybody(daemon, gateway)
    expected = [calm["dejavu"].ask(long_request(daemon.api, i)) for i in range(len(calm))]
    draining = start(*BRAKED)
    before_it = Gateway(tmp_path, draining)
    try:
        every_protocol.a_drain_loses_nothing(draining, everybody(draining, before_it), expected)
    finally:
        before_it.stop()


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGKILL))
def test_a_restart_loses_nothing_in_any_protocol(daemon, start, everybody, gateway, tmp_path, number):
    expected = everybody(daemon, gateway)["dejavu"].ask(text_request(daemon.api, WORDS[0], 60))
    first = start("--scheduler-fault", "slow@5")
    before_it = Gateway(tmp_path, first)
    try:
        every_protocol.restarts_lose_nothing(everybody(first, before_it), first, lambda: start(listen=first.address), number, expected)
    finally:
        before_it.stop()


def test_prefixes_stay_where_they_are_cached(api, tmp_path):
    """The gateway's own picture of what each daemon holds is enough: SubscribeKvEvents, which would tell it, is refused."""
    daemons = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        daemons.append(Daemon(api, tmp_path / name))
    gateway = Gateway(tmp_path, *daemons, policy="cache_aware")
    try:
        model = gateway.client.models.list().data[0].id
        for prefix in (WORDS, WORDS[::-1], WORDS[5:] + WORDS[:5]):
            before, cached = [every_protocol.account(daemon).finished for daemon in daemons], []
            for last in WORDS[:6]:
                prompt = "</s>" + " ".join(prefix * 3 + [last])
                reply = gateway.client.completions.create(model=model, prompt=prompt, max_tokens=4, temperature=0)
                cached.append(reply.usage.prompt_tokens_details.cached_tokens)
            after = [every_protocol.account(daemon).finished - b for daemon, b in zip(daemons, before)]
            assert sorted(after) == [0, 6] and all(cached[1:]), (after, cached)
    finally:
        gateway.stop()
        for daemon in daemons:
            daemon.stop()


CLIENTS = 20


@contextlib.contextmanager
def loaded_gateway(api, folder, openai_speakers, names):
    """Two daemons behind a gateway that CLIENTS ask all the time: the daemons, and how many answers there were. All of them must be right."""
    daemons = []
    for name in ("one", "two"):
        (folder / name).mkdir()
        daemons.append(Daemon(api, folder / name, "--scheduler-fault", "slow@5", "--scheduler-deadline-slack", "0", "--drain-linger-ms", "3000"))
    gateway = Gateway(folder, *daemons)
    try:
        request, speakers = text_request(api, PROMPT, 20), openai_speakers(gateway.address)
        expected, wrong, done, stop = daemons[0].stub.Generate(request, timeout=PATIENCE_S).text, [], [0] * CLIENTS, threading.Event()

        def load(i):
            speaker = speakers[names[i % len(names)]]
            while not stop.is_set():
                try:
                    text = speaker.ask(request).text
                    done[i] += 1
                    if text != expected:
                        wrong.append(text)
                except Ended as ended:
                    wrong.append(str(ended))

        threads = [threading.Thread(target=load, args=(i,)) for i in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            until(lambda: all(every_protocol.account(daemon).finished > CLIENTS for daemon in daemons))
            yield daemons, lambda: sum(done)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert wrong == []
    finally:
        gateway.stop()
        for daemon in daemons:
            daemon.stop()


def test_two_daemons_of_which_one_drains_under_load(api, tmp_path, openai_speakers):
    """Nothing is lost: what runs ends, streams too, and what comes then goes to the other one."""
    with loaded_gateway(api, tmp_path, openai_speakers, OPENAI) as (daemons, done):
        daemons[0].terminate()
        assert daemons[0].wait() == 0
        before = done()
        until(lambda: done() > before + 5 * CLIENTS)


def test_two_daemons_of_which_one_dies_under_load(api, tmp_path, openai_speakers):
    """What it had begun is asked of the other one: nothing of it had been sent."""
    with loaded_gateway(api, tmp_path, openai_speakers, ("openai",)) as (daemons, done):
        daemons[0].process.kill()
        before = done()
        until(lambda: done() > before + 5 * CLIENTS)


class TwoPods:
    """Two daemons on one port of two addresses, as pods have it."""

    def __init__(self, api, folder):
        self.daemons = []
        for name, host, port in (("one", "127.0.0.1", lambda: 0), ("two", "127.0.0.2", lambda: self.port)):
            (folder / name).mkdir()
            connect = lambda address, host=host: grpc.insecure_channel(address.replace("127.0.0.1", host))
            self.daemons.append(Daemon(api, folder / name, listen=f"{host}:{port()}", connect=connect))
        self.one, self.two = pod("one", "127.0.0.1"), pod("two", "127.0.0.2")

    @property
    def port(self):
        return int(self.daemons[0].address.split(":")[1])

    def finished(self):
        return [daemon.stub.GetServerInfo(daemon.api.pb.GetServerInfoRequest(), timeout=PATIENCE_S).admission.finished for daemon in self.daemons]


def overlay_arguments(folder, port, key):
    """Those of deploy/kubernetes/overlays/gateway, with ports and files of this machine."""
    deployment = yaml.safe_load((ROOT / "deploy/kubernetes/overlays/gateway/deployment.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    here = {"--host": "127.0.0.1", "--port": "{port}", "--health-check-port": "{health}", "--prometheus-port": str(free_port()),
            "--tls-cert-path": str(folder / "tls.crt"), "--tls-key-path": str(folder / "tls.key"), "--api-key": key,
            "--service-discovery-namespace": "default", "--service-discovery-port": str(port)}
    names = [each.split("=")[0] for each in container["args"]]
    assert here.keys() <= set(names)
    return [f"{name}={here[name]}" if name in here else each for name, each in zip(names, container["args"], strict=True)]


def test_the_overlays_gateway_finds_pods_and_asks_for_its_key_over_tls(api, tmp_path):
    authority, key = Authority(tmp_path, "authority"), "a key that nobody guesses"
    certificate, private = authority.issue()
    (tmp_path / "tls.crt").write_bytes(certificate)
    (tmp_path / "tls.key").write_bytes(private)
    with contextlib.ExitStack() as stack:
        two = TwoPods(api, tmp_path)
        for daemon in two.daemons:
            stack.callback(daemon.stop)
        listed = PodList(two.one, two.two, pod("starting", "127.0.0.3", ready=False))
        stack.callback(listed.close)
        trust = ssl.create_default_context(cadata=authority.pem.decode())
        gateway = Gateway(tmp_path, arguments=overlay_arguments(tmp_path, two.port, key), environment={"KUBECONFIG": str(listed.kubeconfig(tmp_path))},
                          scheme="https", api_key=key, http_client=openai.DefaultHttpxClient(verify=trust))
        stack.callback(gateway.stop)
        assert all(path.startswith("/api/v1/namespaces/default/pods?") for path in listed.asked)
        model = gateway.client.models.list().data[0].id
        complete = lambda client: client.completions.create(model=model, prompt=WHOLE, max_tokens=8, temperature=0).choices[0].text
        expected = ours(two.daemons[0], 8).text

        def both_have_answered():
            assert complete(gateway.client) == expected
            return min(two.finished()) > 3

        until(both_have_answered)
        with pytest.raises(openai.AuthenticationError):
            complete(gateway.client.with_options(api_key="another"))
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{gateway.url}/workers", context=trust, timeout=PATIENCE_S)
        with pytest.raises((OSError, http.client.HTTPException)) as plain:  # without TLS it understands nothing
            urllib.request.urlopen(f"http://127.0.0.1:{gateway.port}/v1/models", timeout=PATIENCE_S)
        assert not isinstance(plain.value, urllib.error.HTTPError)

        listed.set(two.one, pod("two", "127.0.0.2", ready=False))

        def the_first_answers_alone():
            before = two.finished()
            assert [complete(gateway.client) for _ in range(4)] == [expected] * 4
            return [now - then for now, then in zip(two.finished(), before)] == [4, 0]

        until(the_first_answers_alone)
        listed.set()
        health = lambda path: urllib.request.urlopen(f"http://127.0.0.1:{gateway.health_port}/{path}", timeout=PATIENCE_S).status

        def nobody_is_ready():
            try:
                return health("readiness") != 200
            except urllib.error.HTTPError as error:
                return error.code == 503

        until(nobody_is_ready)
        assert health("liveness") == 200


def test_what_the_gateway_cannot(gateway, model):
    """docs/operations/gateway.md says so; a version that can is worth another look."""
    reply = gateway.client.completions.create(model=model, prompt=WHOLE, max_tokens=2, temperature=0, logprobs=1)
    assert reply.choices[0].logprobs is None
    with pytest.raises(openai.APIStatusError):
        gateway.client.completions.create(model=model, prompt=[2, 10, 20], max_tokens=2)


def test_a_stream_whose_daemon_dies_ends_with_an_error(api, tmp_path):
    daemon = Daemon(api, tmp_path, "--scheduler-fault", "slow@5", "--scheduler-deadline-slack", "0")
    gateway = Gateway(tmp_path, daemon)
    try:
        model = gateway.client.models.list().data[0].id
        stream = iter(gateway.client.completions.create(model=model, prompt=WHOLE, max_tokens=400, temperature=0, stream=True))
        next(stream)
        daemon.process.kill()
        with pytest.raises(openai.APIError):
            for chunk in stream:
                assert not chunk.choices or chunk.choices[0].finish_reason is None
    finally:
        gateway.stop()
        daemon.stop()
