"""Groups of bad input: a table of cases with the code that each must get, and what must hold after any of them.

Every group is sent twice, so that what the first time fills for good (arenas, caches) does not count as a leak.
"""
import dataclasses
import time
import urllib.request

import grpc

from conftest import PATIENCE_S
from hardening import healthy, resident_mib

SERVICE = "/dejavu.v1.GenerationService/"
CODES = {code.name: code for code in grpc.StatusCode}
PROMPT = [2, 5, 7]
# What a second round of a group may add to memory.
MOST_GROWTH_MIB = 16


@dataclasses.dataclass
class Case:
    name: str
    method: str
    message: bytes
    code: str
    words: str = ""  # in the error's message
    metadata: tuple = ()
    timeout: float = PATIENCE_S


def send(daemon, case):
    """Code and message that a client gets."""
    path = case.method if case.method.startswith("/") else SERVICE + case.method
    call = daemon.channel.unary_stream(path)  # good for unary methods too: a stream of one
    try:
        for _ in call(case.message, timeout=case.timeout, metadata=case.metadata):
            pass
        return "OK", ""
    except grpc.RpcError as error:
        return error.code().name, error.details()


def samples_of(daemon, name):
    """Labels to value, of one family of the metrics."""
    with urllib.request.urlopen(f"http://{daemon.metrics_address}/metrics", timeout=PATIENCE_S) as page:
        lines = [line for line in page.read().decode().splitlines() if line.startswith(name + "{")]
    found = {}
    for line in lines:
        labels = dict(pair.split("=") for pair in line[len(name) + 1:line.rindex("}")].replace('"', "").split(","))
        found[tuple(sorted(labels.items()))] = float(line.split()[-1])
    return found


OURS = {"GetServerInfo", "Check", "Watch"}  # what the tests themselves ask for


def ended(daemon):
    """Calls that have ended, by code."""
    found = {}
    for labels, value in samples_of(daemon, "dejavu_requests_total").items():
        labels = dict(labels)
        if labels["method"] not in OURS:
            found[labels["code"]] = found.get(labels["code"], 0) + int(value)
    return found


def canary(daemon):
    """The tokens of a greedy request, which nothing may change."""
    return list(daemon.stub.Generate(daemon.request([2, 5, 7, 11], 24), timeout=PATIENCE_S).token_ids)


def until(condition, what):
    deadline = time.monotonic() + PATIENCE_S / 4
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.02)


class Watched:
    """Holds a daemon to what must be true after every group."""

    def __init__(self, daemon):
        self._daemon, self._ended = daemon, ended(daemon)
        self._tokens = canary(daemon)
        self.expect_ended({"OK": 1})

    def expect_ended(self, codes):
        """Calls by code since the last time, as the metrics have them: no more, no less."""
        wanted = {code: self._ended.get(code, 0) + codes.get(code, 0) for code in {*self._ended, *codes}}
        until(lambda: ended(self._daemon) == wanted, lambda: f"the metrics count {ended(self._daemon)}, the client {wanted}")
        self._ended = wanted

    def expect_sound(self, codes=None):
        """Nothing runs, nothing is held, every call is in the books, the canary sings as before, and health says so. `codes`: of the
        calls that were made, where the test knows."""
        daemon = self._daemon
        daemon.expect_idle()
        account = daemon.stub.GetServerInfo(daemon.api.pb.GetServerInfoRequest(), timeout=PATIENCE_S).admission
        assert account.received == account.finished + account.cancelled + account.failed + account.live + sum(account.refused.values())
        assert account.live == 0
        if codes is not None:
            self.expect_ended(codes)
        before = ended(daemon)
        assert canary(daemon) == self._tokens
        if codes is not None:
            self.expect_ended({"OK": 1})
        else:  # a call is counted after its answer has left; whoever counts next shall not find it
            until(lambda: ended(daemon).get("OK", 0) > before.get("OK", 0), lambda: f"the metrics do not count the canary: {ended(daemon)}")
        assert healthy(daemon.address, PATIENCE_S)


def run(daemon, number, cases, at_least, most_growth_mib=MOST_GROWTH_MIB):
    watched, wrong, seen = Watched(daemon), [], {}
    for again in range(2):
        for case in cases:
            code, message = send(daemon, case)
            if case.method.rsplit("/", 1)[-1] not in OURS:
                seen[code] = seen.get(code, 0) + 1
            if code != case.code or case.words not in message:
                wrong.append(f"{case.name}: {code} '{message[:200]}', not {case.code} '{case.words}'")
        if again:
            growth = resident_mib(daemon.pid()) - resident
        resident = resident_mib(daemon.pid())
        assert not wrong, "\n".join(wrong)
    print(f"group {number}: {len(cases)} inputs")
    assert len(cases) >= at_least
    watched.expect_sound(seen)
    assert growth <= most_growth_mib, f"{growth:.1f} MiB more after the second round"
