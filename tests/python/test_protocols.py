"""One server, several protocols: what clients do in each of them, one after another and all at once. Stock clients are ./run protocols' part."""
import contextlib
import random
import signal

import grpc
import pytest

import every_protocol
import open_inference as oip
import vllm_engine
from every_protocol import BRAKED, SOON, WORDS, long_request, mixed, text_request
from speakers import Relay, grpc_speakers

NAMES = ("dejavu", "dejavu stream", "kserve", "kserve stream", "vllm", "vllm stream")
REQUESTS = 200


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    return oip.generate(tmp_path_factory.mktemp("kserve")), vllm_engine.stubs(tmp_path_factory.mktemp("vllm"))


@pytest.fixture
def speak(api, modules):
    """The speakers of an address, by name."""
    with contextlib.ExitStack() as channels:
        def to(address):
            channel = channels.enter_context(grpc.insecure_channel(address, options=SOON))
            return grpc_speakers(channel, api, *modules)

        yield to


def test_two_hundred_requests_have_the_same_tokens_in_every_protocol(daemon, speak):
    def request(i):
        asked, choose = mixed(daemon.api, i), random.Random(i)
        if i % 2:
            asked.token_ids.ids.extend([2] + [choose.randrange(4, 8192) for _ in range(choose.randrange(1, 60))])
        return asked

    speakers = speak(daemon.address)
    assert tuple(speakers) == NAMES
    every_protocol.same_answers(daemon, speakers, [request(i) for i in range(REQUESTS)])


@pytest.mark.parametrize("name", NAMES)
def test_a_client_that_cancels_frees_everything(braked, speak, name):
    every_protocol.a_cancel_frees_everything(braked, speak(braked.address)[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_client_whose_deadline_passes_frees_everything(braked, speak, name):
    every_protocol.a_deadline_frees_everything(braked, speak(braked.address)[name])


@pytest.mark.parametrize("name", NAMES)
def test_the_server_keeps_deadlines_itself(braked, speak, name):
    every_protocol.the_server_keeps_the_deadline(braked, speak(braked.address)[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_client_that_is_gone_leaves_nothing_behind(braked, speak, name):
    relay = Relay(braked.address)
    every_protocol.a_client_that_is_gone_leaves_nothing(braked, speak(relay.address)[name], relay)


def test_a_drain_loses_nothing_in_any_protocol(daemon, start, speak):
    expected = [speak(daemon.address)["dejavu"].ask(long_request(daemon.api, i)) for i in range(len(NAMES))]
    draining = start(*BRAKED)
    every_protocol.a_drain_loses_nothing(draining, speak(draining.address), expected)


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGKILL))
def test_a_restart_loses_nothing_in_any_protocol(daemon, start, speak, number):
    expected = speak(daemon.address)["dejavu"].ask(text_request(daemon.api, WORDS[0], 60))
    first = start("--scheduler-fault", "slow@5")
    every_protocol.restarts_lose_nothing(speak(first.address), first, lambda: start(listen=first.address), number, expected)
