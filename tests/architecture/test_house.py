"""The house: packages come from this checkout, the agent stays light, files stay readable."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("tierwise", "agent", "scheduler", "envs", "training")
HEAVY = ("torch", "stable_baselines3", "sb3_contrib", "gymnasium", "sklearn", "flwr", "pandas")
NOT_ON_A_NODE = (*HEAVY, "sqlalchemy", "cryptography", "scheduler", "envs", "training")


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_is_that_of_this_checkout(name: str) -> None:
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin) == ROOT / name / "__init__.py"


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules that a clean interpreter has loaded after a statement."""
    code = f"{statement}; import sys; print(' '.join({{m.partition('.')[0] for m in sys.modules}}))"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(ran.stdout.split())


def test_the_agent_loads_nothing_heavy() -> None:
    assert not loaded_by("import agent.daemon") & set(NOT_ON_A_NODE)


def test_the_sdk_loads_nothing_heavy_and_no_daemon() -> None:
    assert not loaded_by("import tierwise; tierwise.App") & {*HEAVY, "sqlalchemy", "agent"}


def test_the_scheduler_loads_no_learning_framework() -> None:
    assert not loaded_by("import scheduler.daemon") & {*HEAVY, "agent", "envs"}


def test_the_runtime_needs_no_grpc() -> None:
    assert not loaded_by("import agent.runtime.runtime") & {"grpc", *HEAVY}


def test_protos_and_examples_keep_to_their_rooms() -> None:
    assert not list((ROOT / "protos").rglob("*.py"))
    for path in (ROOT / "examples").glob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if words[:1] in (["from"], ["import"]):
                assert words[1].partition(".")[0] not in {"agent", "scheduler", "envs", "training"}


def test_no_file_of_ours_has_grown_beyond_reading() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if "v1" not in path.parts and (count := len(path.read_bytes().splitlines())) > 600
    }
    assert not long, f"split these: {long}"
