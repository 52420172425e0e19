"""Features: what each column means, and that scale and order do what the network relies on."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tierwise.cost.estimate import Estimates, estimate
from tierwise.domain.function import FunctionProfile, FunctionSpec, Priority
from tierwise.domain.ids import NodeId, RequestId
from tierwise.domain.request import Request
from tierwise.domain.resources import Resources
from tierwise.domain.topology import Link, LinkTable, Node, Tier
from tierwise.domain.view import ClusterView, NodeReading, NodeView
from tierwise.placement.features import BOUND, FEATURES, SCHEMA, encode
from tierwise.placement.score import base_score, sole_score

SPEC = FunctionSpec(namespace="default", name="f", version=1, code_digest="d")
REQUEST = Request(request_id=RequestId("r"), spec=SPEC, origin=NodeId("edge-1"), request_bytes=999)
EDGE = Node(
    node_id=NodeId("edge-1"),
    tier=Tier.EDGE,
    capacity=Resources(cpus=4, memory_mib=1000),
    speed=0.5,
)
CLOUD = replace(EDGE, node_id=NodeId("cloud-1"), tier=Tier.CLOUD, speed=2.0)
LINK = Link(rtt_s=0.1, bandwidth_bytes_per_s=1e6)


def view(*rows: NodeView, **changes: Any) -> ClusterView:
    base = ClusterView(
        now_s=10.0,
        origin=EDGE,
        nodes=rows or (row(EDGE), row(CLOUD)),
        links=LinkTable(default=LINK),
        profiles={SPEC.function_id: FunctionProfile(run_s=0.1, cold_start_s=0.4, rate_per_s=2.0)},
    )
    return replace(base, **changes)


def row(node: Node, **changes: Any) -> NodeView:
    reading = NodeReading(free=Resources(cpus=1, memory_mib=250))
    return replace(NodeView(node=node, reading=reading, received_at_s=10.0), **changes)


def encoded(of: ClusterView, request: Request = REQUEST) -> NDArray[np.float32]:
    estimates = estimate(of, request, of.nodes)
    return encode(of, request, estimates, base_score(estimates, request))


def column(features: NDArray[np.float32], name: str) -> list[float]:
    return [float(x) for x in features[:, FEATURES.index(name)]]


def test_schema_1_has_24_distinct_columns() -> None:
    assert SCHEMA == 1
    assert len(FEATURES) == len(set(FEATURES)) == 24
    features = encoded(view())
    assert features.shape == (2, 24)
    assert features.dtype == np.float32


def test_times_are_ratios_to_the_deadline_log_compressed() -> None:
    features = encoded(view(), replace(REQUEST, deadline_s=0.8))
    assert column(features, "run") == pytest.approx(
        [math.log1p(4 * 0.2 / 0.8), math.log1p(4 * 0.05 / 0.8)]
    )
    assert column(features, "cold_start") == pytest.approx(
        [math.log1p(4 * 0.8 / 0.8), math.log1p(4 * 0.2 / 0.8)]
    )
    path_s = 0.05 + 999e-6 + 0.05 + 1024e-6
    assert column(features, "path") == pytest.approx([0.0, math.log1p(4 * path_s / 0.8)])


def test_the_time_columns_do_not_change_when_every_time_and_the_deadline_grow_alike() -> None:
    slow = FunctionProfile(run_s=10.0, cold_start_s=40.0, response_bytes=102400, rate_per_s=2.0)
    small = encoded(view())
    large = encoded(
        view(
            profiles={SPEC.function_id: slow},
            links=LinkTable(default=Link(rtt_s=10.0, bandwidth_bytes_per_s=1e6)),
        ),
        replace(REQUEST, deadline_s=100.0, request_bytes=99900),
    )
    for name in ("path", "wait", "cold_start", "run", "displaced", "pending", "lateness"):
        assert column(small, name) == pytest.approx(column(large, name), rel=1e-5)


def test_lateness_is_positive_exactly_where_the_deadline_will_be_missed() -> None:
    for deadline_s in (0.1, 0.3, 0.5, 0.9, 1.1):
        request = replace(REQUEST, deadline_s=deadline_s)
        estimates = estimate(view(), request, view().nodes)
        is_late = (estimates.latency_s > deadline_s).tolist()
        assert [x > 0.0 for x in column(encoded(view(), request), "lateness")] == is_late


def test_the_best_candidate_has_no_score_gap_and_the_others_have_one() -> None:
    gaps = column(encoded(view()), "score_gap")
    assert min(gaps) == 0.0
    assert max(gaps) > 0.0


def test_load_columns_read_the_nodes_reading() -> None:
    reading = NodeReading(
        free=Resources(cpus=1, memory_mib=250), queued=8, warm={SPEC.function_id: 3}
    )
    features = encoded(view(row(EDGE, reading=reading, received_at_s=7.0, pending_s=0.5)))
    assert column(features, "queued") == pytest.approx([math.log1p(2.0)])
    assert column(features, "warm") == pytest.approx([math.log1p(3.0)])
    assert column(features, "age") == pytest.approx([math.log1p(3.0)])
    assert column(features, "pending") == pytest.approx([math.log1p(2.0)])
    assert column(features, "cpu_free") == [0.25]
    assert column(features, "memory_free") == [0.25]


def test_flags_tell_tier_origin_and_data() -> None:
    fog = replace(EDGE, node_id=NodeId("fog-1"), tier=Tier.FOG)
    request = replace(REQUEST, data_nodes=(NodeId("fog-1"),), data_bytes=5)
    features = encoded(view(row(EDGE), row(fog), row(CLOUD)), request)
    assert column(features, "is_edge") == [1.0, 0.0, 0.0]
    assert column(features, "is_cloud") == [0.0, 0.0, 1.0]
    assert column(features, "is_origin") == [1.0, 0.0, 0.0]
    assert column(features, "holds_data") == [0.0, 1.0, 0.0]
    assert column(features, "speed") == [-1.0, -1.0, 1.0]


def test_request_columns_are_the_same_for_all_candidates() -> None:
    request = replace(REQUEST, priority=Priority.CRITICAL, deadline_s=10.0, item_count=8)
    features = encoded(view(), request)
    assert column(features, "priority") == [1.0, 1.0]
    assert column(features, "deadline") == [1.0, 1.0]
    assert column(features, "bytes") == [0.0, 0.0]
    assert column(features, "rate") == pytest.approx([math.log(3.0)] * 2)
    assert column(features, "items") == pytest.approx([math.log(8.0)] * 2)


def test_a_reading_from_the_future_has_age_zero() -> None:
    assert column(encoded(view(row(EDGE, received_at_s=11.0))), "age") == [0.0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_overflow_and_not_a_number_become_bounds() -> None:
    terms = np.full((2, 7), np.inf)
    terms[1] = np.nan
    rows = (row(EDGE), row(CLOUD, pending_s=float("nan")))
    features = encode(view(*rows), REQUEST, Estimates(rows, terms), np.array([np.inf, np.nan]))
    assert np.isfinite(features).all()
    assert np.abs(features).max() <= BOUND


def test_a_passed_deadline_still_encodes() -> None:
    features = encoded(view(), replace(REQUEST, deadline_s=-5.0))
    assert np.abs(features).max() <= BOUND


def test_without_candidates_there_is_nothing_to_encode() -> None:
    with pytest.raises(ValueError, match="no candidate"):
        encode(view(), REQUEST, Estimates((), np.empty((0, 7))), np.empty(0))


def test_the_score_of_a_sole_candidate_is_the_base_score() -> None:
    for deadline_s in (0.01, 0.5, 5.0):
        request = replace(REQUEST, deadline_s=deadline_s, priority=Priority.HIGH)
        estimates = estimate(view(), request, view().nodes)
        rows = [sole_score(terms, request) for terms in estimates.terms.tolist()]
        assert rows == pytest.approx(base_score(estimates, request).tolist())
