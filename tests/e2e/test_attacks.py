"""Functions that attack their node: each is stopped, and the node serves the next call.

    TIERWISE_TEST_ISOLATION=off pytest tests/e2e/test_attacks.py    # which need which layer

With isolation off all but those that the minimum stops succeed, so no test passes by itself.
"""

import asyncio
import gc
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import attacks
import cloudpickle
import psutil
import pytest
import pytest_asyncio

from agent.runtime.environments import HOST, Environment
from agent.runtime.runtime import InstanceStartError, ItemKind, RunReport, Runtime
from tests.settling import settled
from tierwise.wire import payload

ISOLATION = os.environ.get("TIERWISE_TEST_ISOLATION", "strict" if os.geteuid() == 0 else "standard")
MEMORY_MIB = 64
NEED_A_GROUP = ("fills_memory_through_its_children",)
MARK = "tw-hidden"  # name of a process that hides

pytestmark = pytest.mark.asyncio(loop_scope="module")


def healthy(x: int) -> int:
    return x + 1


class Node:
    """A runtime, and what attackers know of it."""

    def __init__(
        self, folder: Path, isolation: str = ISOLATION, data: tuple[str, ...] = ()
    ) -> None:
        self.folder = folder
        self.runtime = Runtime(state_dir=folder / "runtime", isolation=isolation, data=data)
        self._number = 0
        self.place: dict[str, Any] = {}
        self.missing: dict[str, str] = {}  # layers, and why

    async def start(self, function: Callable[..., Any], environment: Environment = HOST) -> str:
        self._number += 1
        name = f"i{self._number}"
        code = cloudpickle.dumps(function)
        path = self.folder / f"{name}.code"
        path.write_bytes(code)
        await self.runtime.start(
            name,
            code_digest=hashlib.sha256(code).hexdigest(),
            code_path=path,
            environment=environment,
            memory_mib=MEMORY_MIB,
        )
        return name

    async def run(self, name: str, *arguments: Any, timeout_s: float = 30.0) -> RunReport:
        done: asyncio.Future[RunReport] = asyncio.get_running_loop().create_future()
        blobs = [payload.encode((list(arguments), {}))]
        self.runtime.run(name, blobs, timeout_s=timeout_s, on_done=done.set_result)
        return await done

    async def try_once(self, function: Callable[..., Any], *arguments: Any) -> RunReport:
        name = await self.start(function)
        try:
            return await self.run(name, *arguments)
        finally:
            await self.runtime.stop(name)

    async def is_healthy(self) -> bool:
        report = await self.try_once(healthy, 1)
        return [payload.decode(item.value) for item in report.items] == [2]


@pytest.fixture(scope="module")
def open_doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Listen where an attacker might call, in this process, which plays the agent."""
    folder = tmp_path_factory.mktemp("agent")
    (folder / "key.pem").write_text("a secret key")
    abstract, path = f"tierwise-test-{os.getpid()}", str(folder / "socket")
    with (
        socket.create_server(("127.0.0.1", 0)) as port,
        socket.socket(socket.AF_UNIX) as nameless,
        socket.socket(socket.AF_UNIX) as named,
    ):
        nameless.bind(f"\0{abstract}")
        nameless.listen(8)
        named.bind(path)
        named.listen(8)
        yield {
            "state": str(folder),
            "pid": os.getpid(),
            "port": port.getsockname()[1],
            "abstract": abstract,
            "socket": path,
            "host": socket.gethostname(),
        }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(open_doors: dict[str, Any]) -> AsyncIterator[Node]:
    cloudpickle.register_pickle_by_value(attacks)
    cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["healthy"]))
    node = Node(Path(open_doors["state"]))
    node.place = open_doors
    await node.runtime.open()
    node.missing = survey_under()["missing"] if ISOLATION == "standard" else {}
    try:
        yield node
    finally:
        await node.runtime.close()


@pytest.mark.parametrize("name", sorted(attacks.ATTACKS))
async def test_an_attack_is_stopped_and_the_node_stays_healthy(node: Node, name: str) -> None:
    if name in NEED_A_GROUP and "control group" in node.missing:
        pytest.skip(node.missing["control group"])
    report = await node.try_once(attacks.ATTACKS[name], node.place)
    (item,) = report.items
    assert item.kind in (ItemKind.OK, ItemKind.OUT_OF_MEMORY), item
    if item.kind is ItemKind.OK:
        assert payload.decode(item.value) == ""
    assert await node.is_healthy()


async def test_what_was_refused_is_reported_with_the_call(node: Node) -> None:
    report = await node.try_once(attacks.ATTACKS["connects_to_a_port"], node.place)
    assert report.refused_calls == {"socket": 1}
    report = await node.try_once(attacks.ATTACKS["spawns_a_shell"], node.place)
    assert report.refused_calls == {"execve": 1}
    assert (await node.try_once(healthy, 1)).refused_calls == {}


def ask_without_end(count: int) -> int:
    import contextlib
    import socket

    for _ in range(count):
        with contextlib.suppress(OSError):
            socket.socket()
            return 1
    return 0


async def test_a_flood_of_refused_calls_is_refused_to_its_end(node: Node) -> None:
    report = await node.try_once(ask_without_end, 5000)
    assert payload.decode(report.items[0].value) == 0
    assert report.refused_calls == {"socket": 1000}
    assert await node.is_healthy()


def hide(mark: str) -> None:
    """Leave the session and the parent, as daemons do, and live for ever."""
    import ctypes
    import os
    import signal
    import time

    child = os.fork()
    if child == 0:
        os.setsid()
        if os.fork() == 0:
            ctypes.CDLL(None).prctl(15, mark.encode(), 0, 0, 0)
            for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
                signal.signal(number, signal.SIG_IGN)
            while True:
                time.sleep(1)
        os._exit(0)
    os.waitpid(child, 0)


def hidden() -> list[psutil.Process]:
    return [process for process in psutil.process_iter(["name"]) if process.info["name"] == MARK]


async def test_a_daemon_ends_with_its_instance(node: Node) -> None:
    name = await node.start(hide)
    await node.run(name, MARK)
    try:
        assert len(hidden()) == 1, "the attack itself did not work"
        await node.runtime.stop(name)
        assert not hidden()
    finally:
        for process in hidden():
            process.kill()
    assert await node.is_healthy()


async def test_a_daemon_ends_with_its_zygote_too(open_doors: dict[str, Any]) -> None:
    node = Node(Path(open_doors["state"]) / "second")
    node.folder.mkdir()
    await node.runtime.open()
    try:
        before = {process.pid for process in psutil.Process().children()}
        name = await node.start(hide)
        await node.run(name, MARK)
        for process in psutil.Process().children():
            if process.pid not in before:
                process.kill()
                process.wait()
        async with asyncio.timeout(10):
            while hidden():
                await asyncio.sleep(0.01)
    finally:
        for process in hidden():
            process.kill()
        await node.runtime.close()


def leave_traces(folder: str) -> None:
    import json
    import sys

    with open(f"{folder}/of_an_attack", "w") as file:
        file.write("evil")
    json.dumps = lambda *arguments, **options: "evil"  # type: ignore[assignment]
    sys.modules["numpy"] = sys.modules["json"]


def find_traces(folder: str) -> str:
    import json
    import os

    import numpy

    found = [name for name in os.listdir(folder) if name == "of_an_attack"]
    return " ".join(found) + json.dumps("") * (json.dumps("") != '""') + numpy.__name__


async def test_nothing_of_one_function_reaches_the_next(node: Node) -> None:
    name = await node.start(leave_traces)
    assert (await node.run(name, "/tmp")).items[0].kind is ItemKind.OK
    try:
        for _ in range(2):  # beside it, and after it
            report = await node.try_once(find_traces, "/tmp")
            assert payload.decode(report.items[0].value) == "numpy"
            await node.runtime.stop(name)
    finally:
        Path("/tmp/of_an_attack").unlink(missing_ok=True)


def link_to(path: str) -> None:
    import os

    os.symlink(path, "link")
    os.makedirs("a/b")
    os.symlink(path, "a/b/link")


async def test_removing_its_folder_follows_no_link(node: Node) -> None:
    victim = node.folder / "victim"
    victim.mkdir()
    (victim / "file").touch()
    assert (await node.try_once(link_to, str(victim))).items[0].kind is ItemKind.OK
    assert (victim / "file").exists()


def shrink_what_is_shared() -> None:
    import os

    for descriptor in range(3, 64):
        try:
            os.ftruncate(descriptor, 0)
        except OSError:
            continue


async def test_the_page_it_shares_with_the_agent_cannot_be_taken_from_under_it(node: Node) -> None:
    """An agent that read beyond the end of a shared page would be killed by the kernel."""
    name = await node.start(shrink_what_is_shared)
    for _ in range(2):
        assert (await node.run(name)).items[0].kind is ItemKind.OK
    await node.runtime.stop(name)


def talk_nonsense() -> None:
    import os

    for descriptor in range(3, 64):
        try:
            os.write(descriptor, b"\xff" * 4096)
        except OSError:
            continue


async def test_nonsense_on_its_own_socket_ends_the_instance_only(node: Node) -> None:
    report = await node.try_once(talk_nonsense)
    assert report.items[0].kind is ItemKind.WORKER_DIED
    assert await node.is_healthy()


def cells() -> dict[str, int]:
    """Return what instances leave behind if something is wrong, by kind."""
    gc.collect()
    groups = [
        path for path, _, _ in os.walk("/sys/fs/cgroup") if f"/tierwise-{os.getpid()}-" in path
    ]
    zygotes = psutil.Process().children()
    return {
        "process": len(psutil.Process().children(recursive=True)),
        "group": len(groups),
        "mount": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "mount of a zygote": sum(
            len(Path(f"/proc/{zygote.pid}/mountinfo").read_text().splitlines())
            for zygote in zygotes
        ),
        "descriptor": len(list(Path("/proc/self/fd").iterdir())),
        "descriptor of a zygote": sum(zygote.num_fds() for zygote in zygotes),
    }


CYCLES = int(os.environ.get("TIERWISE_TEST_CYCLES", "50"))


async def test_starting_and_killing_leaves_nothing_behind(node: Node) -> None:
    assert await node.is_healthy()  # the zygote is up
    before = await settled(cells)
    for number in range(CYCLES):
        name = await node.start(hide)
        if number % 2:
            await node.run(name, MARK)  # with a daemon in it
        if number % 3:
            node.runtime.cancel(name)
        await node.runtime.stop(name)
    left = hidden()
    for process in left:
        process.kill()
    assert not left
    assert await settled(cells) == before
    assert await node.is_healthy()


ROOT = Path(__file__).parents[2]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can take rights away")


def survey_under(*arguments: str, before: str = "") -> dict[str, dict[str, str]]:
    """Return what `seal.survey` finds in a process that has been prepared for it."""
    code = (
        f"{before}\nimport json\nfrom agent.runtime.seal import survey\nprint(json.dumps(survey()))"
    )
    done = subprocess.run(
        [sys.executable, *arguments, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, str]] = json.loads(done.stdout)
    return found


@needs_root
async def test_without_root_user_namespaces_give_the_rest() -> None:
    found = survey_under(str(Path(__file__).with_name("as_nobody.py")))
    assert found["missing"].keys() <= {"own user", "control group"}


@needs_root
async def test_a_trial_of_the_seal_leaves_no_group_behind() -> None:
    survey_under()
    found = [path for path, _, _ in os.walk("/sys/fs/cgroup") if path.endswith("-survey")]
    owners = {int(path.split("-")[-2]) for path in found}
    assert not {owner for owner in owners if not psutil.pid_exists(owner)}


@needs_root
async def test_a_missing_layer_is_named_with_its_reason() -> None:
    """Where a supervisor of seccomp watches the agent already, there can be no second one."""
    found = survey_under(
        before="""
from agent.runtime import kernel, seccomp
kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
seccomp.enter(bytes.fromhex("060000000000ff7f"), reports=True)  # allows everything
"""
    )
    assert found["missing"].keys() == {"refusal reports"}
    assert "busy" in found["missing"]["refusal reports"]


def environment_in(folder: Path) -> Environment:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for name in ("cloudpickle", "msgspec"):
        shutil.copytree(Path(str(__import__(name).__file__)).parent, site / name)
    return Environment(environment_id="own", python=folder / "bin/python", preload=())


def where_it_is() -> list[str]:
    import cloudpickle

    return [str(cloudpickle.__file__)]


async def test_an_environment_that_lies_where_a_function_has_its_files_is_still_seen(
    tmp_path: Path,
) -> None:
    environment = environment_in(tmp_path / "venv")
    node = Node(tmp_path)
    await node.runtime.open()
    try:
        name = await node.start(where_it_is, environment)
        (found,) = payload.decode((await node.run(name)).items[0].value)
        assert found.startswith(str(tmp_path / "venv"))
    finally:
        await node.runtime.close()


@needs_root
async def test_strict_isolation_runs_nothing_where_a_layer_is_missing(tmp_path: Path) -> None:
    """Where other users cannot read the environment, the instance would be the agent's own."""
    environment = environment_in(tmp_path / "venv")
    (tmp_path / "venv").chmod(0o700)
    node = Node(tmp_path, "strict")
    await node.runtime.open()
    try:
        with pytest.raises(InstanceStartError, match=r"lacks layers .*own user: .*venv"):
            await node.start(healthy, environment)
    finally:
        await node.runtime.close()


async def test_a_nodes_data_can_be_read_by_its_functions_and_not_changed(tmp_path: Path) -> None:
    cloudpickle.register_pickle_by_value(attacks)
    data = tmp_path / "data"
    data.mkdir()
    (data / "pictures").write_text("digits")
    node = Node(tmp_path, data=(str(data), str(tmp_path / "nothing")))
    await node.runtime.open()
    try:
        report = await node.try_once(attacks.reads_then_writes, str(data / "pictures"))
    finally:
        await node.runtime.close()
    [item] = report.items
    text, refusal = payload.decode(item.value)
    assert text == "digits"
    assert refusal in ("OSError", "PermissionError")
    assert (data / "pictures").read_text() == "digits"
