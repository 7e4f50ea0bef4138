"""The systems as processes of their own, and the memory's bandwidth. What is opened here is a `Session`: `measure` returns ms
and what they are made of, raises `Failed` with the reason, or `TookTooLong`, after which its process is gone."""
import contextlib
import hashlib
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "tests/compare/requirements.txt"
PEER = ROOT / "tests/compare/peer.py"
EMBEDDED = ROOT / "deploy/models/opt-8m-books"
PROMPT_TOKENS, PREFILL_TOKENS = 64, 512
REPEATS = 2       # of what is measured in one go
SAMPLE_S = 20     # a generation is cut short after so long
PROBE_AGE_S = 2   # the probe after a measurement is also the one before the next
SETTLE_S = 0.3    # in which a peer's threads stop spinning for more work, which would disturb the next probe


class Failed(Exception):
    pass


class TookTooLong(Exception):
    pass


class Machine:
    """The CPUs that everybody gets, and programs on them."""

    def __init__(self, bin_folder, work, threads):
        self.bench, self.work, self.threads = bin_folder / "dejavu-bench", work, threads
        self.cpus = sorted(os.sched_getaffinity(0))[:threads]
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
                            "OMP_PROC_BIND": "true", "OMP_PLACES": "cores", "HF_HUB_OFFLINE": "1",
                            "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
        self.probed_s, self.gb_per_s = -PROBE_AGE_S, None

    def options(self):
        return {"env": self.environment, "preexec_fn": lambda: os.sched_setaffinity(0, self.cpus)}

    def run_bench(self, *arguments, timeout_s=None):
        """What dejavu-bench writes with --json."""
        report = self.work / "bench.json"
        command = [self.bench, *arguments, "--threads", self.threads, "--json", report]
        try:
            done = subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                  errors="replace", timeout=timeout_s, **self.options())
        except subprocess.TimeoutExpired:
            raise TookTooLong from None
        if done.returncode != 0:
            raise Failed(last_line(done.stderr) or f"exit code {done.returncode}")
        return json.loads(report.read_text())

    def bandwidth(self, fresh):
        """GB/s now; unless `fresh`, or what was probed a moment ago."""
        if fresh or time.monotonic() - self.probed_s > PROBE_AGE_S:
            self.gb_per_s = self.run_bench("bandwidth", "--repeats", 7, "--buffer-mib", 512)["read_gb_per_s"]
            self.probed_s = time.monotonic()
        return self.gb_per_s

    def write_checkpoint(self, model):
        """The checkpoint that everybody reads. Written once: its name is the last thing that it gets."""
        target = self.work / model.replace(":", "-")
        if not target.exists():
            aside = self.work / (target.name + ".tmp")
            shutil.rmtree(aside, ignore_errors=True)
            command = [self.bench, "checkpoint", "--model", model, "--dtype", "bf16", "--out", aside]
            subprocess.run(list(map(str, command)), check=True, **self.options())
            aside.rename(target)
        return target


class Bench:
    """Ours. Each measurement is a process: it loads the model itself."""

    def __init__(self, machine, model, line, tokens, version):
        self.machine, self.line, self.tokens = machine, line, tokens
        self.version, self.notes = version, []
        self.model = ["--model", model, "--dtype", "stored" if line.model == "embedded" else line.dtype]

    def measure(self, cell, timeout_s):
        if cell.phase == "prefill":
            report = self.machine.run_bench("prefill", *self.model, "--tokens", PREFILL_TOKENS, "--repeats", REPEATS,
                                            timeout_s=timeout_s)
            return {"ms": report["rows"][0]["ms"], "samples_ms": report["rows"][0]["samples_ms"], "notes": []}
        # Some steps around the middle of the peers' tokens. Sampling counts, since the peers' steps hold it too.
        steps = min(self.tokens - 1, 16 if cell.batch < 16 else 8)
        report = self.machine.run_bench("decode", *self.model, "--tier", self.line.tier, "--batch", cell.batch, "--context",
                                        PROMPT_TOKENS + (self.tokens - steps) // 2, "--steps", steps, "--repeats", REPEATS,
                                        timeout_s=timeout_s)
        row = next(row for row in report["rows"] if row["tier"] == self.line.tier)
        sampling_ms = row["breakdown_ms"]["sampling"]
        return {"ms": row["ms_per_step"] + sampling_ms, "samples_ms": [ms + sampling_ms for ms in row["samples_ms"]],
                "notes": []}

    def close(self):
        pass


class Peer:
    """peer.py with a model loaded."""

    def __init__(self, machine, line, checkpoint, work, tokens, timeout_s):
        self.tokens, self.buffer = tokens, b""
        self.log = work / f"{line.system}-{line.dtype}.log"
        command = [sys.executable, PEER, "serve", line.system, line.dtype, checkpoint, work, machine.threads]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                                            bufsize=0, **machine.options())
        hello = self._answer(timeout_s)
        self.version, self.notes = hello["version"], hello["notes"]

    def measure(self, cell, timeout_s):
        request = {"phase": cell.phase, "batch": cell.batch, "tokens": self.tokens, "repeats": REPEATS, "limit_s": SAMPLE_S,
                   "prompt": PREFILL_TOKENS if cell.phase == "prefill" else PROMPT_TOKENS}
        with contextlib.suppress(BrokenPipeError):  # it is gone, and the answer says why
            self.process.stdin.write((json.dumps(request) + "\n").encode())
        reply = self._answer(timeout_s)
        if "error" in reply:
            raise Failed(reply["error"])
        return reply

    def _answer(self, timeout_s):
        until = time.monotonic() + timeout_s
        out = self.process.stdout.fileno()
        while b"\n" not in self.buffer:
            if not select.select([out], [], [], max(0.0, until - time.monotonic()))[0]:
                self.close()
                raise TookTooLong
            read = os.read(out, 1 << 16)
            if not read:
                code = self.process.wait()
                raise Failed(last_line(self.log.read_text(errors="replace")) or f"exit code {code}")
            self.buffer += read
        line, _, self.buffer = self.buffer.partition(b"\n")
        time.sleep(SETTLE_S)
        return json.loads(line)

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def last_line(text):
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def prepare_peer(machine, line, checkpoint, work):
    """Converts the checkpoint for a peer, once for each list of requirements. Failed where the peer cannot run here."""
    work.mkdir(parents=True, exist_ok=True)
    stamp, versions = work / f"{line.system}-{line.dtype}.ready", REQUIREMENTS.read_text()
    if stamp.exists() and stamp.read_text() == versions:
        return
    print(f"preparing {line.system} {line.dtype}", file=sys.stderr, flush=True)
    command = [sys.executable, PEER, "prepare", line.system, line.dtype, checkpoint, work]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                          errors="replace", **machine.options())
    if done.returncode != 0:
        raise Failed(last_line(done.stderr) or f"exit code {done.returncode}")
    stamp.write_text(versions)


def git(*arguments):
    return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True).stdout.strip()


def tree():
    """The version of our tree; "-dirty" where something that can matter here is not committed."""
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs", ":!*.md")
    return (git("describe", "--always") or "?") + ("-dirty" if changed else "")


def digest(*paths):
    text = hashlib.sha256()
    for path in paths:
        text.update(path.read_bytes())
    return text.hexdigest()[:16]


def processor():
    """Its name, and those of its instruction sets that matter here."""
    name, flags = "unknown processor", []
    wanted = ("avx2", "fma", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "i8mm",
              "bf16", "sve")
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name":
            name = value
        elif key in ("flags", "Features"):
            flags = [flag for flag in wanted if flag in value.split()]
    return name, flags
