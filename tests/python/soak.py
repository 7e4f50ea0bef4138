"""Hours in minutes: ./run soak MINUTES.

Two daemons of the embedded model under mixed load, good and bad (soak_load.py), one of them with TLS and tokens, whose certificates,
tokens and predictor are exchanged all the time; beside them two replicas that are restarted in turn under streams. Every two seconds
memory, descriptors, threads and latency are noted. Writes a page and JSON, and exits with 1, and the reasons, where something grew
after the fifth minute, a well-behaved call failed or was answered otherwise than at the start, or the books do not balance.

With --restarts N only the replicas: N restarts, as fast as their clients find them again.
"""
import argparse
import collections
import contextlib
import json
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

import grpc

import http2
from certificates import Authority
from conftest import BIN, PATIENCE_S, ROOT, Daemon, generate_api
from soak_judge import judge
from test_security import bearer, secret, tls_flags, token_lines
from test_upgrade import SERVICE_CONFIG, Load, Replica

HERE = pathlib.Path(__file__).parent
INTERVAL_S = 2
SETTLED_S = 20  # in which the last call has been accounted for
MOST_MIB = 4096  # at which a daemon is killed
TENANTS = {"ada": "secret-of-ada", "operators": "secret-of-operators"}
THREADS = ["--threads", "1", "--pin-threads=false"]


def say(text):
    print(text, file=sys.stderr, flush=True)


def sizes(pid):
    """Of a process; None where it has gone."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        field = lambda name: int(re.search(rf"^{name}:\s+(\d+)", status, re.M)[1])
        return dict(rss_mib=round(field("VmRSS") / 1024, 3), threads=field("Threads"), descriptors=len(os.listdir(f"/proc/{pid}/fd")))
    except (OSError, TypeError):
        return None


def metrics(daemon):
    with urllib.request.urlopen(f"http://{daemon.metrics_address}/metrics", timeout=PATIENCE_S) as page:
        return page.read().decode()


def metric(text, name, **labels):
    """The sum of the series with these labels."""
    total = 0.0
    for line in text.splitlines():
        if re.match(rf"{name}[{{ ]", line) and all(f'{label}="{value}"' in line for label, value in labels.items()):
            total += float(line.rsplit(None, 1)[1])
    return total


class Target:
    """A daemon that is never restarted, and the process that loads it."""

    def __init__(self, name, api, folder, options, secure=False):
        self.name, self.api, self.secure, self.folder = name, api, secure, folder
        folder.mkdir()
        orders = dict(seed=1, stubs=str(folder), streams=options.streams, pause_s=options.pause_s)
        flags, connect = [*THREADS, "--log-access=false", *options.daemon_flag], grpc.insecure_channel
        if secure:
            self.authority = Authority(folder, "ours")
            self.mount = secret(folder / "tls", self.authority)
            for kind, content in zip(("cert", "key"), self.authority.issue()):
                (folder / f"client.{kind}").write_bytes(content)
            self.write_tokens(0)
            files = dict(ca=self.authority.cert, cert=folder / "client.cert", key=folder / "client.key")
            self.credentials = grpc.ssl_channel_credentials(*(files[kind].read_bytes() for kind in ("ca", "key", "cert")))
            connect = self.open
            flags += [*tls_flags(self.mount, client_ca=True), "--auth-tokens-file", folder / "tokens", "--admin-listen", "127.0.0.1:0",
                      "--admin-port-file", folder / "admin_port"]
            orders |= dict(token=TENANTS["ada"], **{kind: str(path) for kind, path in files.items()})
        self.daemon = Daemon(api, folder, *flags, connect=connect)
        orders["address"] = self.daemon.address
        self.errors, self.lines = collections.Counter(), []
        self.process = subprocess.Popen([sys.executable, HERE / "soak_load.py", json.dumps(orders)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def open(self, address):
        return grpc.secure_channel(address, self.credentials, [("grpc.use_local_subchannel_pool", 1)])

    def read(self):
        for line in self.process.stdout:
            self.lines.append(json.loads(line))

    def sample(self, t_s):
        found = sizes(self.daemon.pid())
        if found is None:
            return None
        if found["rss_mib"] > MOST_MIB:
            self.daemon.signal(signal.SIGKILL)
        try:
            scraped = metrics(self.daemon)
        except OSError:  # it has gone meanwhile, or answers nobody
            return None
        load = self.lines[-1] if self.lines else {}
        return dict(t_s=round(t_s, 2), process=self.name, **found, running=metric(scraped, "dejavu_requests_running"),
                    **{key: load.get(key) for key in ("p50_ms", "p99_ms", "ttft_p50_ms", "ttft_p99_ms")})

    def write_tokens(self, n):
        """The two that are used, and one that is another each time."""
        new = self.folder / "tokens.new"
        new.write_text(token_lines({**TENANTS, "guest": f"secret-{n}"}))
        os.replace(new, self.folder / "tokens")

    def reload(self, n):
        """Certificate, tokens and predictor are exchanged."""
        cert, key = self.authority.issue()
        self.mount.write(cert=cert, key=key, ca=self.authority.pem)
        self.write_tokens(n)
        with self.open(f"127.0.0.1:{int((self.folder / 'admin_port').read_text())}") as channel:
            try:
                self.api.admin_rpc.AdminServiceStub(channel).ReloadPredictor(self.api.admin_pb.ReloadPredictorRequest(),
                                                                            timeout=PATIENCE_S, metadata=bearer(TENANTS["operators"]))
            except grpc.RpcError as error:
                self.errors[f"ReloadPredictor failed: {error.code().name}: {error.details()}"] += 1

    def finish(self):
        """(errors, books) after the load's end."""
        self.process.stdin.close()
        self.process.wait(timeout=2 * PATIENCE_S)
        self.reader.join()
        if self.process.returncode or not self.lines:
            return {f"{self.name}: the load ended with {self.process.returncode}": 1}, []
        done = self.lines[-1]["done"]
        errors = collections.Counter({f"{self.name}: {error}": count for error, count in self.lines[-1]["errors"].items()})
        errors.update({f"{self.name}: {error}": count for error, count in self.errors.items()})
        if self.daemon.process.poll() is not None:
            errors[f"{self.name}: the daemon ended with {self.daemon.process.returncode}"] += 1
            return errors, []
        return errors, self.books(done)

    def books(self, done):
        """(what, ours, the server's). A call may end a moment before it is accounted for."""
        def wanted(text):
            ended = lambda method, **labels: int(metric(text, "dejavu_requests_total", method=method, **labels))
            pairs = [(f"{self.name}: {method} that ended OK", done.get(method, 0), ended(method, code="OK"))
                     for method in ("Score", "Tokenize", "Detokenize", "Generate")]
            pairs.append((f"{self.name}: bad requests refused", done.get("bad requests", 0), ended("Generate", code="INVALID_ARGUMENT")))
            pairs += [(f"{self.name}: requests that run", 0, int(metric(text, "dejavu_requests_running"))),
                      (f"{self.name}: requests that wait", 0, int(metric(text, "dejavu_requests_waiting"))),
                      (f"{self.name}: blocks in use", 0, int(metric(text, "dejavu_kv_blocks", state="used")))]
            return pairs

        deadline = time.monotonic() + SETTLED_S
        while True:
            found = wanted(metrics(self.daemon))
            if all(ours == theirs for _, ours, theirs in found) or time.monotonic() > deadline:
                return found
            time.sleep(0.1)

    def stop(self):
        if self.process.poll() is None:
            self.process.kill()
        self.daemon.stop()


class Rolling:
    """Two replicas, restarted in turn under streams whose clients retry as deploy/client/service-config.json says."""

    def __init__(self, api, folder, streams):
        self.replicas = [Replica(api, folder / name, *THREADS) for name in ("a", "b")]
        addresses = [replica.daemon.address for replica in self.replicas]
        self.load = Load(api, "policy", self.replicas[0].daemon, addresses, SERVICE_CONFIG, streams)
        self.restarts, self.errors = 0, collections.Counter()

    def restart(self):
        replica = self.replicas[self.restarts % 2]
        replica.restart()
        replica.wait_until_used([self.load])
        self.restarts += 1

    def run(self, every_s, stop):
        """In a thread of its own."""
        try:
            while not stop.wait(every_s):
                self.restart()
        except Exception as error:  # must not look like a quiet soak
            self.errors[f"a rolling restart failed: {error!r}"[:300]] += 1

    def finish(self):
        self.load.end()
        self.errors.update(f"a stream was lost under restarts: {failure}" for failure in self.load.failures)
        for replica in self.replicas:
            replica.daemon.stop()
        return self.errors


def page(result):
    """One file that loads nothing. Style and charts are those of a load test's page."""
    report = (ROOT / "loadtest/generator/report.html").read_text()
    between = lambda begin, end: report[report.index(begin):report.index(end)]
    text = (HERE / "soak.html").read_text()
    text = text.replace("%STYLE%", between("<style>", "</style>")).replace("%CHARTS%", between("const $ =", "// ---- Loops"))
    return text.replace("%RESULT%", json.dumps(result).replace("<", "\\u003c"))


def soak(options, api, folder):
    samples, errors, books, stop = [], collections.Counter(), [], threading.Event()
    with contextlib.ExitStack() as stack:
        targets = [Target("plain", api, folder / "plain", options), Target("TLS and tokens", api, folder / "secure", options, secure=True)]
        for target in targets:
            stack.callback(target.stop)
        rolling = Rolling(api, folder, options.rolling_streams) if options.restart_every_s else None
        rollers = [threading.Thread(target=rolling.run, args=(options.restart_every_s, stop))] if rolling else []
        for thread in rollers:
            thread.start()
        reloads, begin = 0, time.monotonic()
        try:
            while (t_s := time.monotonic() - begin) < 60 * options.minutes:
                found = [target.sample(t_s) for target in targets]
                if None in found:
                    errors["a daemon has ended, or answers no scrape"] += 1
                    break
                samples += found
                if t_s >= (reloads + 1) * options.reload_every_s:
                    reloads += 1
                    targets[1].reload(reloads)
                time.sleep(max(0, INTERVAL_S - (time.monotonic() - begin - t_s)))
        finally:
            stop.set()
            for thread in rollers:
                thread.join()
            if rolling:
                errors.update(rolling.finish())
        for target in targets:
            found, balance = target.finish()
            errors.update(found)
            books += balance
        done = {target.name: target.lines[-1]["done"] if target.lines else {} for target in targets}
    growth, reasons = judge(samples, options.settle_s, errors, books)
    return dict(seconds=round(time.monotonic() - begin, 1), settle_s=options.settle_s, samples=samples, growth=growth, reasons=reasons,
                books=books, done=done, reloads=reloads, restarts=rolling.restarts if rolling else 0,
                rolling_streams=rolling.load.finished if rolling else 0)


def only_restarts(options, api, folder):
    begin, rolling = time.monotonic(), Rolling(api, folder, options.rolling_streams)
    try:
        while rolling.restarts < options.restarts:
            rolling.restart()
            if rolling.restarts % 20 == 0:
                say(f"{rolling.restarts} restarts, {rolling.load.finished} streams, {len(rolling.load.failures)} lost")
    finally:
        errors = rolling.finish()
    return dict(seconds=round(time.monotonic() - begin, 1), settle_s=0, samples=[], growth={}, books=[], done={}, reloads=0,
                restarts=rolling.restarts, rolling_streams=rolling.load.finished,
                reasons=[f"{count} x {error}" for error, count in errors.items()])


def summary(result):
    lines = [f"{result['seconds']:.0f} s; {result['reloads']} reloads; {result['restarts']} restarts under {result['rolling_streams']} streams"]
    for process, growth in result["growth"].items():
        if growth:
            lines.append(f"{process}: memory {growth['rss_mib'][0]:.1f} -> {growth['rss_mib'][1]:.1f} MiB ({growth['rss_growth']:+.2%}), "
                         f"descriptors {growth['descriptors'][0]} -> {growth['descriptors'][1]}, threads {growth['threads'][0]} -> "
                         f"{growth['threads'][1]}")
    for process, done in result["done"].items():
        lines.append(f"{process}: " + ", ".join(f"{count} {what}" for what, count in sorted(done.items())))
    lines += [f"FAILED: {reason}" for reason in result["reasons"]] or ["nothing grew, nothing was lost, the books balance"]
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="./run soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minutes", type=float, nargs="?", default=30)
    parser.add_argument("--restarts", type=int, metavar="N", help="only N rolling restarts of two daemons")
    parser.add_argument("--settle-s", type=float, default=300, help="seconds that memory may still grow (default 300)")
    parser.add_argument("--streams", type=int, default=4, help="of well-behaved clients at once, for each daemon (default 4)")
    parser.add_argument("--rolling-streams", type=int, default=16, help="at once on the two replicas (default 16)")
    parser.add_argument("--pause-s", type=float, default=0.2, help="between two calls of a client (default 0.2)")
    parser.add_argument("--reload-every-s", type=float, default=10, help="certificates, tokens and the predictor (default 10)")
    parser.add_argument("--restart-every-s", type=float, default=30, help="of the replicas; 0: there are none (default 30)")
    parser.add_argument("--daemon-flag", action="append", default=[], metavar="FLAG",
                        help="one more of the two daemons; may be repeated")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "build/soak", metavar="FOLDER")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        api = generate_api(folder)
        result = (only_restarts if options.restarts else soak)(options, api, pathlib.Path(folder))
    result |= dict(date=time.strftime("%Y-%m-%d %H:%M"), machine=f"{os.cpu_count()} CPUs, {platform.machine()}", bin=str(BIN),
                   command="./run soak " + " ".join(arguments or sys.argv[1:]), interval_s=INTERVAL_S)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "soak.json").write_text(json.dumps(result))
    (options.output / "soak.html").write_text(page(result))
    print(summary(result))
    print(f"{options.output / 'soak.json'}, {options.output / 'soak.html'}")
    return 1 if result["reasons"] else 0


if __name__ == "__main__":
    sys.exit(main())
