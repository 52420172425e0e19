"""Control groups of both versions, on real folders: what is in one ends with it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.runtime import cgroups
from agent.runtime.cgroups import Hierarchy, Limits, Parent

LIMITS = Limits(memory_bytes=64 << 20, pids_max=8, cpus=0.5)
NAME = f"{cgroups.PREFIX}{os.getpid()}-unit"


def version_2() -> list[Hierarchy]:
    """Return the tree of version 2 without controllers: version 1 may have them all."""
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        left, right = line.split(" - ")
        point = left.split()[4]
        if right.startswith("cgroup2 ") and os.access(point, os.W_OK):
            return [Hierarchy(2, point, ())]
    return []


TREES = {"found here": cgroups.find(), "version 2": version_2()}


@pytest.fixture(params=TREES)
def trees(request: pytest.FixtureRequest) -> list[Hierarchy]:
    found = TREES[request.param]
    if not found:
        pytest.skip(f"no control group of this kind is writable here: {request.param}")
    return found


@pytest.fixture
def parent(trees: list[Hierarchy]) -> Iterator[Parent]:
    opened = Parent.open(NAME, trees)
    try:
        yield opened
    finally:
        opened.close()


def sleeper_in(group: cgroups.Group) -> subprocess.Popen[bytes]:
    """Return a process that has joined the group and sleeps."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
        preexec_fn=group.join,
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def folders(trees: list[Hierarchy]) -> list[Path]:
    return [path for tree in trees for path in Path(tree.folder).glob(f"{NAME}/*/")]


def test_what_is_in_a_group_ends_with_it(parent: Parent, trees: list[Hierarchy]) -> None:
    group = parent.make("one", LIMITS)
    sleepers = [sleeper_in(group) for _ in range(3)]
    assert len(folders(trees)) == len(trees)
    group.destroy()
    assert [process.wait(5) for process in sleepers] == [-9] * 3
    assert not folders(trees)


def test_what_a_dead_zygote_left_is_swept(parent: Parent, trees: list[Hierarchy]) -> None:
    sleeper = sleeper_in(parent.make("one", LIMITS))
    assert cgroups.sweep(NAME, trees) == 0
    assert sleeper.wait(5) == -9
    assert not any(Path(tree.folder, NAME).exists() for tree in trees)


def test_limits_are_those_that_were_asked_for() -> None:
    trees = TREES["found here"]
    if not trees:
        pytest.skip("no control group is writable here")
    parent = Parent.open(NAME, trees)
    group = parent.make("one", LIMITS)
    try:
        found = {
            path.name: path.read_text(encoding="ascii").strip()
            for folder in folders(trees)
            for path in folder.iterdir()
            if path.name in ("memory.limit_in_bytes", "memory.max", "pids.max", "cpu.cfs_quota_us")
        }
    finally:
        group.destroy()
        parent.close()
    assert set(found.values()) >= {str(64 << 20), "8"}
    assert not group.places
