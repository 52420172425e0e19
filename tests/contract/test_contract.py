"""What must hold for the simulator and for live daemons alike."""

from collections.abc import Iterator

import pytest

from tests.contract.drivers import (
    CLOUD,
    EDGE,
    RUN_S,
    Call,
    Driver,
    Live,
    Simulated,
    start,
)
from tierwise.domain.outcome import OutcomeState
from tierwise.domain.topology import Tier
from tierwise.sdk.local import LINKS, SPEED

ONE_BY_ONE = [Call(0.8 * index) for index in range(4)]


@pytest.fixture(scope="module", params=["simulated", "live"])
def driver(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Driver]:
    if request.param == "simulated":
        yield Simulated()
        return
    cluster = start(tmp_path_factory.mktemp("contract"))
    try:
        yield Live(cluster)
    finally:
        cluster.stop()


def test_edge_only_stays_where_the_user_is_and_moves_nothing(driver: Driver) -> None:
    for outcome in driver.run("edge-only", ONE_BY_ONE):
        assert outcome.state is OutcomeState.OK
        assert outcome.node_id == EDGE
        assert outcome.latency.transfer_s == outcome.latency.return_s == 0.0


def test_cloud_only_pays_the_round_trip_of_the_link(driver: Driver) -> None:
    rtt_s = LINKS["edge-cloud"].rtt_ms / 1e3
    for outcome in driver.run("cloud-only", ONE_BY_ONE):
        assert outcome.node_id == CLOUD
        assert outcome.latency.transfer_s + outcome.latency.return_s >= rtt_s


def test_only_the_first_of_calls_in_a_row_is_cold(driver: Driver) -> None:
    outcomes = driver.run("edge-only", ONE_BY_ONE)
    assert [outcome.is_cold for outcome in outcomes] == [True, False, False, False]
    assert outcomes[0].latency.cold_start_s > 0.0
    assert outcomes[1].latency.cold_start_s == 0.0


def test_a_run_takes_as_much_longer_as_the_node_is_slower(driver: Driver) -> None:
    edge = driver.run("edge-only", ONE_BY_ONE)[-1].latency.run_s
    cloud = driver.run("cloud-only", ONE_BY_ONE)[-1].latency.run_s
    assert cloud > 0.99 * RUN_S
    assert edge / cloud == pytest.approx(SPEED[Tier.CLOUD] / SPEED[Tier.EDGE], rel=0.5)


def test_calls_beyond_the_cpus_wait_in_line(driver: Driver) -> None:
    outcomes = driver.run("edge-only", [Call(0.0), Call(2.0), Call(2.0), Call(2.0)])
    waits = sorted(outcome.latency.queue_s for outcome in outcomes[1:])
    one_run_s = RUN_S / SPEED[Tier.EDGE]
    assert waits[0] < 0.5 * one_run_s
    assert waits[1] > 0.7 * one_run_s
    assert waits[2] > 1.7 * one_run_s


def test_a_function_bound_to_the_cloud_runs_there_whatever_the_policy_prefers(
    driver: Driver,
) -> None:
    for outcome in driver.run("edge-only", [Call(0.0, "cloud-bound")]):
        assert outcome.node_id == CLOUD


def test_the_cloud_costs_more_than_ones_own_edge(driver: Driver) -> None:
    edge = driver.run("edge-only", ONE_BY_ONE)[-1].money_usd
    cloud = driver.run("cloud-only", ONE_BY_ONE)[-1].money_usd
    assert 0.0 < edge < cloud
