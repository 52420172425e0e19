"""Environments without an index: from wheels that are there already, with honest failures."""

import asyncio
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from agent.runtime import environments
from agent.runtime.environments import Environments, EnvironmentState
from tierwise.errors import StartFailed


@pytest.fixture(autouse=True)
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)


def put_wheel(folder: Path, name: str, requires_python: str = ">=3") -> None:
    """Write the smallest wheel there is."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": "VALUE = 42\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        f"Requires-Python: {requires_python}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in environments.SHIM_REQUIREMENTS:
        put_wheel(tmp_path / "wheels", name)
    return tmp_path


def states(made: Environments) -> list[EnvironmentState]:
    return [reading.state for reading in made.readings()]


async def test_what_was_fetched_once_is_installed_without_an_index(root: Path) -> None:
    put_wheel(root / "wheels", "tinything")
    made = Environments(root)
    building = asyncio.ensure_future(made.get(("tinything",)))
    await asyncio.sleep(0)
    again, found = await asyncio.gather(made.get(("tinything",)), building)
    assert again == found
    code = "import tinything; print(tinything.VALUE)"
    ran = await asyncio.to_thread(
        subprocess.run, [str(found.python), "-I", "-c", code], capture_output=True, text=True
    )
    assert ran.stdout == "42\n"
    assert states(made) == [EnvironmentState.READY]
    assert not list(root.glob("*.partial"))


async def test_a_failure_is_told_and_remembered_but_not_for_ever(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Environments(root)
    with pytest.raises(StartFailed, match=r"(?s)deploy again.*tinything"):
        await made.get(("tinything",))
    assert states(made) == [EnvironmentState.FAILED]
    assert "tinything" in made.readings()[0].message
    put_wheel(root / "wheels", "tinything")
    with pytest.raises(StartFailed):
        await made.get(("tinything",))
    monkeypatch.setattr(environments, "FAILURE_KEPT_S", 0.0)
    await made.get(("tinything",))
    assert states(made) == [EnvironmentState.READY]


async def test_a_package_for_another_python_is_refused_with_its_reason(root: Path) -> None:
    put_wheel(root / "wheels", "ancient", requires_python="<3")
    with pytest.raises(StartFailed, match="ancient"):
        await Environments(root).get(("ancient",))


async def test_source_packages_whose_code_would_run_here_are_not_built(root: Path) -> None:
    evil = f"open({str(root / 'ran')!r}, 'w').write('x')\nfrom setuptools import setup; setup()\n"
    with tarfile.open(root / "wheels" / "sourced-1.0.tar.gz", "w:gz") as archive:
        for name, text in {
            "sourced-1.0/setup.py": evil,
            "sourced-1.0/PKG-INFO": "Metadata-Version: 2.1\nName: sourced\nVersion: 1.0\n",
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    with pytest.raises(StartFailed, match="sourced"):
        await Environments(root).get(("sourced",))
    assert not (root / "ran").exists()


async def test_the_wheel_cache_is_bounded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_wheel(root / "wheels", "tinything")
    monkeypatch.setattr(environments, "WHEELS_BYTES_MAX", 0)
    await Environments(root).get(("tinything",))
    assert not list((root / "wheels").iterdir())
