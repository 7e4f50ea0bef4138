"""The SMG gateway of PyPI in front of one daemon and of two, and OpenAI's client in front of the gateway. Run by ./run protocols."""
import concurrent.futures
import contextlib
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import openai
import pytest
from google.protobuf import descriptor_pool

import published
from conftest import PATIENCE_S, Daemon, until

PROMPT = "It was a dark night, and"
# The gateway leaves out what the tokenizer puts before a prompt, and takes a special token that is written for one.
WHOLE = "</s>" + PROMPT


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Gateway:
    def __init__(self, folder, *daemons, policy="round_robin"):
        self.port, self.log_path = free_port(), folder / "gateway.log"
        command = [pathlib.Path(sys.executable).parent / "smg", "launch", "--host", "127.0.0.1", "--port", str(self.port), "--prometheus-port",
                   str(free_port()), "--policy", policy, "--health-check-interval-secs", "1", "--health-failure-threshold", "1",
                   "--worker-urls", *(f"grpc://{daemon.address}" for daemon in daemons)]
        self.process = subprocess.Popen(command, stdout=open(self.log_path, "wb"), stderr=subprocess.STDOUT, start_new_session=True)
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", timeout=PATIENCE_S, max_retries=0)
        deadline = time.monotonic() + PATIENCE_S
        while not self._serves():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def _serves(self):
        with contextlib.suppress(OSError, openai.OpenAIError):
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readiness", timeout=1):
                pass
            self.client.completions.create(model=self.client.models.list().data[0].id, prompt="a", max_tokens=1)
            return True
        return False

    def log(self):
        return self.log_path.read_text(errors="replace")[-4000:]

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


def test_a_client_that_leaves_frees_its_blocks(daemon, gateway, model):
    with gateway.client.completions.create(model=model, prompt=WHOLE, max_tokens=400, temperature=0, stream=True) as stream:
        next(iter(stream))
    daemon.expect_idle()


@contextlib.contextmanager
def loaded_gateway(api, folder):
    """Two daemons behind a gateway that is asked all the time: the daemons, and how many answers there were. All of them must be right."""
    daemons = []
    for name in ("one", "two"):
        (folder / name).mkdir()
        daemons.append(Daemon(api, folder / name, "--scheduler-fault", "slow@5", "--scheduler-deadline-slack", "0", "--drain-linger-ms", "3000"))
    gateway = Gateway(folder, *daemons)
    try:
        model = gateway.client.models.list().data[0].id
        expected, wrong, done, stop = ours(daemons[0]).text, [], [0], threading.Event()

        def load():
            while not stop.is_set():
                try:
                    text = gateway.client.completions.create(model=model, prompt=WHOLE, max_tokens=20, temperature=0).choices[0].text
                    done[0] += 1
                    if text != expected:
                        wrong.append(text)
                except openai.OpenAIError as error:
                    wrong.append(str(error))

        threads = [threading.Thread(target=load) for _ in range(6)]
        for thread in threads:
            thread.start()
        finished = lambda daemon: daemon.stub.GetServerInfo(api.pb.GetServerInfoRequest(), timeout=PATIENCE_S).admission.finished
        until(lambda: all(finished(daemon) > 10 for daemon in daemons))
        try:
            yield daemons, lambda: done[0]
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert wrong == []
    finally:
        gateway.stop()
        for daemon in daemons:
            daemon.stop()


def test_two_daemons_of_which_one_drains_under_load(api, tmp_path):
    """Nothing is lost: what runs ends, and what comes then goes to the other one."""
    with loaded_gateway(api, tmp_path) as (daemons, done):
        daemons[0].terminate()
        assert daemons[0].wait() == 0
        before = done()
        until(lambda: done() > before + 50)


def test_two_hundred_requests_have_the_text_of_our_own_api(daemon, gateway, model):
    words = "the sun was dark and he said that night of a little house by sea".split()

    def one(i):
        choose = random.Random(i)
        prompt = " ".join(choose.choices(words, k=choose.randrange(2, 20)))
        sampling = {"temperature": choose.choice([0, 0.5, 1]), "top_p": choose.choice([0.5, 0.75, 1]), "seed": i}
        request = daemon.api.pb.GenerateRequest(text=prompt, sampling=sampling)
        request.stopping.max_new_tokens = choose.randrange(1, 24)
        theirs = gateway.client.completions.create(model=model, prompt="</s>" + prompt, max_tokens=request.stopping.max_new_tokens, **sampling)
        ours = daemon.stub.Generate(request, timeout=PATIENCE_S)
        return theirs.usage.completion_tokens == len(ours.token_ids) and theirs.choices[0].text == ours.text

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        same = list(pool.map(one, range(200)))
    assert all(same), [i for i, s in enumerate(same) if not s]
    daemon.expect_idle()


def test_two_daemons_of_which_one_dies_under_load(api, tmp_path):
    """What it had begun is asked of the other one: nothing of it had been sent."""
    with loaded_gateway(api, tmp_path) as (daemons, done):
        daemons[0].process.kill()
        before = done()
        until(lambda: done() > before + 50)
