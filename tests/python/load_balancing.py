"""gRPC's own weighted_round_robin over two daemons of which one is slower: how many requests each gets. ./run load-balancing.

The speed of a daemon is one over the mean time of a request that it serves alone. With round_robin both get the same share; with
weighted_round_robin, which reads the daemons' load reports, the shares are to be those of the speeds. A machine that does something
else meanwhile, or stands still, makes other speeds: each measurement is held against what was measured around it, and is made again.
"""
import argparse
import json
import pathlib
import sys
import tempfile
import threading
import time

import grpc

from conftest import PATIENCE_S, Daemon, generate_api

POLICIES = {"round_robin": {}, "weighted_round_robin": {"blackoutPeriod": "1s", "weightUpdatePeriod": "0.5s"}}
OUT_OF_BAND = {"blackoutPeriod": "1s", "weightUpdatePeriod": "0.5s", "enableOobLoadReport": True, "oobReportingPeriod": "0.5s"}
TOKENS, WARM_UP = 8, 3.0
BEAT_S = 0.02
# Of a quiet machine both are a few times less. A report's means fade in 5 s: they feel a stop that is much shorter.
MOST_GAP_S, MOST_CHANGE = 0.5, 0.05


def finished(daemon):
    return daemon.stub.GetServerInfo(daemon.api.pb.GetServerInfoRequest(), timeout=PATIENCE_S).admission.finished


def speed(daemon, seconds):
    begin, requests = time.monotonic(), 0
    while time.monotonic() - begin < seconds:
        daemon.stub.Generate(daemon.request([2, 100], TOKENS), timeout=PATIENCE_S)
        requests += 1
    return requests / (time.monotonic() - begin)


def shares(daemons, policy, options, seconds, clients):
    addresses = ",".join(daemon.address for daemon in daemons)
    config = json.dumps({"loadBalancingConfig": [{policy: options}]})
    with grpc.insecure_channel(f"ipv4:{addresses}", options=[("grpc.service_config", config)]) as channel:
        stub = daemons[0].api.rpc.GenerationServiceStub(channel)
        end = time.monotonic() + WARM_UP + seconds

        def client():
            while time.monotonic() < end:
                stub.Generate(daemons[0].request([2, 100], TOKENS), timeout=PATIENCE_S)

        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        time.sleep(WARM_UP)  # what the policy has seen by then it weighs
        before = [finished(daemon) for daemon in daemons]
        for thread in threads:
            thread.join()
        counts = [finished(daemon) - b for daemon, b in zip(daemons, before)]
    return [count / sum(counts) for count in counts]


class Heartbeat:
    """The longest time that this process did not run for, though it wanted to."""

    def __enter__(self):
        self._stop, self.longest_gap_s = threading.Event(), 0.0
        self._thread = threading.Thread(target=self._beat)
        self._thread.start()
        return self

    def _beat(self):
        last = time.monotonic()
        while not self._stop.wait(BEAT_S):
            now = time.monotonic()
            last, self.longest_gap_s = now, max(self.longest_gap_s, now - last)

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def part_of(values):
    return [value / sum(values) for value in values]


def disturbance(before, after, longest_gap_s):
    """Why a measurement between these speeds says nothing, or None."""
    change = max(abs(a / b - 1) for a, b in zip(after, before))
    if longest_gap_s > MOST_GAP_S:
        return f"the machine stood still for {longest_gap_s:.2f} s"
    if change > MOST_CHANGE:
        return f"the speeds before and after it differ by {change:.0%}"
    return None


def measure(daemons, label, policy, options, arguments):
    """The shares that each daemon got and should have got, of a measurement that nothing disturbed; None: there was none."""
    seconds = arguments.seconds / 3
    before = [speed(daemon, seconds) for daemon in daemons]
    for attempt in range(1, arguments.tries + 1):
        with Heartbeat() as heartbeat:
            got = shares(daemons, policy, options, arguments.seconds, arguments.clients)
            after = [speed(daemon, seconds) for daemon in daemons]
        why = disturbance(before, after, heartbeat.longest_gap_s)
        if why is None:
            return got, part_of([a + b for a, b in zip(before, after)])
        print(f"{label}: {why}: try {attempt} of {arguments.tries} does not count", file=sys.stderr, flush=True)
        before = after
    return None


def measure_all(daemons, arguments):
    """The code to exit with."""
    print(f"{'':34} fast   slow  of the speeds")
    worst = 0.0
    for label, policy, options in (*((p, p, o) for p, o in POLICIES.items()),
                                   ("weighted_round_robin, beside calls", "weighted_round_robin", OUT_OF_BAND)):
        measured = measure(daemons, label, policy, options, arguments)
        if measured is None:
            print(f"{label:34} not measured: the machine is not quiet")
            return 2
        got, wanted = measured
        print(f"{label:34} {got[0]:5.1%}  {got[1]:5.1%}  {wanted[0]:5.1%}  {wanted[1]:5.1%}", flush=True)
        if policy == "weighted_round_robin":
            worst = max(worst, *(abs(g / w - 1) for g, w in zip(got, wanted)))
    print(f"{'largest deviation from the speeds':34} {worst:5.1%}")
    return 0 if worst <= 0.15 else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     epilog="Exits with 1 where a share is more than 15 % off, with 2 where the machine was not quiet enough to tell.")
    parser.add_argument("--seconds", type=float, default=15, help="of each measurement (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=4, help="requests at a time (default: %(default)s)")
    parser.add_argument("--slow-ms", type=int, default=30, help="a step of the slower daemon; one of the other takes 10 (default: %(default)s)")
    parser.add_argument("--tries", type=int, default=3, help="of a measurement that is disturbed (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        daemons = []
        try:
            api = generate_api(folder)
            for name, ms in (("fast", 10), ("slow", arguments.slow_ms)):
                (folder / name).mkdir()
                daemons.append(Daemon(api, folder / name, "--scheduler-fault", f"slow@{ms}", "--scheduler-deadline-slack", "0"))
            return measure_all(daemons, arguments)
        finally:
            for daemon in daemons:
                daemon.stop()


if __name__ == "__main__":
    sys.exit(main())
