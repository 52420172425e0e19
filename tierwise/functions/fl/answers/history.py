"""Questions about several rounds: one client's way, trust, proof, and which settings did best."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from tierwise.functions.fl import filtering, provenance, reputation
from tierwise.functions.fl.answers.facts import check_goal, mean_of, plain
from tierwise.functions.fl.geometry import Float, cosines_with_sum, shares
from tierwise.functions.fl.question import (
    Answer,
    History,
    Question,
    by_client,
    check_choice,
    check_held,
    check_range,
    column,
    named,
    number,
)
from tierwise.functions.fl.statistics import RoundStatistics

METHODS = ("beta", "smoothed")


def client_history(history: History, *, client: str) -> Answer:
    """Return a client's length, cosine with the round's mean, weight and numbers, by round."""
    check_held(history)
    rounds: list[Answer] = []
    for statistics in history:
        if client in statistics.clients:
            row = statistics.clients.index(client)
            weights = shares(statistics.example_counts)
            cosines = cosines_with_sum(statistics.gram, weights, statistics.norms)
            rounds.append(
                {
                    "round": statistics.round,
                    "state": "in",
                    "norm": float(statistics.norms[row]),
                    "cosine_with_mean": float(cosines[row]),
                    "weight": float(weights[row]),
                    "arrival_s": number(float(statistics.arrival_s[row])),
                    "columns": {
                        name: float(values[row])
                        for name, values in statistics.columns.items()
                        if np.isfinite(values[row])
                    },
                }
            )
        elif client in statistics.quarantined:
            why = statistics.quarantined[client]
            rounds.append({"round": statistics.round, "state": "quarantined", "why": why})
        elif client in statistics.expected:
            rounds.append({"round": statistics.round, "state": "missing"})
    if not rounds:
        known = dict.fromkeys(name for each in history for name in each.expected)
        raise ValueError(
            f"no held round of {history[-1].job!r} has a client {client!r}; they have "
            f"{named(list(known))}"
        )
    return {"client": client, "rounds": rounds}


def reputations(
    history: History,
    *,
    method: str = "beta",
    forgetting: float = 0.9,
    prior: float = 3.0,
    keep: float = 0.8,
) -> Answer:
    """Return trust in each client: by the cosine filter's verdicts, or by cosines themselves."""
    check_held(history)
    check_choice("method", method, METHODS)
    check_range("forgetting", forgetting, 1e-6, 1.0)
    check_range("prior", prior, 1e-6, 1e6)
    check_range("keep", keep, 0.0, 1.0 - 1e-9)
    names = list(dict.fromkeys(name for each in history for name in each.expected))
    place = {name: row for row, name in enumerate(names)}
    seen: list[Float] = []
    for statistics in history:
        values = np.full(len(names), np.nan)
        values[[place[name] for name in statistics.quarantined if name in place]] = 0.0
        if statistics.clients:
            rows = [place[name] for name in statistics.clients]
            stays, cosines = filtering.adaptive_cosine(
                statistics.gram, shares(statistics.example_counts)
            )
            values[rows] = stays if method == "beta" else np.maximum(cosines, 0.0)
        seen.append(values)
    if method == "beta":
        found = reputation.beta_reputations(seen, forgetting=forgetting, prior=prior)
    else:
        found = reputation.smoothed(seen, keep=keep)
    appearances = np.isfinite(np.stack(seen)).sum(axis=0)
    return {
        "reputations": by_client(names, found),
        "appearances": by_client(names, appearances),
        "rounds": [statistics.round for statistics in history],
    }


def proof(
    history: History,
    *,
    since: int = 0,
    start: str = provenance.GENESIS,
    expected: dict[str, str] | None = None,
) -> Answer:
    """Return the chain of hashes over rounds, its head, and where it is not what it was.

    `breaks` names rounds that did not start from what the round before ended with.
    """
    check_held(history)
    some = [statistics for statistics in history if statistics.round >= since]
    if not some or some[0].round != since:
        first = some[0].round if some else history[0].round
        raise ValueError(
            f"round {since} is not held, so the chain cannot begin there: ask with since={first} "
            f"and start=<the link before round {first}>, as it was noted when that was the head"
        )
    wanted = _links(expected)
    records = [
        provenance.Record(
            round=statistics.round,
            updates=dict(zip(statistics.clients, statistics.digests, strict=True)),
            aggregate=statistics.aggregate_digest,
            base=statistics.base_digest,
        )
        for statistics in some
    ]
    chain = provenance.chain(records, start)
    links = dict(zip((record.round for record in records), chain, strict=True))
    breaks = [
        after.round
        for before, after in pairwise(some)
        if after.base_digest
        and before.aggregate_digest
        and after.round == before.round + 1
        and after.base_digest != before.aggregate_digest
    ]
    differs = provenance.first_difference(links, wanted)
    return {
        "head": chain[-1],
        "links": [
            {"round": record.round, "link": links[record.round], "updates": len(record.updates)}
            for record in records
        ],
        "breaks": breaks,
        "is_as_expected": None if not wanted else differs is None,
        "first_difference": differs,
    }


def best_round(history: History, *, metric: str, goal: str = "max") -> Answer:
    """Return the round with the best value of a metric, and the value of each."""
    check_held(history)
    sign = check_goal(goal)
    known = [(each, value) for each in history if (value := mean_of(each, metric)) is not None]
    if not known:
        raise ValueError(_no_metric(history, metric))
    best, value = max(known, key=lambda pair: sign * pair[1])
    return {
        "round": best.round,
        "value": value,
        "metric": metric,
        "rounds": [{"round": each.round, "value": value} for each, value in known],
    }


def settings(history: History, *, key: str, metric: str, goal: str = "max") -> Answer:
    """Return how clients and rounds did by the value of a hyper-parameter, the best first.

    The hyper-parameter is a column of the clients' metadata, else of the round's.
    """
    check_held(history)
    sign = check_goal(goal)
    groups: dict[Any, list[tuple[float, float, int]]] = {}
    for statistics in history:
        for setting, value, weight in _observed(statistics, key, metric):
            groups.setdefault(setting, []).append((value, weight, statistics.round))
    if not groups:
        raise ValueError(
            f"no update came with both {key!r} and {metric!r}, nor did a round: "
            f"{_no_metric(history, metric)}"
        )
    found = []
    for setting, rows in groups.items():
        values = np.array([value for value, _, _ in rows])
        weights = shares([weight for _, weight, _ in rows])
        found.append(
            {
                "setting": setting,
                "count": len(rows),
                "mean": float(values.mean()),
                "weighted_mean": float(weights @ values),
                "std": float(values.std()),
                "best": float(values[int((sign * values).argmax())]),
                "rounds": sorted({number for _, _, number in rows}),
            }
        )
    found.sort(key=lambda group: -sign * float(group["weighted_mean"]))
    return {"key": key, "metric": metric, "settings": found}


def resources(history: History, *, columns: Sequence[str] = ("duration_s",)) -> Answer:
    """Return what each client has sent and spent over rounds: updates, bytes, sums of columns."""
    check_held(history)
    if isinstance(columns, str) or not all(isinstance(name, str) for name in columns):
        raise ValueError('`columns` is a list of names, such as ["duration_s", "energy_j"]')
    totals: dict[str, dict[str, float]] = {}
    for statistics in history:
        known = [name for name in columns if name in statistics.columns]
        for row, client in enumerate(statistics.clients):
            own = totals.setdefault(
                client, {"updates": 0, "sent_bytes": 0, "examples": 0.0, "arrival_s": 0.0}
            )
            own["updates"] += 1
            own["sent_bytes"] += 4 * statistics.parameter_count
            own["examples"] += float(statistics.example_counts[row])
            own["arrival_s"] += float(statistics.arrival_s[row])
            for name in known:
                value = float(statistics.columns[name][row])
                if np.isfinite(value):
                    own[name] = own.get(name, 0.0) + value
    for own in totals.values():
        own["arrival_s"] /= own["updates"]  # a mean: rounds overlap with nothing
    names = ("updates", "sent_bytes", "examples", *columns)
    return {
        "clients": totals,
        "total": {name: sum(own.get(name, 0.0) for own in totals.values()) for name in names},
        "rounds": [statistics.round for statistics in history],
    }


def _observed(statistics: RoundStatistics, key: str, metric: str) -> list[tuple[Any, float, float]]:
    """Return setting, metric and weight, of each client if it sent the setting, else of the round.

    Only then is a round's own metric used.
    """
    if key in statistics.columns and metric in statistics.columns:
        chosen, values = column(statistics, key), column(statistics, metric)
        rows = np.flatnonzero(np.isfinite(chosen) & np.isfinite(values))
        return [
            (float(chosen[row]), float(values[row]), float(statistics.example_counts[row]))
            for row in rows
        ]
    if key in statistics.round_metadata:
        value = mean_of(statistics, metric)
        setting = plain(statistics.round_metadata[key])
        if value is not None:
            if isinstance(setting, (list, dict)):
                setting = str(setting)
            return [(setting, value, float(statistics.example_counts.sum()) or 1.0)]
    return []


def _links(expected: Any) -> dict[int, str]:
    if expected is None:
        return {}
    try:
        return {int(number): str(link) for number, link in expected.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError("`expected` is a dict of links by round, as `links` lists them") from None


def _no_metric(history: History, metric: str) -> str:
    known = dict.fromkeys(
        name for each in history for name in (*each.round_metadata, *each.columns)
    )
    return f"no held round knows {metric!r}; known are {named(list(known))}"


_METRIC = "number in the round's metadata, else the mean of clients' weighted by examples"
_GOAL = "max or min"

QUESTIONS = (
    Question(
        name="client-history",
        summary="One client's rounds: length, cosine with the mean, weight, numbers",
        needs="statistics",
        function=client_history,
        arguments={"client": "whose"},
        source="the cache",
        rounds=64,
    ),
    Question(
        name="reputation",
        summary="Trust in each client, from what it did over rounds",
        needs="statistics",
        function=reputations,
        arguments={
            "method": "beta (verdicts of the cosine filter) or smoothed (cosines)",
            "forgetting": "beta: weight of a round after one more, 1 forgets nothing",
            "prior": "beta: good and bad rounds that each begins with",
            "keep": "smoothed: weight of the past",
        },
        source="Jøsang and Ismail 2002; Muñoz-González et al. 2019; Xu and Lyu 2020",
        rounds=16,
    ),
    Question(
        name="provenance",
        summary="Chain of hashes over all rounds, and where it is not what it was",
        needs="statistics",
        function=proof,
        arguments={
            "since": "first round of the chain",
            "start": "link before it",
            "expected": "links by round that were noted earlier, to be checked",
        },
        source="Haber and Stornetta 1991, section 5",
        rounds=0,
    ),
    Question(
        name="best-round",
        summary="The round with the best value of a metric",
        needs="statistics",
        function=best_round,
        arguments={"metric": _METRIC, "goal": _GOAL},
        source="the cache",
        rounds=0,
    ),
    Question(
        name="settings",
        summary="How rounds and clients did by the value of a hyper-parameter",
        needs="statistics",
        function=settings,
        arguments={"key": "the hyper-parameter", "metric": _METRIC, "goal": _GOAL},
        source="the cache",
        rounds=0,
    ),
    Question(
        name="resources",
        summary="What each client sent and spent over rounds",
        needs="statistics",
        function=resources,
        arguments={"columns": "columns that are summed besides"},
        source="the cache",
        rounds=64,
    ),
)
