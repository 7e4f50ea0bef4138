"""deploy/proxy before a daemon of this machine. As a program it is what ./run hardening --proxy takes:

    ./run hardening --proxy "build/venv/bin/python tests/python/proxy.py"

It prints where it listens, in plain text, and at its end the most memory and descriptors that HAProxy has had.
"""
import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

SERVE = pathlib.Path(__file__).resolve().parents[2] / "deploy/proxy/serve"
PATIENCE_S = 120


def listener():
    """A port that is ours from now on: HAProxy inherits the socket."""
    return socket.create_server(("127.0.0.1", 0), backlog=1024)


class Proxy:
    """`settings`: as deploy/proxy/serve names them. `tls`: a folder of tls.crt, tls.key and ca.crt; None: plain text."""

    def __init__(self, daemon_address, log_path, tls=None, **settings):
        self.log_path = log_path
        sockets = {name: listener() for name in ("PROXY_LISTEN", "PROXY_HEALTH_LISTEN", "PROXY_METRICS_LISTEN")}
        self.address, self.health_address, self.metrics_address = (f"127.0.0.1:{each.getsockname()[1]}" for each in sockets.values())
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PROXY_")}
        environment |= {name: f"fd@{each.fileno()}" for name, each in sockets.items()}
        environment |= {"PROXY_DAEMON": daemon_address, **{name: str(value) for name, value in settings.items()}}
        environment |= {"PROXY_TLS": str(tls)} if tls else {"PROXY_PLAINTEXT": "yes"}
        self.process = subprocess.Popen([SERVE], env=environment, stdout=subprocess.DEVNULL, stderr=open(log_path, "wb"),
                                        pass_fds=[each.fileno() for each in sockets.values()])
        for each in sockets.values():
            each.close()
        self._until(lambda: "Loading success" in self.log())

    def log(self):
        return pathlib.Path(self.log_path).read_text(errors="replace")

    def _until(self, condition):
        """For what gives no signal. Bounded, and ends at once when HAProxy has ended."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def children(self, pid):
        with contextlib.suppress(OSError):
            return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return []

    def workers(self):
        """Their process ids: the children of HAProxy's master, which is the script's."""
        return [worker for master in self.children(self.process.pid) for worker in self.children(master)]

    def terminate(self):
        self.process.terminate()

    def wait(self):
        return self.process.wait(timeout=PATIENCE_S)

    def stop(self):
        """At once: calls that run are cut off."""
        for pid in (self.process.pid, *self.children(self.process.pid), *self.workers()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()


def main():
    folder = pathlib.Path(os.environ.get("TMPDIR", "/tmp"))
    proxy = Proxy(sys.argv[1], folder / f"proxy-{os.getpid()}.log")
    print(proxy.address, flush=True)
    stop, most = threading.Event(), dict(rss_mib=0, descriptors=0)
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    while not stop.wait(0.05):
        for worker in proxy.workers():
            with contextlib.suppress(OSError, StopIteration):
                status = pathlib.Path(f"/proc/{worker}/status").read_text()
                most["rss_mib"] = max(most["rss_mib"], int(status.split("VmHWM:")[1].split()[0]) // 1024)
                most["descriptors"] = max(most["descriptors"], len(os.listdir(f"/proc/{worker}/fd")))
    proxy.stop()
    os.unlink(proxy.log_path)
    print(f"proxy: at most {most['rss_mib']} MiB, {most['descriptors']} descriptors", file=sys.stderr)


if __name__ == "__main__":
    main()
