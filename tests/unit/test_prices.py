"""What a call is metered and billed, and where prices come from."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agent.machine import NodeMachine
from agent.pool import InstancePool
from tests.unit.test_node_machine import decided, finished, node, request, spec, started, with_cloud
from tierwise.config import load_prices
from tierwise.domain.command import Report
from tierwise.domain.event import Arrived, PeerReplied, PricesReceived, Ticked
from tierwise.domain.ids import RequestId
from tierwise.domain.outcome import LatencySplit, Outcome, OutcomeState
from tierwise.domain.prices import (
    DEFAULT_PRICES,
    LINK_CLASSES,
    PriceTable,
    TierPrice,
    billed_s,
    link_class,
)
from tierwise.domain.resources import Resources
from tierwise.domain.topology import Tier
from tierwise.domain.view import ClusterView, NodeReading, NodeView
from tierwise.errors import InvalidArgument
from tierwise.placement.policy import create

FREE = PriceTable(by_tier={tier: TierPrice() for tier in Tier})


def reported(machine: NodeMachine, event: object, now_s: float) -> Outcome:
    [report] = [c for c in machine.step(event, now_s) if isinstance(c, Report)]  # type: ignore[arg-type]
    return report.outcome


def ran(prices: PriceTable | None = None, *, run_s: float = 0.1, **changes: object) -> Outcome:
    """Return the outcome of a cold call on an edge node with two GPUs; its start took 0.2 s."""
    here = replace(node(), capacity=Resources(cpus=1, memory_mib=2048, gpu_slots=2))
    machine = NodeMachine(here)
    if prices is not None:
        machine.step(PricesReceived(prices=prices), 0.0)
    machine.step(Arrived(request=request("r", spec(**changes), item_count=3)), 0.0)
    machine.step(decided("r", "edge-1"), 0.0)
    machine.step(started("edge-1-1"), 0.2)
    return reported(machine, finished("edge-1-1", "r", cpu_s=0.05), 0.2 + run_s)


@pytest.mark.parametrize(
    ("seconds", "milliseconds"),
    [(0.0, 0), (1e-6, 1), (0.001, 1), (0.0010001, 2), (0.1, 100), (1.0004, 1001), (-0.5, 0)],
)
def test_time_is_billed_in_whole_milliseconds_rounded_up(seconds: float, milliseconds: int) -> None:
    assert billed_s(seconds) == pytest.approx(milliseconds / 1000.0)


def test_the_cloud_costs_what_the_public_price_list_says() -> None:
    usd = DEFAULT_PRICES.call_usd(Tier.CLOUD, memory_mib=512, billed_s=0.1)
    assert usd == pytest.approx(0.5 * 0.1 * 1.66667e-5 + 0.2e-6)


def test_a_call_is_metered_where_it_ran() -> None:
    outcome = ran(run_s=0.1001, memory_mib=512, gpu_slots=2)
    assert outcome.gb_s == pytest.approx(0.5 * 0.101)
    assert outcome.gpu_s == pytest.approx(2 * 0.101)
    assert outcome.cpu_s == 0.05
    assert outcome.link == "local"
    edge = DEFAULT_PRICES.by_tier[Tier.EDGE]
    assert outcome.money_usd == pytest.approx(outcome.gb_s * edge.usd_per_gb_s)


def test_a_start_is_billed_by_a_switch_to_the_call_that_waited_for_it() -> None:
    without, with_start = ran(), ran(replace(DEFAULT_PRICES, is_startup_billed=True))
    assert without.gb_s == pytest.approx(0.25 * 0.1)
    assert with_start.gb_s == pytest.approx(0.25 * 0.3)
    assert with_start.money_usd == pytest.approx(3 * without.money_usd)


def test_a_machine_bills_by_the_prices_that_it_was_sent() -> None:
    table = {**FREE.by_tier, Tier.EDGE: TierPrice(usd_per_request=0.5, usd_per_gpu_s=10.0)}
    outcome = ran(PriceTable(by_tier=table), run_s=0.1, gpu_slots=1)
    assert outcome.money_usd == pytest.approx(3 * 0.5 + 10.0 * 0.1)
    assert ran(FREE).money_usd == 0.0


def test_bytes_that_cross_are_billed_at_both_gates_and_named_by_their_link() -> None:
    table = {
        **FREE.by_tier,
        Tier.EDGE: TierPrice(usd_per_gb_out=1.0, usd_per_gb_in=2.0),
        Tier.CLOUD: TierPrice(usd_per_gb_out=10.0, usd_per_gb_in=20.0),
    }
    machine = with_cloud(NodeMachine(node()))
    machine.step(PricesReceived(prices=PriceTable(by_tier=table)), 0.0)
    machine.step(Arrived(request=request("r", request_bytes=1_000_000_000)), 0.0)
    machine.step(decided("r", "cloud-1"), 0.0)
    there = Outcome(
        request_id=RequestId("r"),
        function_id=spec().function_id,
        state=OutcomeState.OK,
        origin=node().node_id,
        node_id=None,
        latency=LatencySplit(run_s=0.1),
        response_bytes=2_000_000_000,
        gb_s=7.0,
        money_usd=0.25,
        link="local",
    )
    answered = PeerReplied(request_id=RequestId("r"), node_id="cloud-1", outcome=there)  # type: ignore[arg-type]
    outcome = reported(machine, answered, 1.0)
    assert outcome.link == "edge-cloud"
    assert outcome.gb_s == 7.0
    assert outcome.money_usd == pytest.approx(0.25 + 1 * (1.0 + 20.0) + 2 * (10.0 + 2.0))


def test_what_did_not_run_here_moved_nothing() -> None:
    machine = NodeMachine(node())
    machine.step(Arrived(request=request("r", timeout_s=0.5, request_bytes=99)), 0.0)
    machine.step(decided("r", "edge-1"), 0.0)
    outcome = reported(machine, Ticked(), 1.0)
    assert (outcome.link, outcome.gb_s, outcome.money_usd) == ("", 0.0, 0.0)


def test_a_link_has_one_name_in_both_directions() -> None:
    for one in Tier:
        for other in Tier:
            assert link_class(one, other) == link_class(other, one)
            assert link_class(one, other) in LINK_CLASSES


def test_placement_follows_the_prices_of_the_view() -> None:
    nodes = (node(memory=4096), node("cloud-1", Tier.CLOUD, memory=4096))
    reading = NodeReading(free=Resources(cpus=1, memory_mib=4096), warm={spec().function_id: 1})
    rows = tuple(NodeView(node=each, reading=reading) for each in nodes)
    dear = TierPrice(usd_per_request=10.0)
    chosen = []
    for tier in (Tier.EDGE, Tier.CLOUD):
        prices = PriceTable(by_tier={**FREE.by_tier, tier: dear})
        view = ClusterView(now_s=0.0, origin=None, nodes=rows, prices=prices)
        decision = create("ect").decide(view, request("r"), np.random.default_rng(0))
        chosen.append(decision.node_ids[0])  # type: ignore[union-attr]
    assert chosen == ["cloud-1", "edge-1"]


# -- idle instances -----------------------------------------------------------------------------


def test_idle_memory_is_metered_from_release_to_the_next_use_and_ends_with_keep_alive() -> None:
    machine = NodeMachine(node())
    function = spec(memory_mib=256, keep_alive_s=10.0)
    machine.step(Arrived(request=request("r", function)), 0.0)
    machine.step(decided("r", "edge-1"), 0.0)
    machine.step(started("edge-1-1"), 1.0)
    assert machine.pool.take_idle_gb_s(1.5) == {}  # it runs
    machine.step(finished("edge-1-1", "r"), 2.0)
    assert machine.pool.take_idle_gb_s(4.0) == {"default/f@1": pytest.approx(0.25 * 2.0)}
    machine.step(Arrived(request=request("s", function)), 6.0)
    machine.step(decided("s", "edge-1"), 6.0)
    machine.step(finished("edge-1-1", "s"), 7.0)
    machine.step(Ticked(), 17.0)  # keep-alive is over
    assert machine.pool.take_idle_gb_s(100.0) == {"default/f@1": pytest.approx(0.25 * (2.0 + 10.0))}
    assert machine.pool.take_idle_gb_s(200.0) == {}
    assert not machine.pool.warm


def test_idle_time_of_several_instances_adds_up() -> None:
    pool = InstancePool(node().node_id, Resources(cpus=4, memory_mib=4096))
    found = [pool.start(spec(memory_mib=1024), 0.0) for _ in range(2)]
    for at_s, started_one in enumerate(found, start=1):
        assert started_one is not None
        pool.now_s = float(at_s)
        pool.release(started_one[0], float(at_s))
    assert pool.take_idle_gb_s(5.0) == {"default/f@1": pytest.approx(4.0 + 3.0)}


# -- the file -----------------------------------------------------------------------------------


def test_the_file_in_the_documentation_holds_the_built_in_prices() -> None:
    found = load_prices(Path(__file__).parents[2] / "docs/prices.toml")
    assert found.is_startup_billed == DEFAULT_PRICES.is_startup_billed
    for tier in Tier:
        for key in TierPrice.__slots__:
            ours = getattr(DEFAULT_PRICES.by_tier[tier], key)
            assert getattr(found.by_tier[tier], key) == pytest.approx(ours), (tier, key)
    assert load_prices(None) is DEFAULT_PRICES


def test_a_file_changes_what_it_names_and_leaves_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text("is_startup_billed = true\n[edge]\nusd_per_million_requests = 2.0\n")
    found = load_prices(path)
    assert found.is_startup_billed
    edge = DEFAULT_PRICES.by_tier[Tier.EDGE]
    assert found.by_tier[Tier.EDGE] == replace(edge, usd_per_request=2e-6)
    assert found.by_tier[Tier.CLOUD] == DEFAULT_PRICES.by_tier[Tier.CLOUD]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[edge]\nusd_per_gbs = 1.0\n", ("usd_per_gbs", "edge", "usd_per_gb_s")),
        ("[moon]\nusd_per_gb_s = 1.0\n", ("moon", "cloud")),
        ("[fog]\nusd_per_gb_s = -1.0\n", ("fog.usd_per_gb_s", "-1.0")),
        ("[fog]\nusd_per_gb_s = nan\n", ("fog.usd_per_gb_s",)),
        ("[fog]\nusd_per_gb_s = 'much'\n", ("fog.usd_per_gb_s",)),
        ("[fog\n", ("prices.toml",)),
    ],
)
def test_a_wrong_price_file_is_refused_by_name(
    text: str, told: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(InvalidArgument) as refusal:
        load_prices(path)
    for words in told:
        assert words in str(refusal.value)
    with pytest.raises(InvalidArgument, match="no price file"):
        load_prices(tmp_path / "none.toml")
