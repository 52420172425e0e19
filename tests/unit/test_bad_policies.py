"""Bad policies, as files and as code: a clear error or a fallback, and nothing is ever executed."""

import io
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from structlog.testing import capture_logs

from agent.policies import PolicySlots
from envs.simulator import Simulator
from envs.world import make_world
from tests.property.test_placement import learned as random_policy
from tests.property.test_placement import requests, views
from tests.unit.test_decider import Scripted, decider, raises
from tests.unit.test_learned import arrays_of, card, network, npz
from tierwise.domain.decision import NotPlaced
from tierwise.domain.request import Request
from tierwise.domain.topology import NodeState
from tierwise.domain.view import ClusterView
from tierwise.errors import InvalidArgument, NotFound
from tierwise.placement.feasibility import feasible
from tierwise.placement.policies.learned import load, save
from tierwise.placement.policy import Policy, create, names
from tierwise.placement.weights import FILE_BYTES_MAX
from tierwise.v1 import node_pb2

WEIGHTS, CARD = save(network(), card())


class Trap:
    """Unpickling this leaves a mark on the disk."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.mark), "w")


def as_zip(entries: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return out.getvalue()


def disguised(trap: Trap) -> dict[str, bytes]:
    """Return files that run code in the hands of whoever unpickles them."""
    pickled = pickle.dumps(trap)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|O", "fortran_order": False, "shape": (24, 8)}
    )
    arrays = arrays_of(network())
    return {
        "a bare pickle": pickled,
        "a pickle that begins like a zip": b"PK\x03\x04" + pickled,
        "a pickle with a whole policy after it": pickled + WEIGHTS,
        "a policy with a pickle after it": WEIGHTS + pickled,
        "a torch file": as_zip({"archive/data.pkl": pickled, "archive/version": b"3"}),
        "pickles by the names of arrays": as_zip({f"{name}.npy": pickled for name in arrays}),
        "an object array": npz({**arrays, "b1": np.array([trap] * 8, dtype=object)}),
        "an object array that is read first": npz({**arrays, "w1": np.array(trap, dtype=object)}),
        "a header that promises objects": as_zip(
            {f"{name}.npy": header.getvalue() + pickled for name in arrays}
        ),
        "an array file alone": (
            lambda out: (np.save(out, np.array([trap], dtype=object)), out.getvalue())[1]
        )(io.BytesIO()),
    }


KINDS = tuple(disguised(Trap(Path("unused"))))


def test_the_trap_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "mark"))).close()
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_in_disguise_is_refused_and_nothing_is_executed(kind: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    file = disguised(Trap(mark))[kind]
    try:
        loaded = load(file, CARD)
    except InvalidArgument:
        pass
    else:  # a zip may have something around it: the policy inside is all that was read
        assert kind in ("a pickle with a whole policy after it", "a policy with a pickle after it")
        assert (loaded.network.w1 == network().w1).all()
    with pytest.raises(InvalidArgument, match="card"):
        load(WEIGHTS, pickle.dumps(Trap(mark)))
    assert not mark.exists()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_node_that_is_told_to_use_such_a_file_goes_on_as_before(
    kind: str, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    file = disguised(Trap(mark))[kind]

    async def fetch(policy_id: str) -> tuple[bytes, bytes]:
        return (file, CARD) if policy_id == "evil@1" else (WEIGHTS, pickle.dumps(Trap(mark)))

    before = create("soft-ect")
    assignment = node_pb2.PolicyAssignment(
        policy_id="cardless@1",
        shadow=node_pb2.PolicyRef(policy_id="evil@1"),
        canary=node_pb2.CanaryAssignment(
            policy=node_pb2.PolicyRef(policy_id="evil@1"), share=0.5, block_s=1.0
        ),
    )
    slots = PolicySlots(tmp_path / "policy")
    duties = await slots.assign(assignment, fetch, before, now_s=0.0, wall_s=0.0)
    assert duties.active is before
    PolicySlots(tmp_path / "policy").restore("ect", now_s=0.0, wall_s=0.0)
    assert not mark.exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99, 0.999])
def test_a_truncated_file_is_refused(share: float) -> None:
    with pytest.raises(InvalidArgument, match="no policy file"):
        load(WEIGHTS[: int(share * len(WEIGHTS))], CARD)
    with pytest.raises(InvalidArgument, match="card"):
        load(WEIGHTS, CARD[: int(share * len(CARD))])


def test_an_oversized_file_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="at most"):
        load(WEIGHTS + bytes(FILE_BYTES_MAX), CARD)


@pytest.mark.parametrize("name", sorted(arrays_of(network())))
@pytest.mark.parametrize("figure", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_refused_wherever_it_is(name: str, figure: float) -> None:
    arrays = {key: np.array(array) for key, array in arrays_of(network()).items()}
    arrays[name].flat[-1] = figure
    with pytest.raises(InvalidArgument, match=f"{name} holds numbers that are not finite"):
        load(npz(arrays), CARD)


# -- policies as code ----------------------------------------------------------------------------


@given(view=views(), request=requests)
@settings(max_examples=100, deadline=None)
def test_whatever_a_policy_does_no_call_is_placed_on_a_masked_node(
    view: ClusterView, request: Request
) -> None:
    candidates, masked = feasible(view, request)
    allowed = {row.node.node_id for row in candidates}
    for policy in (
        Scripted(raises),
        Scripted(lambda *_: None),  # type: ignore[arg-type, return-value]
        random_policy(bound=1e-3),  # falls back nearly always
    ):
        who = decider(policy)
        for _ in range(3):  # the first opens the breaker of some
            with capture_logs():
                decision, _ = who.decide(view, request)
            if isinstance(decision, NotPlaced):
                assert not allowed
                assert dict(decision.reasons) == dict(masked)
            else:
                assert set(decision.node_ids) == allowed


@given(view=views(nodes_min=1), request=requests)
@settings(max_examples=50, deadline=None)
def test_with_every_node_masked_even_a_broken_policy_gives_every_nodes_reason(
    view: ClusterView, request: Request
) -> None:
    lost = replace(
        view, nodes=tuple(replace(row, state=NodeState.LOST) for row in view.nodes), origin=None
    )
    with capture_logs():
        decision, _ = decider(Scripted(raises)).decide(lost, request)
    assert isinstance(decision, NotPlaced)
    assert {node_id for node_id, _ in decision.reasons} == {n.node.node_id for n in lost.nodes}


def policy_called(name: str) -> Policy:
    try:
        return create(name)
    except NotFound as error:  # this installation ships no trained policy
        pytest.skip(str(error))


@pytest.mark.parametrize("name", names())
def test_the_same_seed_gives_the_same_decision_log(name: str) -> None:
    def log() -> list[object]:
        simulator = Simulator(make_world("campus", 3, request_count=60), 4)
        outcomes = simulator.run(policy_called(name))
        return [(o.request_id, o.policy_id, o.node_id, o.explanation) for o in outcomes]

    first = log()
    assert len(first) >= 60
    assert first == log()
