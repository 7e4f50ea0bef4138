"""deploy/fetch-model.sh against a server of files."""
import hashlib
import http.server
import re
import subprocess
import threading

import pytest

from conftest import MODEL, PATIENCE_S
from manifests import FETCH, KUBERNETES


def test_the_demo_model_is_what_the_manifests_say():
    listed = dict(reversed(line.split("  ")) for line in (KUBERNETES / "base/SHA256SUMS").read_text().splitlines())
    assert listed == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in MODEL.iterdir()}


class Files(http.server.BaseHTTPRequestHandler):
    """Serves `content` (name to bytes), ranges too, and notes what was asked for."""
    content = {}
    ranges = True
    asked = []

    def do_GET(self):
        Files.asked.append((self.path, self.headers.get("Range")))
        data = Files.content.get(self.path.rsplit("/", 1)[1])
        if data is None:
            self.send_error(404)
            return
        first = 0
        if Files.ranges and "Range" in self.headers:
            first = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
            if first >= len(data):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        self.wfile.write(data[first:])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def source(tmp_path):
    """(URL, SHA256SUMS, run): a server of two files, and the script run against it."""
    Files.content = {"config.json": b"{}\n", "model.safetensors": bytes(range(256)) * 512}
    Files.ranges, Files.asked = True, []
    sums = tmp_path / "sums"
    lines = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in Files.content.items()]
    sums.write_text("# two files\n" + "".join(lines))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/models/tiny"

    def run(folder, list_of_files=sums, from_url=url):
        return subprocess.run(["sh", FETCH, from_url, list_of_files, folder], capture_output=True, text=True, timeout=PATIENCE_S)

    yield sums, run
    server.shutdown()
    thread.join()
    server.server_close()


def complete(folder, sums):
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {**Files.content, "SHA256SUMS": sums.read_bytes()}
    assert not folder.with_name(folder.name + ".partial").exists()


def test_fetches_once(source, tmp_path):
    sums, run = source
    folder = tmp_path / "model"
    assert run(folder).returncode == 0
    complete(folder, sums)
    asked = len(Files.asked)
    again = run(folder)
    assert (again.returncode, len(Files.asked)) == (0, asked) and "complete" in again.stderr
    other = tmp_path / "other"
    other.write_text(sums.read_text().replace("# two", "# 2"))
    refused = run(folder, list_of_files=other)
    assert refused.returncode == 1 and "holds something else" in refused.stderr


def test_what_is_corrupt_is_not_kept(source, tmp_path):
    sums, run = source
    right, folder = Files.content["model.safetensors"], tmp_path / "model"
    Files.content["model.safetensors"] = right[:-1] + b"x"
    refused = run(folder)
    assert refused.returncode == 1 and "model.safetensors is not what" in refused.stderr
    assert not folder.exists() and not (tmp_path / "model.partial/model.safetensors").exists()
    Files.content["model.safetensors"] = right
    assert run(folder).returncode == 0
    complete(folder, sums)
    # The file that was right the first time is not fetched again.
    assert [path for path, _ in Files.asked].count("/models/tiny/config.json") == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_goes_on_where_it_stopped(source, tmp_path, ranges):
    sums, run = source
    Files.ranges = ranges
    partial = tmp_path / "model.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(Files.content["model.safetensors"][:1000])
    (partial / "of-an-earlier-list").write_text("x")
    assert run(tmp_path / "model").returncode == 0
    complete(tmp_path / "model", sums)
    asked = [at for path, at in Files.asked if path.endswith("model.safetensors")]
    assert asked == (["bytes=1000-"] if ranges else ["bytes=1000-", None])


def test_a_part_that_is_wrong_is_fetched_anew(source, tmp_path):
    """As long as the file and not the file: there is nothing to go on with."""
    sums, run = source
    partial = tmp_path / "model.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(bytes(len(Files.content["model.safetensors"])))
    assert run(tmp_path / "model").returncode == 0
    complete(tmp_path / "model", sums)


@pytest.mark.parametrize("line,message", [
    ("", "names no file"), ("abc  model.safetensors", "not a line"), ("0" * 64 + "  ../model.safetensors", "not a line"),
    ("0" * 64 + "  .hidden", "not a line"), ("0" * 64 + "  missing", "could not be fetched"),
    ("0" * 64 + "  SHA256SUMS", "names itself")])
def test_lists_that_cannot_be_followed(source, tmp_path, line, message):
    _, run = source
    wrong = tmp_path / "wrong"
    wrong.write_text(f"# a list\n{line}\n")
    refused = run(tmp_path / "model", list_of_files=wrong)
    assert refused.returncode == 1 and message in refused.stderr
    assert not (tmp_path / "model").exists() and not (tmp_path / "hidden").exists()
    usage = subprocess.run(["sh", FETCH, "x"], capture_output=True, timeout=PATIENCE_S)
    assert usage.returncode == 2


def test_takes_the_demo_model_from_a_folder(source, tmp_path):
    """As the Job of the cpu overlay does."""
    _, run = source
    assert run(tmp_path / "model", list_of_files=KUBERNETES / "base/SHA256SUMS", from_url=f"file://{MODEL}").returncode == 0
    assert {path.name for path in MODEL.iterdir()} | {"SHA256SUMS"} == {path.name for path in (tmp_path / "model").iterdir()}
