"""A Kubernetes API server that knows pods alone: what a client hears that lists and watches them."""
import contextlib
import http.server
import json
import threading

LABELS = {"app.kubernetes.io/name": "dejavud", "app.kubernetes.io/component": "server"}


def pod(name, address, ready=True):
    return {"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "default", "uid": name, "resourceVersion": "1", "labels": LABELS},
            "spec": {"containers": [{"name": "dejavud"}]},
            "status": {"phase": "Running", "podIP": address, "conditions": [{"type": "Ready", "status": str(ready)}]}}


class PodList:
    """`asked`: the paths of requests so far."""

    def __init__(self, *pods):
        self._changed = threading.Condition()
        self._pods, self._ended = {each["metadata"]["name"]: each for each in pods}, False
        self.asked = []
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def set(self, *pods):
        with self._changed:
            self._pods = {each["metadata"]["name"]: each for each in pods}
            self._changed.notify_all()

    def close(self):
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    def kubeconfig(self, folder):
        """A file that leads clients here."""
        file = folder / "kubeconfig"
        cluster = {"server": f"http://127.0.0.1:{self._server.server_address[1]}"}
        file.write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "it", "clusters": [{"name": "it", "cluster": cluster}],
            "users": [{"name": "it", "user": {}}], "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it", "namespace": "default"}}]}))
        return file

    def _handler(self):
        pods = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                pods.asked.append(self.path)
                with contextlib.suppress(OSError):
                    self._watch() if "watch=" in self.path else self._list()

            def _list(self):
                with pods._changed:
                    items = list(pods._pods.values())
                body = json.dumps({"apiVersion": "v1", "kind": "PodList", "metadata": {"resourceVersion": "1"}, "items": items}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _watch(self):
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                seen = {}  # all are told again, so that none that came after the list is missed
                while not pods._ended:
                    with pods._changed:
                        pods._changed.wait_for(lambda: pods._ended or pods._pods != seen)
                        now = dict(pods._pods)
                    for name in seen.keys() | now.keys():
                        if seen.get(name) != now.get(name):
                            kind = "DELETED" if name not in now else "MODIFIED" if name in seen else "ADDED"
                            line = json.dumps({"type": kind, "object": now.get(name) or seen[name]}).encode() + b"\n"
                            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                    seen = now

            def log_message(self, *_):
                pass

        return Handler
