"""What the scheduler makes of call records: when it fits, what agents hear, what survives."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from scheduler.catalogue import FunctionCatalogue
from scheduler.sizings import OUT_OF_MEMORY, Sizings
from scheduler.store.store import Store
from scheduler.telemetry import Telemetry
from tierwise.domain.function import PRIOR, FunctionSpec
from tierwise.domain.ids import FunctionId, NodeId, RequestId
from tierwise.domain.outcome import LatencySplit, Outcome, OutcomeState
from tierwise.domain.resources import Resources
from tierwise.domain.topology import Node, Tier
from tierwise.domain.view import ViewTable
from tierwise.errors import FailedPrecondition
from tierwise.v1 import advisor_pb2, function_pb2, node_pb2
from tierwise.wire import convert

NODE = Node(node_id=NodeId("cloud-1"), tier=Tier.CLOUD, capacity=Resources(cpus=4, memory_mib=4096))


class Bench:
    """A scheduler's store, catalogue and sizings, without its network."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(f"sqlite:///{folder / 'scheduler.db'}")
        self.functions = FunctionCatalogue(self.store, lambda name: PRIOR)
        self.telemetry = Telemetry(self.store, ViewTable(NODE), records_max=1000)
        self.sizings = Sizings(self.store, self.functions)
        self.telemetry.also_learn = self.sizings.learn
        self.functions.sizing = self.sizings.sizing
        self.told_count = 0

        def told() -> None:
            self.told_count += 1

        self.functions.on_changed = told

    async def deploy(self, **changes: Any) -> FunctionSpec:
        fields: dict[str, Any] = {"is_memory_auto": True, **changes}
        spec = FunctionSpec(
            namespace="default", name="f", version=1, code_digest="0" * 64, **fields
        )
        request = function_pb2.DeployFunctionRequest(spec=convert.spec_to_pb(spec), code=b"code")
        response = await self.functions.DeployFunction(request, None)
        return convert.spec_from_pb(response.spec)

    def call(self, function: FunctionId, n: int, **changes: Any) -> None:
        outcome = Outcome(
            **{
                "request_id": RequestId(f"r-{n}-{changes.get('peak_memory_mib', 0)}"),
                "function_id": function,
                "state": OutcomeState.OK,
                "origin": NODE.node_id,
                "node_id": NODE.node_id,
                "latency": LatencySplit(run_s=0.1),
                "memory_mib": 256,
                "peak_memory_mib": 5.0 + 0.5 * n,
                "measures": {"n": float(n), "bytes": 20.0},
                **changes,
            }
        )
        report = node_pb2.CallReport(outcome=convert.outcome_to_pb(outcome))
        self.telemetry.take(NODE.node_id, node_pb2.Heartbeat(calls=[report]))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    try:
        yield bench
    finally:
        await bench.store.close()


async def until(check: Callable[[], Any], sizings: Sizings) -> None:
    """Let the fitting loop run until the check holds."""
    fitting = asyncio.ensure_future(sizings.fit_forever())
    try:
        async with asyncio.timeout(20.0):
            while not check():
                await asyncio.sleep(0.05)
    finally:
        fitting.cancel()
        await asyncio.gather(fitting, return_exceptions=True)


async def test_agents_are_told_what_the_calls_of_an_auto_function_teach(bench: Bench) -> None:
    spec = await bench.deploy()
    told_count = bench.told_count
    for n in range(10, 210, 10):
        bench.call(spec.function_id, n)
    await until(lambda: bench.told_count > told_count, bench.sizings)
    [sizing] = convert.catalogue_from_pb(bench.functions.to_pb()).sizings.values()
    assert 55 <= (sizing.memory_mib({"n": 100.0, "bytes": 20.0}) or 0) <= 72


async def test_declared_functions_are_learnt_about_but_agents_hear_nothing(bench: Bench) -> None:
    spec = await bench.deploy(is_memory_auto=False)
    for n in range(10, 210, 10):
        bench.call(spec.function_id, n)
    assert not bench.functions.to_pb().sizings
    request = advisor_pb2.RecommendMemoryRequest(function="f")
    found = await bench.sizings.RecommendMemory(request, None)
    assert found.is_memory_auto
    assert found.sample_count == 20
    assert found.gb_s_recommended < found.gb_s_declared


async def test_a_call_out_of_memory_is_learnt_from_at_once(bench: Bench) -> None:
    spec = await bench.deploy()
    for n in range(10, 210, 10):
        bench.call(spec.function_id, n)
    await until(lambda: bench.sizings.sizing(spec.function_id), bench.sizings)
    before = bench.sizings.sizing(spec.function_id)
    bench.call(
        spec.function_id, 50, state=OutcomeState.FAILED, error_code=OUT_OF_MEMORY, memory_mib=500
    )
    await until(lambda: bench.sizings.sizing(spec.function_id) != before, bench.sizings)


async def test_a_first_guess_never_gives_less_than_what_is_declared(bench: Bench) -> None:
    spec = await bench.deploy(memory_mib=256)
    for n in (10, 20, 30, 40):
        bench.call(spec.function_id, n)
    told_count = bench.told_count
    await until(lambda: bench.told_count > told_count, bench.sizings)
    assert bench.sizings.sizing(spec.function_id) is None
    bench.call(spec.function_id, 5, peak_memory_mib=400.0, retried_gb_s=1.0, memory_mib=512)
    await until(lambda: bench.sizings.sizing(spec.function_id), bench.sizings)
    guessed = bench.sizings.sizing(spec.function_id)
    assert guessed is not None
    assert guessed.memory_mib({}) == 800


async def test_what_was_learnt_survives_a_restart(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    spec = await bench.deploy()
    for n in range(10, 210, 10):
        bench.call(spec.function_id, n)
    await until(lambda: bench.sizings.sizing(spec.function_id), bench.sizings)
    await bench.telemetry.store_profiles()
    await bench.store.close()
    again = Bench(tmp_path)
    sizing = again.sizings.sizing(spec.function_id)
    assert sizing is not None
    assert sizing.sample_count == 20
    await again.store.close()


async def test_resizing_keeps_the_code_and_what_was_learnt(bench: Bench) -> None:
    spec = await bench.deploy(is_memory_auto=False, memory_mib=512)
    for n in range(10, 210, 10):
        bench.call(spec.function_id, n)
    request = advisor_pb2.ResizeFunctionRequest(function="f", is_memory_auto=True)
    resized = await bench.sizings.ResizeFunction(request, None)
    assert resized.is_new
    assert resized.spec.version == 2
    assert resized.spec.memory_mib == 512
    assert resized.spec.code_digest == spec.code_digest
    assert not (await bench.sizings.ResizeFunction(request, None)).is_new
    await until(lambda: bench.functions.to_pb().sizings, bench.sizings)
    back = advisor_pb2.ResizeFunctionRequest(function="f", memory_mib=512)
    assert (await bench.sizings.ResizeFunction(back, None)).spec.version == 3


async def test_nothing_is_recommended_without_calls(bench: Bench) -> None:
    await bench.deploy()
    with pytest.raises(FailedPrecondition, match="only 0 calls"):
        await bench.sizings.RecommendMemory(advisor_pb2.RecommendMemoryRequest(function="f"), None)
