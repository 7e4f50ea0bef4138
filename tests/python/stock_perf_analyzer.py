"""perf_analyzer of PyPI over KServe's protocol. Run by ./run protocols, where PERF_ANALYZER is its command line or it is on PATH: it needs
glibc 2.38, which Debian 12 does not have."""
import json
import os
import shlex
import shutil
import subprocess

import pytest

from conftest import PATIENCE_S

COMMAND = shlex.split(os.environ.get("PERF_ANALYZER", "perf_analyzer"))


@pytest.mark.skipif(shutil.which(COMMAND[0]) is None, reason="perf_analyzer is not on PATH, and PERF_ANALYZER does not name it")
def test_it_measures_streams(daemon, tmp_path):
    sampling = json.dumps({"temperature": 0, "max_tokens": 16, "ignore_eos": True})
    data, profile = tmp_path / "requests.json", tmp_path / "profile.json"
    data.write_text(json.dumps({"data": [{"text_input": ["It was a dark night, and"], "stream": [True], "sampling_parameters": [sampling]}]}))
    model = daemon.stub.GetModelInfo(daemon.api.pb.GetModelInfoRequest()).model
    done = subprocess.run([*COMMAND, "-m", model, "-i", "grpc", "-u", daemon.address, "--async", "--streaming", "--input-data", data, "--concurrency-range",
                           "2", "--request-count", "20", "--stability-percentage", "999", "--profile-export-file", profile],
                          capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    (experiment,) = json.loads(profile.read_text())["experiments"]
    assert len(experiment["requests"]) >= 20 and all(request["response_timestamps"] for request in experiment["requests"])
    daemon.expect_idle()
