"""The daemon as its users meet it: the real binary, started as a process, and a real Python client (grpcio).

DEJAVU_BIN names the folder with dejavud and dejavu-cli. With DEJAVU_PROCESSES every daemon is so many processes of
mpirun. Stubs are generated from proto/ into a temporary folder.
"""
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_tools import protoc

pytest.register_assert_rewrite("every_protocol", "groups", "speakers")

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(os.environ["DEJAVU_BIN"])
MODEL = ROOT / "deploy/models/opt-8m-books"
PARITY = ROOT / "tests/testdata/opt"
# Bounds a hang; nothing is asserted about how long a step takes.
PATIENCE_S = 120
PROCESSES = int(os.environ.get("DEJAVU_PROCESSES", "1"))
MPI_ENVIRONMENT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def mpirun(processes):
    return ["mpirun", "-n", str(processes), "--oversubscribe"] if processes > 1 else []


def compile_protos(out, *files):
    """The modules of these files of proto/ can be imported from now on. `out`: a folder for them."""
    assert protoc.main(["protoc", f"-I{ROOT / 'proto'}", f"--python_out={out}", f"--grpc_python_out={out}", *files]) == 0
    sys.path.insert(0, str(out))


def generate_api(out):
    """The generated modules: api.pb (messages) and api.rpc (stubs), and those of AdminService. `out`: a folder for their files."""
    compile_protos(out, "dejavu/v1/generation.proto", "dejavu/v1/admin.proto")
    from dejavu.v1 import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc

    class Api:
        pb = generation_pb2
        rpc = generation_pb2_grpc
        admin_pb = admin_pb2
        admin_rpc = admin_pb2_grpc

    return Api


@pytest.fixture(scope="session")
def api(tmp_path_factory):
    return generate_api(tmp_path_factory.mktemp("stubs"))


# How many steps a text takes, and how many tokens come at once, must not hang on how quick the machine is. What the default
# does is in test_speculation.py.
SPECULATION = {"DEJAVUD_SPECULATION_MODE": "off"}


class Daemon:
    def __init__(self, api, folder, *flags, model=MODEL, wait=True, environment=None, processes=PROCESSES,
                 connect=grpc.insecure_channel, listen="127.0.0.1:0", prefix=()):
        """`prefix`: a command that runs the daemon, such as prlimit."""
        self.processes = processes
        self.api = api
        self.log_path = folder / "dejavud.log"
        port_file = folder / "port"
        port_file.unlink(missing_ok=True)
        self.metrics_port_file = folder / "metrics_port"
        self.metrics_port_file.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [*mpirun(processes), *prefix, BIN / "dejavud", "--model", model, "--listen", listen, "--port-file", port_file,
             "--metrics-listen", "127.0.0.1:0", "--metrics-port-file", self.metrics_port_file, *flags],
            stderr=open(self.log_path, "wb"), stdout=subprocess.DEVNULL,
            env={**SPECULATION, **os.environ, **MPI_ENVIRONMENT, **(environment or {})})
        self._await(lambda: port_file.exists())
        self.address = f"127.0.0.1:{int(port_file.read_text())}"
        self.channel = connect(self.address)
        self.stub = api.rpc.GenerationServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)
        if wait:
            self.wait_until_serving()

    def _await(self, condition):
        """For what gives no signal: a file. Bounded, and ends at once when the daemon has died."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.01)

    @property
    def metrics_address(self):
        return f"127.0.0.1:{int(self.metrics_port_file.read_text())}"

    def log(self):
        return self.log_path.read_text(errors="replace")

    def wait_until_serving(self):
        for reply in self.health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S):
            if reply.status == health_pb2.HealthCheckResponse.SERVING:
                return
        raise AssertionError(self.log())

    def request(self, ids, max_new_tokens, **fields):
        request = self.api.pb.GenerateRequest(**fields)
        request.token_ids.ids.extend(ids)
        request.stopping.max_new_tokens = max_new_tokens
        request.stopping.ignore_eos = True
        return request

    def load(self):
        return self.stub.GetServerInfo(self.api.pb.GetServerInfoRequest(), timeout=PATIENCE_S).load

    def expect_idle(self):
        """Nothing runs, nothing waits, every block is free. An RPC may end a moment before its memory is accounted for."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            load = self.load()
            if (load.running_requests, load.waiting_requests, load.kv_blocks_free) == (0, 0, load.kv_blocks_total):
                return
            assert time.monotonic() < deadline, load
            time.sleep(0.01)

    def pid(self, rank=0):
        """Of the process that is that rank."""
        if self.processes == 1:
            return self.process.pid
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        wanted = f"OMPI_COMM_WORLD_RANK={rank}".encode()
        return next(int(pid) for pid in children
                    if wanted in pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))

    def signal(self, number, rank=0):
        os.kill(self.pid(rank), number)

    def terminate(self):
        self.signal(signal.SIGTERM)

    def wait(self):
        return self.process.wait(timeout=PATIENCE_S)

    def stop(self):
        self.channel.close()
        if self.process.poll() is None:
            try:
                with contextlib.suppress(StopIteration, FileNotFoundError):  # its rank has gone, mpirun not yet
                    self.terminate()
                self.wait()
            finally:
                self.process.kill()


def run_daemon(*args, wrap=()):
    """A start that is to fail: its end. `wrap`: a command that runs it."""
    listen = [] if "--listen" in args else ["--listen", "127.0.0.1:0"]
    return subprocess.run([*wrap, BIN / "dejavud", "--model", MODEL, *listen, "--metrics-listen", "", *args],
                          capture_output=True, text=True, timeout=PATIENCE_S)


def until(condition):
    """For what tells nobody, such as a file that is looked at now and then. Bounded."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def metric(daemon, name):
    """Its first series, as a scrape has it now."""
    with urllib.request.urlopen(f"http://{daemon.metrics_address}/metrics", timeout=PATIENCE_S) as page:
        return next(float(line.split()[-1]) for line in page.read().decode().splitlines() if line.startswith(name + "{"))


@pytest.fixture(scope="session")
def daemon(api, tmp_path_factory):
    """One daemon with the embedded model, shared by the tests that leave it as they found it."""
    daemon = Daemon(api, tmp_path_factory.mktemp("daemon"))
    yield daemon
    daemon.stop()
    assert daemon.process.returncode == 0, daemon.log()


@pytest.fixture(scope="session")
def braked(api, tmp_path_factory):
    """A daemon whose steps take 10 ms: a stream of 500 tokens does not end by itself before a test has done its part."""
    daemon = Daemon(api, tmp_path_factory.mktemp("braked"), "--scheduler-fault", "slow@10", "--scheduler-deadline-slack", "0")
    yield daemon
    daemon.stop()
    assert daemon.process.returncode == 0, daemon.log()


@pytest.fixture
def start(api, tmp_path):
    """Starts daemons of a test's own and stops them after it."""
    started = []

    def start_one(*flags, **options):
        started.append(Daemon(api, tmp_path, *flags, **options))
        return started[-1]

    yield start_one
    for daemon in started:
        daemon.stop()
