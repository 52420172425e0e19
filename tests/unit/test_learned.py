"""The learned policy: its arithmetic, when it steps back, and which files it refuses."""

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from tierwise.domain.decision import Explanation, Placed
from tierwise.domain.function import FunctionProfile, FunctionSpec
from tierwise.domain.ids import NodeId, RequestId
from tierwise.domain.request import Request
from tierwise.domain.resources import Resources
from tierwise.domain.topology import Node, Tier
from tierwise.domain.view import ClusterView, NodeReading, NodeView
from tierwise.errors import InvalidArgument, NotFound
from tierwise.placement.features import CANDIDATES_MAX, FEATURES, SCHEMA
from tierwise.placement.policies import learned
from tierwise.placement.policies.ect import EarliestCompletion
from tierwise.placement.policies.learned import Card, LearnedPolicy, Network, initial, load, save
from tierwise.placement.score import DEFAULT_WEIGHTS
from tierwise.placement.weights import FILE_BYTES_MAX

SPEC = FunctionSpec(namespace="default", name="f", version=1, code_digest="d")
REQUEST = Request(request_id=RequestId("r"), spec=SPEC, origin=NodeId("n-0"))
F = len(FEATURES)
RNG = np.random.default_rng(0)


def view(k: int, **reading: Any) -> ClusterView:
    rows = tuple(
        NodeView(
            node=Node(
                node_id=NodeId(f"n-{i}"),
                tier=Tier(1 + i % 3),
                capacity=Resources(cpus=4, memory_mib=4096),
                speed=0.5 + i / k,
            ),
            reading=NodeReading(
                free=Resources(cpus=2, memory_mib=1024), backlog_s=(i * 7 % 5) / 10, **reading
            ),
        )
        for i in range(k)
    )
    return ClusterView(now_s=0.0, origin=rows[0].node if rows else None, nodes=rows)


def network(hidden: int = 8, seed: int = 0) -> Network:
    rng = np.random.default_rng(seed)
    base = initial(hidden, rng)
    drawn = {
        f.name: rng.normal(size=getattr(base, f.name).shape).astype(np.float32) * np.float32(0.3)
        for f in fields(Network)
    }
    return Network(**{name: np.asarray(a, dtype=np.float32) for name, a in drawn.items()})


def card(**changes: Any) -> Card:
    base = Card(
        name="mine",
        version=3,
        schema=SCHEMA,
        beta=4.0,
        lam=1.0,
        score=asdict(DEFAULT_WEIGHTS),
        low=[-8.0] * F,
        high=[8.0] * F,
        command="tierwise policy train --seed 7",
        seed=7,
        evaluation={"misses": {"ect": 0.06, "mine": 0.05}},
    )
    return msgspec.structs.replace(base, **changes)


def decided(policy: LearnedPolicy, of: ClusterView, request: Request = REQUEST) -> Explanation:
    decision = policy.decide(of, request, RNG)
    assert isinstance(decision, Placed)
    assert decision.explanation is not None
    return decision.explanation


# -- the network --------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [1, 8, 64])
def test_numpy_and_torch_agree_to_five_digits(hidden: int) -> None:
    torch = pytest.importorskip("torch")
    net = network(hidden)
    features = np.random.default_rng(1).normal(size=(5, 16, F)).astype(np.float32)
    mask = np.arange(16) < np.array([[1], [2], [7], [15], [16]])

    w = {f.name: torch.from_numpy(getattr(net, f.name)) for f in fields(Network)}
    x, valid = torch.from_numpy(features), torch.from_numpy(mask)[..., None]
    h = torch.relu(torch.relu(x @ w["w1"] + w["b1"]) @ w["w2"] + w["b2"])
    mean = (h * valid).sum(1) / valid.sum(1)
    best = h.masked_fill(~valid, -torch.inf).max(1).values
    context = torch.cat([mean, best], dim=1)[:, None].expand(-1, 16, -1)
    out = torch.relu(torch.cat([h, context], dim=2) @ w["w3"] + w["b3"]) @ w["w4"] + w["b4"]
    expected = out.masked_fill(~valid[..., 0], 0.0).numpy()

    for i, k in enumerate(mask.sum(axis=1)):
        residual = net.forward(features[i, :k])
        assert residual.dtype == np.float32
        np.testing.assert_allclose(residual, expected[i, :k], rtol=1e-5, atol=1e-5)


def test_forward_leaves_its_input_and_weights_alone() -> None:
    net, features = network(), np.ones((3, F), dtype=np.float32)
    before = [getattr(net, f.name).copy() for f in fields(Network)]
    first = net.forward(features)
    assert (net.forward(features) == first).all()
    assert (features == 1.0).all()
    for f, array in zip(fields(Network), before, strict=True):
        assert (getattr(net, f.name) == array).all()


def test_training_starts_from_a_residual_of_exactly_zero() -> None:
    net = initial(64, np.random.default_rng(7))
    features = np.random.default_rng(1).normal(size=(9, F)).astype(np.float32)
    assert (net.forward(features) == 0.0).all()
    assert net.w1.std() > 0.1
    assert (net.w1 == initial(64, np.random.default_rng(7)).w1).all()


# -- decisions ----------------------------------------------------------------------------------


def test_the_policy_is_named_after_its_card() -> None:
    assert LearnedPolicy(network(), card()).policy_id == "mine@3"


@pytest.mark.parametrize("policy", [
    LearnedPolicy(network(), card(lam=0.0)),
    LearnedPolicy(network(), card(lam=0.0, beta=0.0)),
    LearnedPolicy(initial(8, np.random.default_rng(0)), card()),
])  # fmt: skip
@pytest.mark.parametrize("k", [2, 5, 16, 40])
def test_without_a_residual_the_order_is_that_of_ect(policy: LearnedPolicy, k: int) -> None:
    ours, theirs = (p.decide(view(k), REQUEST, RNG) for p in (policy, EarliestCompletion()))
    assert isinstance(ours, Placed)
    assert isinstance(theirs, Placed)
    assert ours.node_ids == theirs.node_ids


def test_the_residual_can_overrule_the_base_score() -> None:
    policy = LearnedPolicy(network(seed=1), card(lam=1e4))
    why = decided(policy, view(12))
    decision = policy.decide(view(12), REQUEST, RNG)
    assert isinstance(decision, Placed)
    best = max(why.candidates, key=lambda c: c.residual)
    assert decision.node_ids[0] == best.node_id != why.heuristic_choice


def test_with_a_temperature_propensities_are_the_softmax_of_the_logits() -> None:
    policy = LearnedPolicy(network(), card(beta=2.0, temperature=0.5))
    why = decided(policy, view(5), replace(REQUEST, deadline_s=4))
    best = min(c.score for c in why.candidates)
    logits = np.array([-2.0 * (c.score - best) / 4.0 + c.residual for c in why.candidates])
    powers = np.exp(logits / 0.5)
    assert [c.propensity for c in why.candidates] == pytest.approx((powers / powers.sum()).tolist())


def test_nodes_are_drawn_as_often_as_their_propensities_say() -> None:
    policy = LearnedPolicy(network(), card(beta=2.0, temperature=1.0))
    rng = np.random.default_rng(4)
    of = view(4)
    drawn = []
    for _ in range(4000):
        decision = policy.decide(of, replace(REQUEST, deadline_s=4), rng)
        assert isinstance(decision, Placed)
        drawn.append(decision.node_ids[0])
    why = decided(policy, of, replace(REQUEST, deadline_s=4))
    for row in why.candidates:
        assert drawn.count(row.node_id) / 4000 == pytest.approx(row.propensity, abs=0.04)


def test_without_a_temperature_the_largest_logit_is_certain() -> None:
    why = decided(LearnedPolicy(network(), card()), view(5))
    assert sorted(c.propensity for c in why.candidates) == [0.0] * 4 + [1.0]


def test_equal_logits_and_scores_go_by_view_order() -> None:
    row = view(1).nodes[0]
    rows = tuple(
        replace(row, node=replace(row.node, node_id=NodeId(f"n-{i}"), tier=Tier.FOG))
        for i in (3, 1, 2)
    )
    same = ClusterView(now_s=0.0, origin=None, nodes=rows)
    decision = LearnedPolicy(network(), card()).decide(same, REQUEST, RNG)
    assert isinstance(decision, Placed)
    assert decision.node_ids == ("n-3", "n-1", "n-2")


def test_only_the_best_sixteen_are_compared_and_the_rest_follow_by_score() -> None:
    decision = LearnedPolicy(network(), card()).decide(view(40), REQUEST, RNG)
    by_score = EarliestCompletion().decide(view(40), REQUEST, RNG)
    assert isinstance(decision, Placed)
    assert isinstance(by_score, Placed)
    assert decision.explanation is not None
    assert len(decision.explanation.candidates) == CANDIDATES_MAX
    assert set(decision.node_ids[:CANDIDATES_MAX]) == set(by_score.node_ids[:CANDIDATES_MAX])
    assert decision.node_ids[CANDIDATES_MAX:] == by_score.node_ids[CANDIDATES_MAX:]


def test_inputs_outside_the_trained_range_let_the_base_score_decide_and_name_the_column() -> None:
    low, high = [-8.0] * F, [8.0] * F
    low[FEATURES.index("wait")] = high[FEATURES.index("wait")] = 0.0
    policy = LearnedPolicy(network(), card(low=low, high=high, lam=1e4))
    decision = policy.decide(view(6), REQUEST, RNG)
    by_score = EarliestCompletion().decide(view(6), REQUEST, RNG)
    assert isinstance(decision, Placed)
    assert isinstance(by_score, Placed)
    assert decision.node_ids == by_score.node_ids
    why = decided(policy, view(6))
    assert why.fallback == "wait is outside the trained range"
    assert [c.residual for c in why.candidates] == [0.0] * 6
    assert sum(c.propensity for c in why.candidates) == 1.0


def test_what_only_the_request_says_is_held_to_the_trained_range() -> None:
    low, high = [-8.0] * F, [8.0] * F
    high[FEATURES.index("rate")] = float(np.log1p(3.5))
    high[FEATURES.index("items")] = 0.0
    policy = LearnedPolicy(network(), card(low=low, high=high))

    def explained(rate_per_s: float, item_count: int) -> Explanation:
        profiles = {REQUEST.function_id: FunctionProfile(rate_per_s=rate_per_s)}
        seen = replace(view(5), profiles=profiles)
        why = policy.decide(seen, replace(REQUEST, item_count=item_count), RNG)
        assert isinstance(why, Placed) and why.explanation is not None
        return why.explanation

    busy, busier = explained(3.5, 1), explained(50.0, 1)
    assert busier.fallback == "" == explained(50.0, 200).fallback
    assert [c.residual for c in busier.candidates] == [c.residual for c in busy.candidates]
    assert [c.residual for c in explained(0.1, 1).candidates] != [
        c.residual for c in busy.candidates
    ]


@pytest.mark.parametrize("rate_per_s", [0.5, 50.0, 500.0])
@pytest.mark.parametrize("item_count", [1, 64])
def test_the_shipped_policy_decides_by_itself_however_often_a_function_is_called(
    rate_per_s: float, item_count: int
) -> None:
    profiles = {REQUEST.function_id: FunctionProfile(run_s=0.03, rate_per_s=rate_per_s)}
    seen = replace(view(4), profiles=profiles)
    request = replace(REQUEST, item_count=item_count, deadline_s=0.25 * item_count)
    decision = learned.from_package().decide(seen, request, RNG)
    assert isinstance(decision, Placed) and decision.explanation is not None
    assert decision.explanation.fallback == ""


def test_a_margin_around_the_trained_range_is_tolerated() -> None:
    low, high = [-8.0] * F, [8.0] * F
    column = FEATURES.index("queued")
    low[column], high[column] = 0.0, float(np.log1p(0.5))  # 2 queued on 4 CPUs
    policy = LearnedPolicy(network(), card(low=low, high=high))
    assert decided(policy, view(4, queued=3)).fallback == ""
    assert decided(policy, view(4, queued=9)).fallback.startswith("queued")


def test_a_residual_that_is_not_finite_lets_the_base_score_decide() -> None:
    net = network()
    huge = np.full_like(net.w4, 3e38)
    policy = LearnedPolicy(replace(net, w4=huge, b3=np.full_like(net.b3, 1e3)), card())
    assert decided(policy, view(4)).fallback == "the network gave no finite number"


# -- files --------------------------------------------------------------------------------------


def test_a_saved_policy_loads_as_it_was() -> None:
    net = network(64)
    loaded = load(*save(net, card()))
    assert loaded.card == card()
    for f in fields(Network):
        assert (getattr(loaded.network, f.name) == getattr(net, f.name)).all()
    one, two = (
        LearnedPolicy(net, card()).decide(view(16), REQUEST, RNG),
        loaded.decide(view(16), REQUEST, RNG),
    )
    assert one == two


def arrays_of(net: Network) -> dict[str, NDArray[Any]]:
    return {f.name: getattr(net, f.name) for f in fields(Network)}


def npz(arrays: dict[str, NDArray[Any]], pack: Callable[..., None] = np.savez) -> bytes:
    buffer = io.BytesIO()
    pack(buffer, **arrays)
    return buffer.getvalue()


def refused(weights: bytes, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        load(weights, save(network(), card())[1])


def test_a_missing_or_additional_array_is_refused() -> None:
    arrays = arrays_of(network())
    refused(npz({**arrays, "w5": arrays["w4"]}), "exactly the arrays")
    del arrays["w4"]
    refused(npz(arrays), "exactly the arrays")


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("w2", np.zeros((8, 9), np.float32), r"w2 is float32\(8, 9\); it must be float32\(8, 8\)"),
        ("b1", np.zeros(8, np.float64), "b1 is float64"),
        ("b1", np.zeros(8, ">f4"), "b1 is >f4"),
        ("w1", np.zeros((23, 8), np.float32), "24 rows"),
        ("w1", np.zeros((24, 0), np.float32), "1 to 512 columns"),
        ("w1", np.zeros((24, 513), np.float32), "1 to 512 columns"),
        ("w1", np.zeros(24, np.float32), "24 rows"),
        ("w4", np.array([np.nan] * 8, np.float32), "w4 holds numbers that are not finite"),
        ("b4", np.array(np.inf, np.float32), "b4 holds numbers that are not finite"),
    ],
)
def test_a_wrong_shape_type_or_number_is_refused_by_name(
    name: str, array: NDArray[Any], words: str
) -> None:
    refused(npz({**arrays_of(network()), name: array}), words)


class Trap:
    """Unpickling this would run code."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (pytest.fail, ("a pickle was executed",))


def test_a_pickled_array_is_refused_and_never_executed() -> None:
    trap = np.array([Trap()] * 8, dtype=object)
    refused(npz({**arrays_of(network()), "b1": trap}), "b1 is object")


@pytest.mark.parametrize("weights", [b"", b"PK\x03\x04", b"\x80\x04.", b"not a zip" * 100])
def test_what_is_no_archive_is_refused(weights: bytes) -> None:
    refused(weights, "no policy file")


def test_a_file_beyond_the_bound_is_refused_unread() -> None:
    refused(bytes(FILE_BYTES_MAX + 1), "at most")


def test_a_bomb_is_refused_before_it_inflates() -> None:
    bomb = npz({**arrays_of(network()), "w2": np.zeros((4096, 4096), np.float32)},
               np.savez_compressed)  # fmt: skip
    assert len(bomb) < 1 << 20
    refused(bomb, "inflates beyond")


def rewritten(change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    source, out = io.BytesIO(save(network(), card())[0]), io.BytesIO()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out.getvalue()


def test_a_bomb_that_understates_its_size_stops_at_the_declared_size() -> None:
    honest = npz({**arrays_of(network()), "w2": np.zeros((4096, 4096), np.float32)},
                 np.savez_compressed)  # fmt: skip
    with zipfile.ZipFile(io.BytesIO(honest)) as archive:
        declared = archive.getinfo("w2.npy").file_size
    lie = honest.replace(declared.to_bytes(4, "little"), (384).to_bytes(4, "little"))
    assert lie != honest
    refused(lie, "no policy file|w2")


def test_a_header_that_claims_more_than_there_is_allocates_nothing() -> None:
    def claim(name: str, content: bytes) -> bytes:
        if name != "w3.npy":
            return content
        out = io.BytesIO()
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)}
        np.lib.format.write_array_header_1_0(out, header)
        return out.getvalue() + bytes(16)

    refused(rewritten(claim), r"w3 is float32\(1000000, 1000000\)")

    def cut(name: str, content: bytes) -> bytes:
        return content[:-4] if name == "b3.npy" else content

    refused(rewritten(cut), "b3 holds more or less data")


def test_other_compressions_are_refused() -> None:
    refused(rewritten(lambda _, content: content, zipfile.ZIP_LZMA), "stored or deflated")


@pytest.mark.filterwarnings("ignore::UserWarning")  # of zipfile, on the duplicate
def test_an_array_that_is_there_twice_is_refused() -> None:
    buffer = io.BytesIO(save(network(), card())[0])
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("w1.npy", archive.read("w1.npy"))
    refused(buffer.getvalue(), "exactly the arrays")


def test_a_damaged_file_is_refused_or_still_a_policy_but_nothing_else() -> None:
    weights, about = save(network(4), card())
    rng = np.random.default_rng(5)
    for _ in range(1500):
        damaged = bytearray(weights)
        for position in rng.integers(len(weights), size=rng.integers(1, 4)):
            damaged[position] = rng.integers(256)
        try:
            load(bytes(damaged), about)
        except InvalidArgument:
            continue


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": SCHEMA + 1}, "train it again"),
        ({"name": "No Name"}, "name"),
        ({"version": 0}, "version"),
        ({"beta": -1.0}, "beta"),
        ({"lam": 1e300}, "lam"),
        ({"score": {**asdict(DEFAULT_WEIGHTS), "luck": 1.0}}, "unknown: luck"),
        ({"score": {}}, "missing or unknown: cold_start, displaced"),
        ({"score": {**asdict(DEFAULT_WEIGHTS), "cold_start": -0.1}}, "cold_start is -0.1"),
        ({"low": [0.0]}, "24 numbers"),
        ({"low": [1.0] * F, "high": [0.0] * F}, "range of path"),
    ],
)
def test_a_card_that_makes_no_sense_is_refused_by_field(
    changes: dict[str, Any], words: str
) -> None:
    weights, about = save(network(), card(**changes))
    with pytest.raises(InvalidArgument, match=words):
        load(weights, about)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"name": "' + b"x" * (1 << 20) + b'"}',
        json.dumps({**json.loads(save(network(), card())[1]), "beta": "4"}).encode(),
        save(network(), card())[1].replace(b"4.0", b"NaN"),
        save(network(), card())[1].replace(b"4.0", b"1e999"),
        save(network(), card())[1].replace(b'"misses":', b'"deep":' + b"[" * 5000),
    ],
)
def test_a_card_that_is_not_the_expected_json_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidArgument, match="card"):
        load(save(network(), card())[0], text)


def test_without_a_shipped_file_the_learned_policy_is_not_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path)
    with pytest.raises(NotFound, match="use ect"):
        learned.from_package()
