"""How much load a model holds, by tier and batch cap; `./run loadtest` starts it. Standard library only.

For every batch cap a daemon is started on this machine; for every tier its capacity is guessed in a closed loop, and then
measured in open loops at rising rates until one falls short twice (loadtest/generator/knee.h says when), and between the last
two. Of two CPUs or more the daemon computes on all but one, which its network threads share with the generator. A virtual
machine's CPUs are kept awake meanwhile. Times in ms where the name ends so, else in seconds.
"""
import argparse
import contextlib
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
PATIENCE_S = 600  # for a daemon to load its model, and for a run to end
LEAST_ITL_MS, LEAST_TTFT_MS = 50, 500  # nobody reads faster
LEAST_REQUESTS = 12  # of a run; slow models are sent requests for longer
STEP_SHARE = 0.7  # of the objective between tokens: the scheduler's target for a step, which may take longer than planned
# Of the guessed capacity.
RISING = (0.3, 0.5, 0.65, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)


def say(text):
    print(text, file=sys.stderr, flush=True)


def round_up(x):
    """To 1, 1.5, 2, 3, 5 or 7 times a power of ten: what somebody would choose as a target."""
    unit = 10.0 ** math.floor(math.log10(x))
    return next(n * unit for n in (1, 1.5, 2, 3, 5, 7, 10) if n * unit >= x * 0.999)


@contextlib.contextmanager
def awake_cpus(cpus):
    """While in the block: a virtual CPU that sleeps may have to wait for its host when it is woken, for milliseconds that a
    machine of one's own does not have. So in a virtual machine each one spins, for nobody who wants it."""
    spinners = []
    if "hypervisor" in pathlib.Path("/proc/cpuinfo").read_text():
        parent = os.getpid()
        for cpu in cpus:
            spinner = os.fork()
            if spinner == 0:
                os.sched_setaffinity(0, {cpu})
                os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
                while os.getppid() == parent:
                    pass
                os._exit(0)
            spinners.append(spinner)
    try:
        yield
    finally:
        for spinner in spinners:
            os.kill(spinner, signal.SIGKILL)
            os.waitpid(spinner, 0)


class Daemon:
    """`with Daemon(...) as daemon`: serves on `address`, and its metrics on `metrics`."""

    def __init__(self, binaries, folder, model, flags):
        self.binaries, self.log = binaries, folder / "dejavud.log"
        self.port_files = [folder / "port", folder / "metrics_port"]
        for path in self.port_files:
            path.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [binaries / "dejavud", "--model", model, "--listen", "127.0.0.1:0", "--port-file", self.port_files[0],
             "--metrics-listen", "127.0.0.1:0", "--metrics-port-file", self.port_files[1], "--log-access=false",
             *[str(flag) for flag in flags]],
            stdout=subprocess.DEVNULL, stderr=open(self.log, "wb"))

    def __enter__(self):
        try:
            self.wait_until_serving()
        except BaseException:
            self.__exit__()
            raise
        return self

    def wait_until_serving(self):
        deadline = time.monotonic() + PATIENCE_S
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the daemon does not serve:\n{self.log.read_text(errors='replace')}")
            if all(path.exists() for path in self.port_files):
                ports = [int(path.read_text()) for path in self.port_files]
                self.address, self.metrics = f"127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}/metrics"
                health = subprocess.run([self.binaries / "dejavu-cli", "--server", self.address, "health"], capture_output=True)
                if health.returncode == 0:
                    return
            time.sleep(0.1)

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=PATIENCE_S)
            finally:
                self.process.kill()


class Sweep:
    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.results = []
        self.cpus = sorted(os.sched_getaffinity(0))
        self.threads = max(1, len(self.cpus) - 1)

    def go_first(self):
        """In the generator's process: it needs little, but at once; the daemon's network threads run beside it."""
        os.sched_setaffinity(0, self.cpus[-1:])
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, -15)

    def closed(self, daemon, label, tier, at_once, rounds):
        """The result of so many requests for each of those who wait for their answers."""
        return self.run(daemon, label, "--concurrency", at_once, "--tier", tier, "--requests", rounds * at_once,
                        "--warmup-requests", at_once)

    def run(self, daemon, label, *flags):
        """The result of one run, invalid ones included."""
        path = self.folder / "run.json"
        path.unlink(missing_ok=True)
        command = [self.options.bin / "dejavu-loadtest", "run", "--server", daemon.address, "--metrics", daemon.metrics,
                   "--label", label, "--json", path, "--quiet",
                   "--prompt-tokens", self.options.prompt_tokens, "--output-tokens", self.options.output_tokens, *flags]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=PATIENCE_S,
                              preexec_fn=self.go_first)
        if done.returncode not in (0, 4):  # 4: invalid, and written
            sys.exit(f"{' '.join(str(part) for part in command)}\nended with {done.returncode}:\n{done.stderr}")
        return json.loads(path.read_text())

    def at_rate(self, daemon, label, tier, rate):
        """Whether the rate was held. One that was not is tried once more: it may have been the machine. Invalid runs say
        nothing of the server and are tried more often."""
        short, seconds = 0, max(self.options.seconds, LEAST_REQUESTS / rate)
        for attempt in range(1, 5):
            result = self.run(daemon, label, "--rate", round(rate, 4), "--tier", tier, "--seed", attempt,
                              "--goodput", f"ttft:{self.ttft_ms}", "--goodput", f"itl_p99:{self.itl_ms}",
                              "--duration", seconds, "--warmup-s", seconds / 5, "--grace-s", max(5, seconds))
            short += result["valid"]
            if not result["falls_short"] or short == 2:
                break
        self.results.append(result)
        say(f"  {label}: {result['offered_rate']:.3g}/s offered, {result['request_goodput']:.3g}/s good, p99 between tokens "
            f"{result['p99_itl_ms'] or 0:.3g} ms; {'; '.join(result['falls_short']) or 'held'}")
        return not result["falls_short"]

    def choose_targets(self, unloaded):
        """Where none were given: several times what a request takes that is alone and dense."""
        self.itl_ms = self.options.itl_ms or round_up(max(LEAST_ITL_MS, 4 * unloaded["p50_tpot_ms"]))
        self.ttft_ms = self.options.ttft_ms or round_up(max(LEAST_TTFT_MS, 10 * unloaded["p50_ttft_ms"]))

    def search(self, daemon, label, tier, at_once):
        guess = self.closed(daemon, label, tier, at_once, rounds=4)["request_throughput"]
        held, short = 0.0, None
        for share in RISING[::2] if self.options.quick else RISING:
            if self.at_rate(daemon, label, tier, share * guess):
                held = share * guess
            else:
                short = share * guess
                break
        if short and not held:
            self.at_rate(daemon, label, tier, short / 3)
        elif short and not self.options.quick:
            self.at_rate(daemon, label, tier, (held + short) / 2)

    def all(self):
        options = self.options
        flags = ["--threads", self.threads, *options.daemon_flags]
        with Daemon(options.bin, self.folder, options.model, flags) as daemon:
            unloaded = self.closed(daemon, "unloaded", "dense", at_once=1, rounds=8)
        self.choose_targets(unloaded)
        available = {name.removeprefix("TIER_").lower() for name in unloaded["server"]["info"]["sparsity"]["available_tiers"]}
        tiers = [tier for tier in options.tiers.split(",") if tier in available]
        say(f"{unloaded['model_id']}, {unloaded['server']['info']['backend']}; first token within {self.ttft_ms:g} ms, p99 between "
            f"tokens within {self.itl_ms:g} ms, steps within {STEP_SHARE * self.itl_ms:g} ms; load average {os.getloadavg()[0]:.1f}")
        for batch in (int(n) for n in options.batches.split(",")):
            limits = ["--scheduler-max-batch", batch, "--scheduler-inter-token-target-ms", STEP_SHARE * self.itl_ms]
            with Daemon(options.bin, self.folder, options.model, [*flags, *limits]) as daemon:
                for tier in tiers:
                    self.search(daemon, f"{tier}, batch {batch}", tier, batch)


def screenshot(page, image, height):
    """False where there is no chromium."""
    if not shutil.which("chromium"):
        return False
    subprocess.run(["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                    "--disable-background-networking", "--hide-scrollbars", f"--user-data-dir={image.parent / 'chromium'}",
                    "--virtual-time-budget=4000", f"--screenshot={image}", f"--window-size=1160,{height}", page.as_uri()],
                   check=True, capture_output=True, timeout=120)
    return True


def main():
    parser = argparse.ArgumentParser(prog="./run loadtest", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "deploy/models/opt-8m-books"), help="a directory, or synthetic:NAME")
    parser.add_argument("--tiers", default="dense,exact,balanced", help="those that the model has of them are measured")
    parser.add_argument("--batches", help="batch caps; default 16,4, with --quick 16")
    parser.add_argument("--seconds", type=float, help="of each run; default 5, with --quick 2")
    parser.add_argument("--prompt-tokens", default="uniform:8:64")
    parser.add_argument("--output-tokens", default="32")
    parser.add_argument("--ttft-ms", type=float, help="objective; default: ten times that of a request that is alone, or 500")
    parser.add_argument("--itl-ms", type=float, help="objective; default: four times the same, or 50")
    parser.add_argument("--quick", action="store_true", help="fewer rates, shorter runs, one batch cap")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "build/loadtest", help="folder (default build/loadtest)")
    parser.add_argument("--bin", type=pathlib.Path, default=ROOT / "build/release/bin", help=argparse.SUPPRESS)
    parser.add_argument("daemon_flags", nargs="*", metavar="-- FLAG", help="more flags of dejavud")
    options = parser.parse_args()
    options.batches = options.batches or ("16" if options.quick else "16,4")
    options.seconds = options.seconds or (2 if options.quick else 5)

    folder = options.output.resolve() / pathlib.Path(options.model).name.replace(":", "-")
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    sweep = Sweep(options, folder)
    with awake_cpus(sweep.cpus):
        sweep.all()
    results, page = folder / "results.json", folder / "page.html"
    results.write_text(json.dumps(sweep.results))
    table = subprocess.run([options.bin / "dejavu-loadtest", "report", "--markdown", "--html", page, results], check=True,
                           capture_output=True, text=True).stdout
    (folder / "table.md").write_text(table)
    print(table, end="")
    say(f"{len(sweep.results)} runs in {time.monotonic() - begin:.0f} s; {results}, {page}" +
        (f", {folder / 'page.png'}" if screenshot(page, folder / "page.png", 1400) else ""))


if __name__ == "__main__":
    main()
