"""`tierwise up` leaves nothing behind: no process, no file outside its folder."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import tierwise


def test_interrupting_up_stops_every_process(tmp_path: Path) -> None:
    up = subprocess.Popen(
        [sys.executable, "-m", "tierwise.cli", "up", "--nodes", "1f,1e", "--policy", "ect"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert up.stderr is not None
    for line in up.stderr:
        if "Ctrl-C" in line:
            break
    children = psutil.Process(up.pid).children(recursive=True)
    assert len(children) >= 3
    up.send_signal(signal.SIGINT)
    up.stderr.read()
    assert up.wait(20) == 0
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []
    assert [path.name for path in tmp_path.iterdir()] == [".tierwise"]


def test_a_killed_up_takes_its_processes_along(tmp_path: Path) -> None:
    up = subprocess.Popen(
        [sys.executable, "-m", "tierwise.cli", "up", "--nodes", "1e", "--policy", "ect"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert up.stderr is not None
    for line in up.stderr:
        if "Ctrl-C" in line:
            break
    children = psutil.Process(up.pid).children(recursive=True)
    up.kill()
    up.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


def test_a_second_cluster_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with (
        tierwise.LocalCluster(tmp_path, "1e", policy="ect", emulate=False),
        pytest.raises(tierwise.TierwiseError, match="already"),
    ):
        tierwise.LocalCluster(tmp_path, "1e", policy="ect").start()


def test_a_cluster_started_again_keeps_its_identities_and_functions(tmp_path: Path) -> None:
    app = tierwise.App("again")

    @app.function(memory="64MiB")
    def double(x: int) -> int:
        return 2 * x

    for _ in range(2):
        cluster = tierwise.LocalCluster(tmp_path, "1e", policy="ect", emulate=False)
        with cluster, tierwise.Client(cluster.context) as client:
            if "double" not in app.functions or app.functions["double"] is not double:
                raise AssertionError
            app.use(client)
            if (tmp_path / "seen").exists():
                assert client.function("double").remote(4) == 8
            else:
                assert double.remote(4) == 8
                (tmp_path / "seen").touch()
