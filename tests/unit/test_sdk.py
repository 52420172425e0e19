"""The SDK against agents made to measure, over real gRPC and mTLS."""

import asyncio
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import grpc
import pytest
from sdk_builders import FakeAgent, FakeCluster, answer, echo, failure

import tierwise
from tierwise.domain.function import Priority
from tierwise.domain.topology import Tier
from tierwise.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    FunctionRaised,
    FunctionTimedOut,
    InvalidArgument,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    Unauthenticated,
    Unavailable,
)
from tierwise.sdk import connection as connection_module
from tierwise.sdk.app import App, Function
from tierwise.sdk.client import Client, find_context
from tierwise.sdk.code import pack
from tierwise.sdk.connection import Options, invocation_of
from tierwise.sdk.local import LocalCluster, parse_nodes
from tierwise.sdk.mapping import CHUNK_ITEMS_MAX, ChunkSize, take
from tierwise.v1 import types_pb2, work_pb2
from tierwise.wire import payload

# -- declaring ----------------------------------------------------------------------------------


def double(x: int) -> int:
    """Double it."""
    return 2 * x


def declared(**options: Any) -> Function:
    made = App("test").function(**options)(double)
    assert isinstance(made, Function)
    return made


def test_a_declaration_becomes_a_spec() -> None:
    spec = declared(
        memory="1GiB", deadline="200ms", priority="high", tier=["edge", "fog"], budget_usd=0.5
    ).spec
    assert (spec.namespace, spec.name, spec.description) == ("default", "double", "Double it.")
    assert (spec.memory_mib, spec.deadline_s, spec.budget_usd) == (1024, 0.2, 0.5)
    assert spec.priority is Priority.HIGH
    assert spec.tiers == {Tier.EDGE, Tier.FOG}


@pytest.mark.parametrize(
    "options",
    [
        {"memory": "much"},
        {"deadline": "soon"},
        {"priority": "urgent"},
        {"tier": "moon"},
        {"tier": []},
        {"timeout": 0},
        {"name": "No Spaces"},
        {"cpus": -1.0},
        {"max_instances": 0},
        {"requirements": "numpy"},
        {"requirements": ["--index-url=http://elsewhere"]},
    ],
)
def test_a_wrong_declaration_is_refused_where_it_is_written(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        declared(**options)


def test_functions_whose_results_cannot_travel_are_refused() -> None:
    app = App("test")

    async def coroutine() -> None: ...

    def generator() -> Iterator[int]:
        yield 1

    for function in (coroutine, generator, "text"):
        with pytest.raises(InvalidArgument):
            app.function(function)  # type: ignore[arg-type]


def test_a_function_runs_here_when_it_is_called() -> None:
    function = declared()
    assert function(3) == function.local(3) == 6
    assert function.__name__ == "double"


def test_options_narrow_one_call_and_leave_the_function_alone() -> None:
    function = declared()
    changed = function.options(node="edge-1", deadline="50ms", tier="edge", priority="low")
    invocation = invocation_of("f", [b""], changed._options)
    assert invocation.node_id == "edge-1"
    assert invocation.deadline_s == 0.05
    assert list(invocation.tiers) == [types_pb2.TIER_EDGE]
    assert invocation.priority == types_pb2.PRIORITY_LOW
    assert function._options == Options()


def test_a_call_too_large_for_a_message_is_refused_before_it_is_sent() -> None:
    with pytest.raises(PayloadTooLarge, match="limit of one call"):
        invocation_of("f", [bytes(121 << 20)], Options())


# -- shipping -----------------------------------------------------------------------------------


def test_code_is_shipped_by_value_and_runs_without_its_module(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from tierwise.sdk.app import App\n"
        "app = App('a')\n"
        "FACTORS = {2, 3, 5}\n"
        "def factor(x): return max(FACTORS) if x in {'p', 'q', 7} else 1\n"
        "@app.function\n"
        "def inner(x): return x + 1\n"
        "class Box:\n"
        "    def __init__(self, x): self.x = x\n"
        "@app.function\n"
        "def outer(x): return Box(inner(x)).x * factor(7)\n"
    )
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import mine; "
        "from tierwise.sdk.code import pack; sys.stdout.buffer.write(pack(mine.outer.code))"
    )
    blobs = [
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], capture_output=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert blobs[0] == blobs[1], "the same code must have the same digest in every process"
    load = "import cloudpickle, sys; print(cloudpickle.loads(sys.stdin.buffer.read())(1))"
    done = subprocess.run(
        [sys.executable, "-c", load], input=blobs[0], capture_output=True, check=True
    )
    assert done.stdout.strip() == b"10"


def test_functions_that_remember_their_results_are_shipped_too(tmp_path: Path) -> None:
    (tmp_path / "cached.py").write_text(
        "import functools\n"
        "@functools.lru_cache(maxsize=7)\n"
        "def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)\n"
        "@functools.cache\n"
        "def tenth(): return fib(10)\n"
        "def info(): return tenth(), fib.cache_info().maxsize, fib.cache_info().misses\n"
    )
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import cached; cached.info(); "
        "from tierwise.sdk.code import pack; sys.stdout.buffer.write(pack(cached.info))"
    )
    blobs = [
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], capture_output=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert blobs[0] == blobs[1]
    load = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read())())"
    done = subprocess.run(
        [sys.executable, "-c", load], input=blobs[0], capture_output=True, check=True
    )
    assert done.stdout.strip() == b"(55, 7, 11)", "what was remembered here stays here"


@pytest.mark.parametrize("name", ["predict", "gtg-shapley"])
def test_platform_functions_are_shipped_by_value_with_the_same_bytes_wherever_they_lie(
    tmp_path: Path, name: str
) -> None:
    root = Path(tierwise.__file__).parents[1]
    shutil.copytree(root / "tierwise", tmp_path / "tierwise")
    script = (
        "import sys; from tierwise.functions.fl.questions import QUESTIONS; "
        "from tierwise.sdk.code import pack; "
        f"sys.stdout.buffer.write(pack(QUESTIONS[{name!r}].function))"
    )
    blobs = []
    for place, seed in ((root, "1"), (root, "2"), (tmp_path, "3")):
        environment = {**os.environ, "PYTHONPATH": str(place), "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", script]
        ran = subprocess.run(command, cwd=place, env=environment, capture_output=True, check=True)
        blobs.append(ran.stdout)
    assert blobs[0] == blobs[1] == blobs[2]
    assert str(root).encode() not in blobs[0]
    load = (
        "import sys; sys.modules['tierwise'] = None; import cloudpickle; "
        "print(cloudpickle.loads(sys.stdin.buffer.read()).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", load], input=blobs[0], cwd=tmp_path, capture_output=True, check=True
    )
    assert done.stdout.decode().strip() == name.replace("-", "_")


def test_what_cannot_be_shipped_is_named() -> None:
    lock = threading.Lock()

    def locked() -> None:
        lock.acquire()

    with pytest.raises(InvalidArgument, match="locked cannot be shipped"):
        pack(locked)


def test_a_function_object_travels_as_the_plain_function() -> None:
    shipped = cloudpickle.loads(cloudpickle.dumps(declared()))
    assert not isinstance(shipped, Function)
    assert shipped(4) == 8


# -- chunks -------------------------------------------------------------------------------------


def test_chunks_grow_to_twenty_milliseconds_of_work_and_at_most_double() -> None:
    size = ChunkSize()
    seen = []
    for _ in range(12):
        size.learn(run_s=0.001 * size.item_count, item_count=size.item_count)
        seen.append(size.item_count)
    assert seen[:4] == [2, 4, 8, 16]
    assert seen[-1] == 20


def test_chunks_are_bounded_and_slow_items_travel_alone() -> None:
    size = ChunkSize()
    for _ in range(20):
        size.learn(run_s=0.0, item_count=size.item_count)
    assert size.item_count == CHUNK_ITEMS_MAX
    size.learn(run_s=30.0, item_count=1)
    assert size.item_count == 1


def test_a_chunk_ends_at_a_mebibyte() -> None:
    inputs = iter([(bytes(600_000),)] * 4)
    assert [len(take(inputs, 512, within_s=60.0)) for _ in range(3)] == [2, 2, 0]


def test_an_input_that_cannot_travel_is_named() -> None:
    with pytest.raises(InvalidArgument, match="cannot travel"):
        take(iter([(object(),)]), 1)


# -- calling ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "BACKOFF_FIRST_S", 0.005)


async def test_many_calls_share_one_stream_and_few_messages(tmp_path: Path) -> None:
    agent = FakeAgent("edge-1")
    async with FakeCluster(tmp_path, agent) as cluster, Client(cluster.context) as client:
        remote = client.function("f").remote
        await remote.aio(0)
        results = await asyncio.gather(*(remote.aio(i) for i in range(300)))
        assert results == list(range(300))
        assert agent.stream_count == 1
        assert len(agent.message_sizes) < 30


async def test_errors_come_typed_and_with_their_remote_traceback(tmp_path: Path) -> None:
    error = FunctionRaised("no", remote_type="ValueError", remote_traceback="Traceback: line 7")
    agent = FakeAgent("edge-1", reply=lambda invocation: failure(invocation, error))
    async with FakeCluster(tmp_path, agent) as cluster, Client(cluster.context) as client:
        with pytest.raises(FunctionRaised, match="line 7") as caught:
            await client.function("f").remote.aio(1)
        assert caught.value.remote_type == "ValueError"


async def test_blocking_calls_work_from_threads_and_not_from_the_clients_own(
    tmp_path: Path,
) -> None:
    async with FakeCluster(tmp_path, FakeAgent("edge-1")) as cluster:

        def use() -> list[Any]:
            with Client(cluster.context) as client:
                remote = client.function("f").remote

                async def inside() -> None:
                    remote(1)

                with pytest.raises(FailedPrecondition, match="aio"):
                    client.run(inside)
                return [remote(i) for i in range(5)]

        assert await asyncio.to_thread(use) == list(range(5))


async def test_a_broken_stream_is_opened_again_and_the_call_sent_under_its_old_id(
    tmp_path: Path,
) -> None:
    agent = FakeAgent("edge-1")
    async with FakeCluster(tmp_path, agent) as cluster, Client(cluster.context) as client:
        agent.is_breaking = True
        call = asyncio.ensure_future(client.function("f").remote.aio(5))
        await agent.heard.wait()
        agent.is_breaking = False
        assert await call == 5
        assert len({invocation.request_id for invocation in agent.seen}) == 1
        assert agent.stream_count >= 2


async def test_when_the_entry_agent_is_gone_the_next_one_is_used(tmp_path: Path) -> None:
    edge, fog = FakeAgent("edge-1"), FakeAgent("fog-1")
    async with FakeCluster(tmp_path, edge, fog) as cluster, Client(cluster.context) as client:
        remote = client.function("f").remote
        assert await remote.aio(1) == 1
        assert not fog.seen, "the nearest tier comes first"
        await edge.stop()
        assert await asyncio.gather(*(remote.aio(i) for i in range(50))) == list(range(50))
        assert fog.seen


async def test_calls_go_on_while_the_scheduler_is_away(tmp_path: Path) -> None:
    async with FakeCluster(tmp_path, FakeAgent("edge-1")) as cluster:
        function = App("test", client=Client(cluster.context)).function(double)
        assert await function.remote.aio(1) == 1
        await function.client().aclose()
        await cluster.stop_scheduler()
        async with Client(cluster.context) as later:
            again = App("test", client=later).function(double)
            assert await again.remote.aio(2) == 2, "agents and versions are remembered"


async def test_an_agent_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    agent = FakeAgent("edge-1")
    async with FakeCluster(tmp_path, agent) as cluster, Client(cluster.context) as client:
        await agent.stop()
        with pytest.raises(Unavailable, match=r"called in \d tries \(edge-1.*nobody listens"):
            await client.function("f").remote.aio(1)


async def test_a_refused_identity_is_not_tried_again(tmp_path: Path) -> None:
    agent = FakeAgent("edge-1", refusal=grpc.StatusCode.UNAUTHENTICATED)
    async with FakeCluster(tmp_path, agent) as cluster, Client(cluster.context) as client:
        with pytest.raises(Unauthenticated, match="you may not"):
            await client.function("f").remote.aio(1)
        assert agent.stream_count == 1


async def test_a_call_cancelled_by_a_broken_stream_runs_again_under_a_new_id(
    tmp_path: Path,
) -> None:
    def cancelled_once(invocation: types_pb2.Invocation) -> types_pb2.InvocationResult:
        is_old = invocation.request_id == agent.seen[0].request_id
        return failure(invocation, Cancelled("broken")) if is_old else echo(invocation)

    agent = FakeAgent("edge-1", reply=cancelled_once, is_breaking=True)
    async with FakeCluster(tmp_path, agent) as cluster, Client(cluster.context) as client:
        call = asyncio.ensure_future(client.function("f").remote.aio(5))
        await agent.heard.wait()
        agent.is_breaking = False
        assert await call == 5
        assert agent.stream_count == 2, "an answer, even this one, is no reason to reconnect"


async def test_a_silent_agent_ends_in_a_deadline_and_a_cancel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "CALL_MARGIN_S", 0.05)
    agent = FakeAgent("edge-1", reply=lambda invocation: None)
    async with FakeCluster(tmp_path, agent) as cluster, Client(cluster.context) as client:
        with pytest.raises(DeadlineExceeded, match="no answer"):
            await client.function("f").options(timeout="100ms").remote.aio(1)
        await _until(lambda: agent.cancels == [agent.seen[0].request_id])


async def test_a_cancelled_call_tells_the_agent(tmp_path: Path) -> None:
    agent = FakeAgent("edge-1", reply=lambda invocation: None)
    async with FakeCluster(tmp_path, agent) as cluster, Client(cluster.context) as client:
        call = asyncio.ensure_future(client.function("f").remote.aio(1))
        await agent.heard.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await _until(lambda: agent.cancels == [agent.seen[0].request_id])


async def test_ctrl_c_in_a_blocking_call_cancels_it_on_the_agent(tmp_path: Path) -> None:
    agent = FakeAgent("edge-1", reply=lambda invocation: None)
    async with FakeCluster(tmp_path, agent) as cluster:
        script = (
            "import sys, tierwise\n"
            "with tierwise.Client(sys.argv[1]) as client:\n"
            "    try: client.function('f').remote(1)\n"
            "    except KeyboardInterrupt: print('interrupted')\n"
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, str(cluster.context), stdout=asyncio.subprocess.PIPE
        )
        await agent.heard.wait()
        process.send_signal(2)
        stdout, _ = await process.communicate()
        assert stdout.strip() == b"interrupted"
        await _until(lambda: agent.cancels == [agent.seen[0].request_id])


async def test_an_entry_node_that_does_not_exist_is_named(tmp_path: Path) -> None:
    async with FakeCluster(tmp_path, FakeAgent("edge-1")) as cluster:
        client = Client(cluster.context, entry="edge-9")
        with pytest.raises(NotFound, match=r"edge-9.*it has edge-1"):
            await client.function("f").remote.aio(1)
        await client.aclose()


# -- deploying ----------------------------------------------------------------------------------


async def test_a_function_is_deployed_once_and_called_by_its_exact_version(
    tmp_path: Path,
) -> None:
    agent = FakeAgent("edge-1")
    async with FakeCluster(tmp_path, agent) as cluster, Client(cluster.context) as client:
        function = App("test", client=client).function(double)
        for i in range(3):
            await function.remote.aio(i)
        assert cluster.scheduler.deploy_count == 1
        assert {invocation.function for invocation in agent.seen} == {"default/double@1"}


async def test_a_function_that_was_deleted_is_deployed_again(tmp_path: Path) -> None:
    def gone_once(invocation: types_pb2.Invocation) -> types_pb2.InvocationResult:
        is_first = len(agent.seen) == 1
        return failure(invocation, NotFound("deleted")) if is_first else echo(invocation)

    agent = FakeAgent("edge-1", reply=gone_once)
    async with FakeCluster(tmp_path, agent) as cluster, Client(cluster.context) as client:
        function = App("test", client=client).function(double)
        assert await function.remote.aio(3) == 3
        assert cluster.scheduler.deploy_count == 2


# -- mapping ------------------------------------------------------------------------------------


async def test_a_map_keeps_the_order_and_sends_many_items_per_message(tmp_path: Path) -> None:
    agent = FakeAgent("edge-1")
    async with FakeCluster(tmp_path, agent) as cluster, Client(cluster.context) as client:
        results = [y async for y in client.function("f").map.aio(range(2000))]
        assert results == list(range(2000))
        assert len(agent.seen) < 300


async def test_a_map_reads_its_inputs_lazily_and_in_the_callers_thread(tmp_path: Path) -> None:
    async with FakeCluster(tmp_path, FakeAgent("edge-1")) as cluster:

        def use() -> tuple[int, set[int]]:
            with Client(cluster.context) as client:
                function = client.function("f")
                read: list[int] = []
                threads: set[int] = set()

                def endless() -> Iterator[int]:
                    while True:
                        threads.add(threading.get_ident())
                        read.append(len(read))
                        yield read[-1]

                # A map over a map would wait for itself if inputs were pulled inside the loop.
                results = function.map(function.map(endless()))
                assert [next(results) for _ in range(3)] == [0, 1, 2]
                results.close()  # type: ignore[attr-defined]
                return len(read), threads - {threading.get_ident()}

        read_count, other_threads = await asyncio.to_thread(use)
        assert read_count < 20_000  # two windows of full chunks; the source is endless
        assert not other_threads


async def test_unordered_results_come_as_they_end(tmp_path: Path) -> None:
    held: list[types_pb2.Invocation] = []

    def hold_the_first(invocation: types_pb2.Invocation) -> types_pb2.InvocationResult | None:
        if payload.decode(invocation.arguments[0])[0][0] == 0:
            held.append(invocation)
            return None
        return echo(invocation)

    agent = FakeAgent("edge-1", reply=hold_the_first)
    async with FakeCluster(tmp_path, agent) as cluster, Client(cluster.context) as client:
        results = client.function("f").map.aio(range(50), ordered=False)
        seen = [await anext(results) for _ in range(49)]
        assert sorted(seen) == list(range(1, 50))
        await results.aclose()  # type: ignore[attr-defined]
        await _until(lambda: agent.cancels == [held[0].request_id])


async def test_a_map_yields_errors_in_place_when_asked_and_raises_the_first_otherwise(
    tmp_path: Path,
) -> None:
    def odd_fails(invocation: types_pb2.Invocation) -> types_pb2.InvocationResult:
        items = []
        for blob in invocation.arguments:
            ((x,), _) = payload.decode(blob)
            items.append(
                types_pb2.Item(error_code="function_raised", message=f"odd {x}")
                if x % 2
                else types_pb2.Item(value=payload.encode(x))
            )
        return answer(invocation, items)

    agent = FakeAgent("edge-1", reply=odd_fails)
    async with FakeCluster(tmp_path, agent) as cluster, Client(cluster.context) as client:
        function = client.function("f")
        results = [y async for y in function.map.aio(range(4), return_exceptions=True)]
        assert [type(y) for y in results] == [int, FunctionRaised, int, FunctionRaised]
        with pytest.raises(FunctionRaised, match="odd 1"):
            async for _ in function.map.aio(range(4)):
                pass


async def test_items_that_were_not_run_or_ran_out_of_shared_time_are_sent_again_alone(
    tmp_path: Path,
) -> None:
    def chunk_dies_in_its_second_item(
        invocation: types_pb2.Invocation,
    ) -> types_pb2.InvocationResult:
        if len(invocation.arguments) < 4:
            return echo(invocation)
        whole = echo(invocation)
        not_run = types_pb2.Item(error_code="unavailable", message="not run: its worker ended")
        timed_out = types_pb2.Item(error_code=FunctionTimedOut.code, message="too long")
        dead = types_pb2.Item(error_code="function_died", message="exit 1")
        rest = [not_run] * (len(whole.items) - 3)
        return answer(invocation, [whole.items[0], dead, timed_out, *rest])

    agent = FakeAgent("edge-1", reply=chunk_dies_in_its_second_item)
    async with FakeCluster(tmp_path, agent) as cluster, Client(cluster.context) as client:
        found = client.function("f").map.aio(range(40), return_exceptions=True)
        results = [y async for y in found]
        assert len(results) == 40
        failed = [i for i, y in enumerate(results) if isinstance(y, Exception)]
        assert failed, "an item that killed its worker keeps its error"
        assert all(y == i for i, y in enumerate(results) if i not in failed)
        assert all(results[i].code == "function_died" for i in failed)


async def test_a_full_cluster_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tierwise.sdk.mapping.RESEND_FIRST_S", 0.002)

    def full_at_first(invocation: types_pb2.Invocation) -> types_pb2.InvocationResult:
        is_full = len(agent.seen) < 10
        return failure(invocation, Overloaded("full")) if is_full else echo(invocation)

    agent = FakeAgent("edge-1", reply=full_at_first)
    async with FakeCluster(tmp_path, agent) as cluster, Client(cluster.context) as client:
        assert [y async for y in client.function("f").map.aio(range(5))] == list(range(5))


# -- durable work -------------------------------------------------------------------------------


async def test_durable_work_is_submitted_again_under_its_ids_when_the_answer_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tierwise.sdk.remote.SUBMIT_RETRY_FIRST_S", 0.01)
    async with FakeCluster(tmp_path, FakeAgent("edge-1")) as cluster:
        cluster.scheduler.fail_submits = 2
        async with Client(cluster.context) as client:
            handle = await client.function("f").spawn.aio(7)
            ids = {s.invocation.request_id for s in cluster.scheduler.submissions}
            assert ids == {handle.request_id}
            assert await handle.result.aio(5) == 7
            assert await client.handle(handle.request_id).state.aio() == "succeeded"


async def test_many_pieces_of_work_are_submitted_in_bounded_batches_with_their_keys(
    tmp_path: Path,
) -> None:
    async with FakeCluster(tmp_path, FakeAgent("edge-1")) as cluster:
        client = Client(cluster.context)
        function = client.function("f").options(idempotency_key="sweep-1")
        handles = await function.spawn_map.aio(range(1200))
        await client.aclose()
        assert len(handles) == 1200
        keys = [s.idempotency_key for s in cluster.scheduler.submissions]
        assert keys[0] == "sweep-1/0"
        assert len(set(keys)) == 1200
        assert cluster.scheduler.batch_sizes == [500, 500, 200]


async def test_watching_yields_every_state(tmp_path: Path) -> None:
    states = [
        work_pb2.WORK_STATE_QUEUED,
        work_pb2.WORK_STATE_LEASED,
        work_pb2.WORK_STATE_SUCCEEDED,
    ]
    async with FakeCluster(tmp_path, FakeAgent("edge-1")) as cluster:
        cluster.scheduler.work_states = states

        def use() -> list[str]:
            with Client(cluster.context) as client:
                return [progress.state for progress in client.handle("w").watch()]

        assert await asyncio.to_thread(use) == ["queued", "leased", "succeeded"]


# -- contexts and local clusters ----------------------------------------------------------------


def test_a_missing_context_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TIERWISE_CONTEXT", raising=False)
    with pytest.raises(NotFound, match="tierwise up"):
        find_context()
    (tmp_path / ".tierwise/client").mkdir(parents=True)
    (tmp_path / ".tierwise/client/client.toml").touch()
    assert find_context() == Path(".tierwise/client")


def test_node_counts_are_read_from_cloud_to_edge() -> None:
    names = [node.name for node in parse_nodes("2e, 1c,1f")]
    assert names == ["cloud-1", "fog-1", "edge-1", "edge-2"]


@pytest.mark.parametrize("text", ["", "3", "1x", "0e", "65e", "1c;1f", "-1e"])
def test_wrong_node_counts_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_nodes(text)


def test_a_state_folder_in_use_is_neither_started_nor_cleaned(tmp_path: Path) -> None:
    first, second = LocalCluster(tmp_path, "1e"), LocalCluster(tmp_path, "1e")
    first._take_lock()
    (tmp_path / "precious").touch()
    for use in (second.start, second.clean):
        with pytest.raises(FailedPrecondition, match="already"):
            use()
    assert (tmp_path / "precious").exists()
    first.stop()
    second.clean()
    assert not (tmp_path / "precious").exists()


def test_unknown_processes_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="edge-7"):
        LocalCluster(tmp_path, "1e").kill("edge-7")


async def _until(is_so: Any) -> None:
    async with asyncio.timeout(10):
        while not is_so():
            await asyncio.sleep(0.005)
