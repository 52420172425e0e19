"""The benchmark of questions beside S3 and Redis runs, small, from end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bench_flstore import missing

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_the_benchmark_runs_and_all_systems_answer_alike(tmp_path: Path) -> None:
    """Without the rivals' environment (make .venv-flstore/stamp) tierwise runs alone."""
    command = [sys.executable, "-m", "benchmarks.bench_flstore", "--quick", "--queries", "10"]
    command += ["--parts", "trace", "aggregation", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "flstore.json").read_text())
    systems = {sample["system"] for sample in found["samples"]}
    assert found["trace"]["answers"]["differing"] == []
    assert all(sample["elapsed_ms"] > 0.0 for sample in found["samples"])
    text = (tmp_path / "flstore.md").read_text()
    assert "tierwise, 10 MB" in text
    if missing():
        assert systems == {"tierwise"}
    else:
        assert {"tierwise", "s3", "redis", "redis over s3 (emulated)"} <= systems
        assert found["trace"]["answers"]["compared"] >= 60
