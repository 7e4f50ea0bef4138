"""How many threads compute is said, and follows what the process may use."""
import os

from conftest import PATIENCE_S


def backend(daemon, api):
    text = daemon.stub.GetServerInfo(api.pb.GetServerInfoRequest(), timeout=PATIENCE_S).backend
    assert text in daemon.log()
    return text


def test_a_mask_of_one_processor_gives_one_thread(api, start):
    cpu = min(os.sched_getaffinity(0))
    reason = "all processors" if os.cpu_count() == 1 else f"affinity, {os.cpu_count()} processors"
    assert backend(start(prefix=("taskset", "-c", str(cpu))), api).endswith(f"1 thread ({reason})")


def test_what_is_configured_is_what_runs(api, start):
    assert backend(start("--threads", "3"), api).endswith("3 threads (as configured)")
