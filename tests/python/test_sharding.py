"""A daemon whose ranks are processes of mpirun: what clients and operators see when one of them is lost."""
import os
import pathlib
import signal
import subprocess
import threading
import time

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from conftest import BIN, MODEL, MPI_ENVIRONMENT, PATIENCE_S, mpirun

STREAMS = 8
LIMIT_S = 5  # for clients to have their status and for all processes to be gone


def run_group(processes, *flags):
    return subprocess.run([*mpirun(processes), BIN / "dejavud", "--listen", "127.0.0.1:0", "--metrics-listen", "", *flags], capture_output=True,
                          text=True, timeout=PATIENCE_S, env={**os.environ, **MPI_ENVIRONMENT})


def alive(pid):
    """Zombies are gone: only their parent has not looked yet."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


class Load:
    """Long streams, each read by a thread, all of which have tokens."""

    def __init__(self, daemon):
        self.errors, self.ended = [], []
        self.tokens = threading.Semaphore(0)
        self.threads = [threading.Thread(target=self._read, args=(daemon,), daemon=True) for _ in range(STREAMS)]
        for thread in self.threads:
            thread.start()
        for _ in range(20 * STREAMS):
            assert self.tokens.acquire(timeout=PATIENCE_S)

    def _read(self, daemon):
        try:
            # No deadline: so many tokens would be refused for one.
            for _ in daemon.stub.GenerateStream(daemon.request([2, 100, 200], 1900)):
                self.tokens.release()
        except grpc.RpcError as error:
            self.errors.append(error)
        self.ended.append(time.monotonic())

    def wait(self):
        for thread in self.threads:
            thread.join(PATIENCE_S)


def lose(daemon, rank, number):
    """Sends the signal under load. When all is over: the clients' errors, how long it took, and the exit code."""
    pids = [daemon.pid(rank) for rank in range(daemon.processes)]
    load = Load(daemon)
    start = time.monotonic()
    os.kill(pids[rank], number)
    load.wait()
    code = daemon.wait()
    deadline = time.monotonic() + PATIENCE_S
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, daemon.log()
        time.sleep(0.01)
    return load.errors, max(load.ended) - start, time.monotonic() - start, code


@pytest.mark.parametrize("rank, number", [(1, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGKILL)],
                         ids=["follower-killed", "follower-stopped", "rank-0-killed"])
def test_a_lost_rank_ends_the_group(start, rank, number):
    # Slow: no stream ends by itself. Of the limit, mpirun takes a second for what does not end at once.
    daemon = start("--sparsity-default-tier", "dense", "--peer-timeout-s", "2", model="synthetic:opt-125m", processes=2)
    errors, told_s, gone_s, code = lose(daemon, rank, number)
    assert len(errors) == STREAMS
    assert {error.code() for error in errors} == {grpc.StatusCode.UNAVAILABLE}, daemon.log()
    assert told_s < LIMIT_S and gone_s < LIMIT_S, (told_s, gone_s, daemon.log())
    assert code != 0
    if number == signal.SIGSTOP:  # nobody but our own code notices
        assert code == 3, daemon.log()
        assert "waited for rank 1" in daemon.log()
        for error in errors:
            details = rpc_status.from_call(error).details
            assert any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in details), error


def test_an_idle_group_notices_a_stopped_rank(start):
    daemon = start(processes=3)
    daemon.signal(signal.SIGSTOP, rank=2)
    assert daemon.wait() == 3, daemon.log()
    assert "waited for rank 2" in daemon.log(), daemon.log()


def test_a_group_drains_and_leaves_in_good_order(start):
    daemon = start(processes=3)
    stream = daemon.stub.GenerateStream(daemon.request([2, 100, 200], 200), timeout=PATIENCE_S)
    tokens = len(next(stream).token_ids)
    daemon.signal(signal.SIGTERM, rank=1)  # as mpirun does with all of them
    daemon.terminate()
    assert tokens + sum(len(chunk.token_ids) for chunk in stream) == 200
    assert daemon.wait() == 0, daemon.log()


def test_ranks_that_disagree_do_not_start():
    done = run_group(2, "--model", str(MODEL), "--tensor-parallel", "3")
    assert done.returncode == 1 and "mpirun started 2 processes" in done.stderr, done.stderr
    done = run_group(2, "--model", "/nowhere")
    assert done.returncode == 1 and "/nowhere" in done.stderr, done.stderr
