"""Questions on metadata and on several rounds: what came, trust, proof, settings."""

import hashlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from rounds_builders import cosine, crowd, statistics_of

from tierwise.functions.fl import provenance, reputation
from tierwise.functions.fl.answers import facts, history
from tierwise.functions.fl.statistics import RoundStatistics

METADATA = [
    {"loss": 0.5, "lr": 0.1, "note": "fine"},
    {"loss": 1.5, "lr": 0.01},
    {"loss": math.nan, "lr": 0.1},
    {"lr": 0.1, "flag": True},
]


def one(**changes: object) -> RoundStatistics:
    return statistics_of(
        crowd(4, 16),
        counts=[10, 20, 30, 40],
        metadata=METADATA,
        **changes,  # type: ignore[arg-type]
    )


def rounds(count: int, first: int = 0) -> list[RoundStatistics]:
    """Return rounds, each of which starts from what the one before ended with."""
    return [
        statistics_of(
            crowd(4, 16, seed=number),
            round_number=number,
            counts=[10, 20, 30, 40],
            metadata=[{"loss": 2.0 / (number + 1) + 0.01 * row} for row in range(4)],
            base_digest=f"{number:064x}",
            aggregate_digest=f"{number + 1:064x}",
            round_metadata={"accuracy": 0.5 + 0.1 * number, "server_lr": 1.0 + number % 2},
        )
        for number in range(first, first + count)
    ]


# -- one round ----------------------------------------------------------------------------------


def test_the_facts_of_a_round_are_plain() -> None:
    statistics = one(
        expected=("client-0", "client-1", "late", "client-2", "client-3", "bad"),
        quarantined={"bad": "3 numbers are not finite"},
        round_metadata={
            "layout": [[2, 8]],
            "blob": b"123",
            "array": np.zeros((2, 3), dtype=np.float32),
            "scalar": np.float64(0.5),
            "odd": math.inf,
            "kept": (1, {"a": None}),
        },
    )
    found = facts.facts(statistics)
    assert found["clients"][2] == "late"
    assert found["is_in"] == [True, True, False, True, True, False]
    assert found["quarantined"] == {"bad": "3 numbers are not finite"}
    assert found["example_counts"]["client-3"] == 40.0
    assert found["columns"]["loss"] == {
        "client-0": 0.5,
        "client-1": 1.5,
        "client-2": None,
        "client-3": None,
    }
    assert found["round_metadata"] == {
        "layout": [[2, 8]],
        "blob": "(3 bytes)",
        "array": "(float32 array of shape [2, 3])",
        "scalar": 0.5,
        "odd": None,
        "kept": [1, {"a": None}],
    }
    assert not found["is_complete"]
    json.dumps(found, allow_nan=False)


def test_metrics_summarise_what_is_known() -> None:
    found = facts.metrics(one())["columns"]
    loss = found["loss"]
    assert loss["count"] == 2
    assert loss["mean"] == pytest.approx(1.0)
    assert loss["weighted_mean"] == pytest.approx((10 * 0.5 + 20 * 1.5) / 30)
    assert (loss["min_client"], loss["max_client"]) == ("client-0", "client-1")
    assert loss["std"] == pytest.approx(0.5)
    assert found["norm"]["median"] == pytest.approx(np.median(one().norms))
    assert set(found) == {"loss", "lr", "flag", "example_count", "norm", "arrival_s"}
    assert list(facts.metrics(one(), only="lr")["columns"]) == ["lr"]
    with pytest.raises(ValueError, match="no client of round 3 sent 'f1'"):
        facts.metrics(one(), only="f1")


def test_clients_are_ranked_and_those_without_the_column_named() -> None:
    found = facts.rank(one(), by="loss")
    assert [row["client"] for row in found["clients"]] == ["client-1", "client-0"]
    assert found["unknown"] == ["client-2", "client-3"]
    top = facts.rank(one(), by="example_count", top=1)
    assert top["clients"] == [{"client": "client-3", "value": 40.0}]
    first = facts.rank(one(), by="loss", is_ascending=True)["clients"][0]
    assert first["client"] == "client-0"
    with pytest.raises(ValueError, match="no finite 'x'"):
        facts.rank(one(columns={"x": np.full(4, np.nan)}), by="x")


@pytest.mark.parametrize(
    ("where", "matched"),
    [
        ({"lr": "0.1"}, ["client-0", "client-2", "client-3"]),
        ({"lr": "= 0.1", "loss": "< 1"}, ["client-0"]),
        ({"lr": "!= 0.1"}, ["client-1"]),
        ({"loss": ">=1.5"}, ["client-1"]),
        ({"loss": "<= 0.4"}, []),
        ({"example_count": "> 20"}, ["client-2", "client-3"]),
        ({"example_count": 20}, ["client-1"]),
    ],
)
def test_conditions_filter_clients(where: dict[str, str], matched: list[str]) -> None:
    found = facts.matching(one(), where=where)
    assert found["clients"] == matched
    assert list(found["values"]) == matched


@pytest.mark.parametrize("where", [{}, {"loss": "low"}, {"loss": "> nan"}, {"loss": True}, "loss"])
def test_a_condition_that_is_none_says_how_to_write_one(where: object) -> None:
    with pytest.raises(ValueError, match="such as"):
        facts.matching(one(), where=where)  # type: ignore[arg-type]


# -- several rounds -----------------------------------------------------------------------------


def test_a_clients_history_names_every_round_it_was_expected_in() -> None:
    some = rounds(4)
    some[1] = replace(some[1], expected=(*some[1].expected, "x"), quarantined={"x": "too far"})
    some[2] = replace(some[2], expected=(*some[2].expected, "x"))
    found = history.client_history(some, client="x")["rounds"]
    assert found == [
        {"round": 1, "state": "quarantined", "why": "too far"},
        {"round": 2, "state": "missing"},
    ]
    known = history.client_history(some, client="client-1")["rounds"]
    assert [row["round"] for row in known] == [0, 1, 2, 3]
    deltas = crowd(4, 16, seed=2)
    mean = np.average(deltas, axis=0, weights=[10, 20, 30, 40])
    assert known[2]["cosine_with_mean"] == pytest.approx(cosine(deltas[1], mean))
    assert known[2]["norm"] == pytest.approx(np.linalg.norm(deltas[1]))
    assert known[2]["weight"] == pytest.approx(0.2)
    assert known[2]["columns"] == {"loss": pytest.approx(2 / 3 + 0.01)}
    with pytest.raises(ValueError, match="has a client 'eve'"):
        history.client_history(some, client="eve")


def test_reputation_falls_with_every_round_of_harm_and_is_kept_by_absence() -> None:
    some = []
    for number in range(6):
        deltas = crowd(8, 100, seed=number)
        deltas[3] *= -1.0
        each = statistics_of(deltas, round_number=number)
        expected = (*each.expected, "bad", "late")
        some.append(replace(each, expected=expected, quarantined={"bad": "not finite"}))
    beta = history.reputations(some)["reputations"]
    # good and bad rounds with forgetting 0.9: 1 + 0.9 + … of six
    seen = sum(0.9**k for k in range(6))
    assert beta["client-0"] == pytest.approx((3 + seen) / (6 + seen))
    assert beta["client-3"] == beta["bad"] == pytest.approx(3 / (6 + seen))
    assert beta["late"] == 0.5
    smooth = history.reputations(some, method="smoothed")
    assert smooth["reputations"]["client-3"] == 0.0
    assert smooth["reputations"]["late"] is None
    assert smooth["reputations"]["client-0"] > 0.8
    assert smooth["appearances"]["late"] == 0
    assert smooth["appearances"]["bad"] == 6


def test_smoothing_and_beta_are_their_formulas() -> None:
    seen = [np.array([1.0, 0.0, math.nan]), np.array([0.0, math.nan, 1.0])]
    beta = reputation.beta_reputations(seen, forgetting=0.5, prior=1.0)
    assert np.allclose(beta, [(1 + 0.5) / (2 + 1.5), 1 / (2 + 0.5), 2 / 3])
    smooth = reputation.smoothed(seen, keep=0.75)
    assert np.allclose(smooth, [0.75, 0.0, 1.0])
    assert np.allclose(reputation.smoothed(seen, keep=0.75, start=0.5), [0.46875, 0.375, 0.625])
    assert len(reputation.beta_reputations([])) == len(reputation.smoothed([])) == 0


def test_the_chain_is_blake2b_over_canonical_records() -> None:
    some = rounds(3)
    found = history.proof(some)
    link = "0" * 64
    for each in some:
        record = json.dumps(
            {
                "aggregate": each.aggregate_digest,
                "base": each.base_digest,
                "round": each.round,
                "updates": dict(zip(each.clients, each.digests, strict=True)),
            },
            sort_keys=True,
            separators=(",", ":"),
        )
        hashed = hashlib.blake2b(bytes.fromhex(link) + record.encode(), digest_size=32)
        link = hashed.hexdigest()
    assert found["head"] == link
    assert found["breaks"] == []
    assert found["is_as_expected"] is None


@pytest.mark.parametrize("what", ["digest", "aggregate", "client", "dropped"])
def test_any_change_to_the_past_is_noticed_where_it_was_made(what: str) -> None:
    some = rounds(5)
    noted = {row["round"]: row["link"] for row in history.proof(some)["links"]}
    assert history.proof(some, expected=noted)["is_as_expected"]
    forged = list(some)
    if what == "digest":
        forged[2] = replace(some[2], digests=("f" * 64, *some[2].digests[1:]))
    elif what == "aggregate":
        forged[2] = replace(some[2], aggregate_digest="e" * 64)
    elif what == "client":
        forged[2] = replace(some[2], clients=("eve", *some[2].clients[1:]))
    else:
        del forged[2]
        del noted[2]
    found = history.proof(forged, expected=noted)
    assert found["is_as_expected"] is False
    assert found["first_difference"] == (3 if what == "dropped" else 2)
    only_head = history.proof(forged, expected={4: noted[4]})
    assert only_head["first_difference"] == 4, "the head alone tells that something changed"
    if what == "aggregate":
        assert found["breaks"] == [3]


def test_a_chain_goes_on_from_a_noted_link_when_old_rounds_are_gone() -> None:
    some = rounds(6)
    whole = history.proof(some)
    later = history.proof(some[4:], since=4, start=whole["links"][3]["link"])
    assert later["head"] == whole["head"]
    with pytest.raises(ValueError, match="ask with since=4 and start="):
        history.proof(some[4:])
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        history.proof(some, start="abc")
    with pytest.raises(ValueError, match="round 9 is not held"):
        history.proof(some, expected={9: "0" * 64})
    with pytest.raises(ValueError, match="by round"):
        history.proof(some, expected={"x": "y"})
    with pytest.raises(ValueError, match="oldest first"):
        provenance.chain([provenance.Record(round=number, updates={}) for number in (2, 1)])


def test_links_may_be_asked_for_with_text_as_json_has_it() -> None:
    some = rounds(2)
    noted = {str(row["round"]): row["link"].upper() for row in history.proof(some)["links"]}
    assert history.proof(some, expected=noted)["is_as_expected"]


def test_the_best_round_goes_by_the_rounds_metric_or_the_clients_weighted() -> None:
    some = rounds(4)
    assert history.best_round(some, metric="accuracy")["round"] == 3
    found = history.best_round(some, metric="loss", goal="min")
    assert found["round"] == 3
    assert found["value"] == pytest.approx(0.5 + 0.01 * (20 + 60 + 120) / 100)
    assert [row["round"] for row in found["rounds"]] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="no held round knows 'f1'; known are accuracy"):
        history.best_round(some, metric="f1")
    with pytest.raises(ValueError, match="`goal` is one of max, min"):
        history.best_round(some, metric="loss", goal="low")


def test_settings_are_compared_across_clients_and_rounds() -> None:
    per_client = [
        statistics_of(
            crowd(3, 8),
            round_number=number,
            counts=[1, 1, 2],
            metadata=[
                {"lr": 0.1, "accuracy": 0.6},
                {"lr": 0.01, "accuracy": 0.9},
                {"lr": 0.1, "accuracy": 0.7 + 0.1 * number},
            ],
        )
        for number in range(2)
    ]
    found = history.settings(per_client, key="lr", metric="accuracy")["settings"]
    assert [row["setting"] for row in found] == [0.01, 0.1]
    assert found[1]["count"] == 4
    assert found[1]["mean"] == pytest.approx((0.6 + 0.7 + 0.6 + 0.8) / 4)
    assert found[1]["weighted_mean"] == pytest.approx((0.6 + 1.4 + 0.6 + 1.6) / 6)
    assert found[1]["best"] == pytest.approx(0.8)
    assert found[0]["rounds"] == [0, 1]
    of_rounds = history.settings(rounds(4), key="server_lr", metric="accuracy")["settings"]
    assert [(row["setting"], row["rounds"]) for row in of_rounds] == [(2.0, [1, 3]), (1.0, [0, 2])]
    with pytest.raises(ValueError, match="both 'momentum' and 'accuracy'"):
        history.settings(rounds(2), key="momentum", metric="accuracy")


def test_resources_are_summed_by_client() -> None:
    some = [replace(each, columns={"duration_s": np.arange(4.0)}) for each in rounds(3)]
    found = history.resources(some)
    assert found["clients"]["client-2"] == {
        "updates": 3,
        "sent_bytes": 3 * 4 * 16,
        "examples": 90.0,
        "arrival_s": 2.0,
        "duration_s": 6.0,
    }
    assert found["total"] == {
        "updates": 12,
        "sent_bytes": 12 * 64,
        "examples": 300.0,
        "duration_s": 18.0,
    }
    with pytest.raises(ValueError, match="list of names"):
        history.resources(some, columns="loss")
