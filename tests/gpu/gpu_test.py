#!/usr/bin/env python3
"""Tests dejavud on this machine's GPU. All parts, or those that are named:
  ops        every op of the CUDA backend against the CPU backend
  replay     recorded steps against launched ones, twice, bit by bit
  model      the engine against the goldens, alone and in batches, all tiers
  group      NCCL: a group of one GPU; and of all, where there are more, with their speed, and the engine over them
  daemon     1,000 requests to dejavud --device cuda; then its memory is what it was before
  sanitizer  compute-sanitizer over the ops
Exits with 1 where a part fails, or where there is no GPU."""
import argparse
import collections
import concurrent.futures
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import machine

PARTS = ("ops", "replay", "model", "group", "daemon", "sanitizer")
OPS, REPLAY, GROUP = "*Cuda*:DeviceProbe*", "*Replay*:Launches*", "*Group*"
REQUESTS, WARM_UP, AT_ONCE = 1000, 200, 8
# Beyond the noise of the allocators; a leak of 32 KiB a request would show.
SLACK_MIB = 32
PATIENCE_S = 120


def run_gpu_test(*arguments, before=()):
    subprocess.run([*before, machine.BIN / "gpu_test", "--gtest_brief=1", *arguments], check=True,
                   cwd=machine.ROOT / "tests")


def ops():
    run_gpu_test(f"--gtest_filter={OPS}")


def replay():
    run_gpu_test(f"--gtest_filter={REPLAY}")


def model():
    run_gpu_test(f"--gtest_filter=*-{OPS}:{REPLAY}:{GROUP}")  # whatever is in no other part


def group():
    run_gpu_test(f"--gtest_filter={GROUP}")


def sanitizer():
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not pathlib.Path(tool).exists():
        print("compute-sanitizer is not there: neither on the path nor in /usr/local/cuda/bin. Nothing was checked.")
        return
    # Orders are the emulator's: one of them is enough here.
    for check in ("memcheck", "racecheck"):
        print(check, flush=True)
        run_gpu_test("--gtest_filter=*Cuda*Order0-*AFailureIsNamed*",
                     before=(tool, "--tool", check, "--error-exitcode", "1"))


class Daemon:
    """dejavud on the GPU with the model of the repository, as its users start it; requests by dejavu-cli."""

    def __init__(self, folder):
        self.log, self.port = folder / "log", folder / "port"
        self.process = subprocess.Popen(
            [machine.BIN / "dejavud", "--device", "cuda", "--model", machine.MODEL, "--listen", "127.0.0.1:0",
             "--port-file", self.port, "--scheduler-max-batch", str(AT_ONCE), "--no-sparsity-fallback"],
            stderr=open(self.log, "wb"), stdout=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if not name.startswith("DEJAVUD_")})

    def wait_until_serving(self):
        self.wait_until(self.port.exists)
        self.address = f"127.0.0.1:{int(self.port.read_text())}"
        self.wait_until(lambda: self.run_cli("health").returncode == 0)

    def wait_until(self, condition):
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def run_cli(self, *arguments):
        return subprocess.run([machine.BIN / "dejavu-cli", "--server", self.address, "--wait", str(PATIENCE_S),
                               "--timeout", str(PATIENCE_S), *map(str, arguments)], capture_output=True, text=True)

    def cli(self, *arguments):
        done = self.run_cli(*arguments)
        assert done.returncode == 0, (arguments, done.stderr, self.log.read_text())
        return done.stdout

    def generate(self, number):
        """A request that depends on its number alone, of sixty kinds, each deterministic: (kind, tokens)."""
        tier = ("dense", "exact", "high", "balanced", "fast")[number % 5]
        length, start = 1 + number * 7 % 60, number % 4
        prompt = [2, *(10 + (start * 1000 + i * 37) % 4000 for i in range(length))]
        kind = (tier, length, start, number % 3)
        sampling = ("--temperature", "0.9", "--seed", start) if number % 3 else ()
        answer = self.cli("generate", "--token-ids", ",".join(map(str, prompt)), "--max-new-tokens", 4 + number % 24,
                          "--ignore-eos", "--tier", tier, "--deterministic", "--json", *sampling)
        tokens = json.loads(answer)["token_ids"]
        assert len(tokens) == 4 + number % 24, answer
        return kind, tokens

    def memory_mib(self):
        """(of the GPU, of the host). Of the process where nvidia-smi can tell, else of the whole GPU."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        host = next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))
        done = subprocess.run(["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"],
                              capture_output=True, text=True)
        for line in done.stdout.splitlines():
            pid, _, used = line.partition(",")
            if pid.strip() == str(self.process.pid) and used.strip().isdigit():
                return int(used), host
        return int(machine.query(["memory.used"])["memory.used"].split()[0]), host

    def is_idle(self):
        load = json.loads(self.cli("info", "--json"))["server"]["load"]
        return load["running_requests"] == 0 and load["kv_blocks_free"] == load["kv_blocks_total"]

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=PATIENCE_S)
        finally:
            self.process.kill()


def daemon():
    with tempfile.TemporaryDirectory() as folder:
        server = Daemon(pathlib.Path(folder))
        try:
            server.wait_until_serving()
            with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as clients:
                answers = collections.defaultdict(list)

                def send(numbers):
                    for kind, tokens in clients.map(server.generate, numbers):
                        for other in answers[kind]:  # of another length, perhaps
                            both = min(len(other), len(tokens))
                            assert other[:both] == tokens[:both], (kind, other, tokens)
                        answers[kind].append(tokens)
                    server.wait_until(server.is_idle)

                send(range(WARM_UP))
                before = server.memory_mib()
                start = time.monotonic()
                send(range(WARM_UP, WARM_UP + REQUESTS))
                seconds = time.monotonic() - start
            after = server.memory_mib()
        finally:
            code = server.stop()
        assert code == 0, server.log.read_text()
    again = sum(len(lists) - 1 for lists in answers.values())
    print(f"{REQUESTS} requests in {seconds:.1f} s, {again} of them as one before, with its tokens. MiB of the GPU: "
          f"{before[0]:.0f}, then {after[0]:.0f}; of the host: {before[1]:.0f}, then {after[1]:.0f}.")
    for what, then, now in zip(("GPU", "host"), before, after):
        assert now - then <= SLACK_MIB, f"memory of the {what} grew from {then:.0f} to {now:.0f} MiB"


def main():
    parser = argparse.ArgumentParser(prog="gpu-test", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART")
    parts = parser.parse_args().parts or PARTS

    machine.check_files()
    print(f"commit {machine.commit()}")
    for field, value in machine.query(machine.FACTS).items():
        print(f"{field} {value}")
    # Says what is missing where there is no GPU.
    if subprocess.run([machine.BIN / "gpu_test", "--gtest_list_tests"], stdout=subprocess.DEVNULL).returncode != 0:
        return 1
    failed = []
    for part in parts:
        print(f"\n== {part}", flush=True)
        start = time.monotonic()
        try:
            globals()[part]()
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            print(f"{type(error).__name__}: {error}")
            failed.append(part)
        result = "FAILED" if part in failed else "passed"
        print(f"== {part}: {result} after {time.monotonic() - start:.0f} s", flush=True)
    print(f"\nFAILED: {', '.join(failed)}" if failed else f"\npassed: {', '.join(parts)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
