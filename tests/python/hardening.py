"""The attacks of attacks.py on a daemon, with a well-behaved client beside them: ./run hardening.

For each attack a fresh daemon, a client in a process of its own that streams all the time, and one that asks for health on a new
connection to the very port, again and again. Prints a table, writes JSON, and exits with 1 where a bound was broken: a gap between
tokens (p99) of more than 1.5 times the quiet one, memory that grew by more than MOST_GROWTH_MIB, a stream of the good client that
failed, or a port that health did not speak for.
"""
import argparse
import contextlib
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time

import grpc

import http2
from attacks import ATTACKS, SERVICE
from conftest import Daemon, generate_api

HERE = pathlib.Path(__file__).parent
MOST_GROWTH_MIB = 640  # keys and values 64, transport.memory_mib 256, max_unread_mib 128, and what comes before it is seen
MOST_MIB = 4096  # at which a daemon is killed
MOST_RATIO = 1.5
HEALTH_PATIENCE_S = 5
FEW_DESCRIPTORS = ["prlimit", "--nofile=1024:1024"]
NEEDS_FEW = {"churn", "hold"}  # attacks on descriptors
TAKES_REQUEST = {"shared_connection", "bad_base64"}
CLIENT_TOKENS = 100

# In a process of its own: streams until its standard input ends, and prints what it saw. Times in milliseconds.
CLIENT = """
import json, sys, threading, time, grpc
address, request = sys.argv[1], bytes.fromhex(sys.argv[2])
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
gaps, firsts, failures, streams = [], [], {}, 0
options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000)]
with grpc.insecure_channel(address, options) as channel:
    call = channel.unary_stream("/dejavu.v1.GenerationService/GenerateStream")
    print("ready", flush=True)
    while not stop.is_set():
        before, first = time.monotonic(), True
        try:
            for reply in call(request, timeout=30):
                now = time.monotonic()
                (firsts if first else gaps).append(1000 * (now - before))
                before, first = now, False
            streams += 1
        except grpc.RpcError as error:
            name = f"{error.code().name}: {error.details()}"[:200]
            failures[name] = failures.get(name, 0) + 1
            time.sleep(0.05)
print(json.dumps(dict(streams=streams, failures=failures, gaps=gaps, firsts=firsts)))
"""


def percentile(values, share):
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


class GoodClient:
    def __init__(self, address, request):
        self._process = subprocess.Popen([sys.executable, "-c", CLIENT, address, request.SerializeToString().hex()],
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout.readline() == "ready\n"

    def finish(self):
        seen = json.loads(self._process.communicate(timeout=120)[0])
        return dict(streams=seen["streams"], failures=seen["failures"], tokens=len(seen["gaps"]),
                    gap_p50_ms=percentile(seen["gaps"], 0.5), gap_p99_ms=percentile(seen["gaps"], 0.99),
                    gap_max_ms=max(seen["gaps"], default=float("nan")), ttft_p99_ms=percentile(seen["firsts"], 0.99))


def healthy(address, patience_s=HEALTH_PATIENCE_S):
    """Whether a new connection to that port is answered that it serves."""
    try:
        with http2.Connection(address, patience_s=patience_s) as peer:
            return peer.outcome(peer.call("/grpc.health.v1.Health/Check", b"")).messages == [b"\x08\x01"]
    except (OSError, http2.Closed):
        return False


def resident_mib(pid, name="VmRSS"):
    """Or VmHWM, the most since it was reset."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(name + ":")), float("nan"))


class Watch:
    """Memory, descriptors and health of a daemon while something is done to it. One that takes MOST_MIB is killed, for the sake of
    the machine."""

    def __init__(self, pid, address):
        self._pid, self._address, self._stop = pid, address, threading.Event()
        pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM begins again
        self.seen = dict(rss_before_mib=resident_mib(pid), fds_peak=0, health_asked=0, health_answered=0,
                         killed=False)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._look, self._ask_health)]
        for thread in self._threads:
            thread.start()

    def _look(self):
        while not self._stop.wait(0.05):
            if resident_mib(self._pid) > MOST_MIB and not self.seen["killed"]:
                self.seen["killed"] = True
                os.kill(self._pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                self.seen["fds_peak"] = max(self.seen["fds_peak"], len(os.listdir(f"/proc/{self._pid}/fd")))

    def _ask_health(self):
        while not self._stop.wait(0.5):
            self.seen["health_asked"] += 1
            self.seen["health_answered"] += healthy(self._address)

    def finish(self):
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self.seen.update(rss_peak_mib=resident_mib(self._pid, "VmHWM"), rss_after_mib=resident_mib(self._pid))
        return self.seen


def start_attack(name, address, seconds, request=None, count=None):
    """A process of low priority: it shall not take the daemon's processors by right."""
    more = [*(["--request", request.SerializeToString().hex()] if request is not None else []),
            *(["--count", str(count)] if count is not None else [])]
    return subprocess.Popen(["nice", "-n", "10", sys.executable, HERE / "attacks.py", name, address, "--seconds", str(seconds), *more],
                            stdout=subprocess.PIPE, text=True)


def under_attack(name, pid, address, request, seconds, quiet_s, count=None):
    """What the good client, the daemon and the attacker saw, and which bounds were broken. `quiet_s` 0: gaps are not compared."""
    quiet = None
    if quiet_s > 0:
        client = GoodClient(address, request)
        time.sleep(quiet_s)
        quiet = client.finish()
    watch, client = Watch(pid, address), GoodClient(address, request)
    longer = None
    if name in TAKES_REQUEST:  # so that a gap in a hundred is not the first step of one of the attack's own good streams
        longer = type(request)()
        longer.CopyFrom(request)
        longer.stopping.max_new_tokens *= 4
    attack = start_attack(name, address, seconds, longer, count)
    done = json.loads(attack.communicate(timeout=seconds + 120)[0] or "{}")
    attacked, seen = client.finish(), watch.finish()
    seen["serves_after"] = healthy(address)
    time.sleep(1)
    seen["rss_after_mib"] = resident_mib(pid)
    ratio = attacked["gap_p99_ms"] / quiet["gap_p99_ms"] if quiet else 1
    broken = [what for what, holds in (
        (f"gap p99 {ratio:.2f} x", ratio <= MOST_RATIO),
        ("memory", seen["rss_peak_mib"] - seen["rss_before_mib"] <= MOST_GROWTH_MIB),
        (f"failures {attacked['failures']}", not attacked["failures"]),
        ("health", seen["health_answered"] == seen["health_asked"]),
        ("the port is dead", seen["serves_after"]),
        ("streams lost", not done.get("streams_lost"))) if not holds]
    return dict(attack=name, seconds=seconds, attacker=done, quiet=quiet, attacked=attacked, gap_ratio=ratio, daemon=seen, broken=broken)


def pause(daemon, seconds, calls=10):
    """A daemon that has made a few steps is stopped for so long shortly before a stream's end. Then it is idle, and asked by calls
    that have far more time than they need: the answers. After the next pause nothing teaches it better but those calls."""
    stream, tokens = daemon.stub.GenerateStream(daemon.request([2, 5, 7], 20), timeout=120), 0
    for reply in stream:
        tokens += len(reply.token_ids)
        if tokens >= 15:
            break
    daemon.signal(signal.SIGSTOP)
    time.sleep(seconds)
    daemon.signal(signal.SIGCONT)
    tokens += sum(len(reply.token_ids) for reply in stream)
    answers = {}
    for _ in range(calls):
        try:
            daemon.stub.Generate(daemon.request([2, 5, 7], 20), timeout=10)
            answer = "OK"
        except grpc.RpcError as error:
            answer = f"{error.code().name}: {error.details()}"[:90]
        answers[answer] = answers.get(answer, 0) + 1
    return dict(attack="pause", seconds=seconds, attacker=dict(stream_tokens=tokens, answers=answers),
                broken=[] if list(answers) == ["OK"] else ["calls refused"])


@contextlib.contextmanager
def front_of(command, address):
    """The address of what stands before the daemon. `command` gets the daemon's address as its last argument and prints its own
    HOST:PORT as its first line, once it takes connections; it ends with SIGTERM."""
    if not command:
        yield address
        return
    process = subprocess.Popen([*shlex.split(command), address], stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait(timeout=30)


def daemon_for(name, step_ms, start, *args):
    """`start(*args, *flags, **options)` starts one that the attack is meant for."""
    if name == "pause":
        return start(*args, "--weights", "int8", model="synthetic:opt-125m")
    # Its deadlines are not what is asked here; a step is of a larger model's length, except where it is the attack's means.
    flags = ["--scheduler-deadline-slack", "0"] + (["--scheduler-fault", f"slow@{step_ms:g}"] if name != "unread_scores" else [])
    return start(*args, *flags, prefix=FEW_DESCRIPTORS if name in NEEDS_FEW else ())


def line_of(result):
    if result["attack"] == "pause":
        return f"| pause {result['seconds']:g} s | | | | | | {result['attacker']['answers']} | {', '.join(result['broken']) or 'holds'} |"
    attacked, daemon = result["attacked"], result["daemon"]
    quiet = result["quiet"] or dict.fromkeys(attacked, float("nan"))
    return (f"| {result['attack']} | {quiet['gap_p99_ms']:.1f} -> {attacked['gap_p99_ms']:.1f} ({result['gap_ratio']:.2f} x), "
            f"most {attacked['gap_max_ms']:.0f} | {quiet['ttft_p99_ms']:.0f} -> {attacked['ttft_p99_ms']:.0f} "
            f"| {daemon['rss_before_mib']:.0f} -> {daemon['rss_peak_mib']:.0f}, then {daemon['rss_after_mib']:.0f} | {daemon['fds_peak']} "
            f"| {daemon['health_answered']}/{daemon['health_asked']} | {json.dumps(result['attacker'])} "
            f"| {', '.join(result['broken']) or 'holds'} |")


def main():
    parser = argparse.ArgumentParser(prog="./run hardening", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="of each attack")
    parser.add_argument("--quiet-seconds", type=float, default=5, help="before each, to compare with")
    parser.add_argument("--only", action="append", choices=[*ATTACKS, "pause"], help="these attacks; may be repeated")
    parser.add_argument("--proxy", metavar="COMMAND", help="starts what stands in front: gets HOST:PORT of the daemon as its last "
                        "argument, prints HOST:PORT of its own")
    parser.add_argument("--step-ms", type=float, default=10, help="so much longer every step, so that gaps are of a model's size")
    parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path("build/hardening.json"), metavar="FILE")
    args = parser.parse_args()
    results = []
    print("| attack | gap between tokens, p99 ms | first token, p99 ms | memory MiB | descriptors | health | attacker | |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        api = generate_api(folder)
        for name in args.only or [*ATTACKS, "pause"]:
            daemon = daemon_for(name, args.step_ms, Daemon, api, pathlib.Path(folder))
            try:
                with front_of(args.proxy, daemon.address) as address:
                    request = daemon.request([2, 5, 7], CLIENT_TOKENS)
                    results.append(pause(daemon, 5) if name == "pause" else under_attack(
                        name, daemon.pid(), address, request, args.seconds, args.quiet_seconds))
            finally:
                daemon.process.kill()
                daemon.stop()
            print(line_of(results[-1]), flush=True)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(results, indent=1))
    print(f"\nAll of it: {args.json}")
    return 1 if any(result["broken"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
