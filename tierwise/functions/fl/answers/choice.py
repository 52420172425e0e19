"""Questions about weights for one client's model, and about whom to ask next."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tierwise.functions.fl import personalisation, scheduling
from tierwise.functions.fl.geometry import Float, distances_squared, median, shares
from tierwise.functions.fl.question import (
    Answer,
    History,
    Question,
    by_client,
    check_any,
    check_choice,
    check_held,
    check_range,
    column,
    generator,
    known_rows,
    named,
    row_of,
)
from tierwise.functions.fl.statistics import RoundStatistics


def accuracy_weights(
    statistics: RoundStatistics, *, metric: str = "accuracy", sharpness: float = 1.0
) -> Answer:
    """Return weights of a model made of all, each by how often it is right."""
    check_any(statistics)
    check_range("sharpness", sharpness, 0.0, 100.0)
    values = column(statistics, metric)
    known_rows(values, metric, statistics)
    weights = personalisation.accuracy_weights(np.nan_to_num(values, nan=0.0), sharpness)
    return {"weights": by_client(statistics.clients, weights)}


def similar_weights(statistics: RoundStatistics, *, client: str, scale: float = 0.0) -> Answer:
    """Return weights of a model for one client, of those that move like it."""
    row = row_of(statistics, client)
    check_range("scale", scale, 0.0, 1e30)
    squares = distances_squared(statistics.gram)
    others = np.delete(squares[row], row)
    usual = median(others) if len(others) else 0.0
    width = scale or usual or 1.0
    weights = personalisation.attentive_weights(squares, row, width)
    return {
        "client": client,
        "scale": width,
        "weights": by_client(statistics.clients, weights),
    }


def fomo_weights(
    statistics: RoundStatistics,
    *,
    client: str,
    losses: dict[str, float],
    loss_before: float,
    start: str = "base",
) -> Answer:
    """Return FedFomo's weights for one client from losses on its data."""
    row = row_of(statistics, client)
    check_choice("start", start, ("base", "own"))
    if not isinstance(losses, dict) or not losses:
        raise ValueError("`losses` is a dict: by client, the loss of its model on the data")
    unknown = [name for name in losses if name not in statistics.clients]
    if unknown:
        row_of(statistics, unknown[0])
    if not all(isinstance(loss, (int, float)) and np.isfinite(loss) for loss in losses.values()):
        raise ValueError("`losses` must be finite numbers: leave out models that were not tried")
    tried = np.array([losses.get(name, np.inf) for name in statistics.clients])
    squares = distances_squared(statistics.gram)[row]
    away = statistics.norms if start == "base" else np.sqrt(squares)
    weights = personalisation.fomo_weights(tried, loss_before, away)
    return {
        "client": client,
        "weights": by_client(statistics.clients, weights),
        "is_any_better": bool(weights.any()),
    }


def oort(
    history: History,
    *,
    count: int,
    loss: str = "loss",
    duration: str = "duration_s",
    preferred_s: float = 0.0,
    alpha: float = scheduling.OORT_ALPHA,
    newcomers: Sequence[str] = (),
    explore: float = 0.1,
    seed: int = 0,
) -> Answer:
    """Return whom Oort asks next: much to learn from, not too slow, or not seen for long."""
    check_range("explore", explore, 0.0, 1.0)
    check_range("alpha", alpha, 0.0, 100.0)
    check_range("preferred_s", preferred_s, 0.0, 1e9)
    clients, rounds, values = _latest(history, (loss, duration, "example_count"))
    losses, durations_s, counts = values
    if float(losses.min()) < 0.0 or float(durations_s.min()) <= 0.0:
        raise ValueError(f"Oort needs {loss!r} of 0 or more and {duration!r} above 0")
    strangers = _strangers(newcomers, clients)
    _check_count(count, len(clients) + len(strangers))
    wanted_s = preferred_s or median(durations_s)
    first = history[0].round
    scores = scheduling.oort_scores(
        scheduling.oort_utilities(losses, counts),
        durations_s,
        rounds - first + 1.0,
        preferred_s=wanted_s,
        round_number=history[-1].round - first + 2,
        alpha=alpha,
    )
    room = max(round(explore * count), count - len(clients)) if strangers else 0
    drawn = generator(seed).permutation(len(strangers))[: min(room, len(strangers))]
    fresh = [strangers[place] for place in drawn]
    order = np.argsort(-scores, kind="stable")[: count - len(fresh)]
    return {
        "clients": [*(clients[row] for row in order), *fresh],
        "explored": fresh,
        "scores": by_client(clients, scores),
        "preferred_s": wanted_s,
    }


def tifl(
    history: History,
    *,
    count: int,
    tiers: int = 5,
    duration: str = "duration_s",
    accuracy: str = "accuracy",
    seed: int = 0,
) -> Answer:
    """Return tiers by duration, the chance of each, and clients of the one that was drawn."""
    check_range("tiers", tiers, 1, 1000)
    clients, _, (durations_s,) = _latest(history, (duration,))
    _check_count(count, len(clients))
    levels = scheduling.tiers(durations_s, min(tiers, len(clients)))
    right = _optional(history, clients, accuracy)
    groups = [np.flatnonzero(levels == level) for level in range(int(levels.max()) + 1)]
    accuracies = [_mean(right[rows]) for rows in groups]
    chances = scheduling.tier_chances(accuracies)
    rng = generator(seed)
    drawn = int(rng.choice(len(groups), p=chances))
    members = groups[drawn]
    chosen = rng.permutation(members)[: min(count, len(members))]
    return {
        "tier": drawn,
        "clients": [clients[row] for row in chosen],
        "tiers": [
            {
                "clients": [clients[row] for row in rows],
                "duration_s": float(durations_s[rows].mean()),
                "accuracy": accuracies[level],
                "chance": float(chances[level]),
            }
            for level, rows in enumerate(groups)
        ],
    }


def diverse(statistics: RoundStatistics, *, count: int) -> Answer:
    """Return clients whose deltas stand for all, and how far each of the others is from one."""
    check_any(statistics)
    _check_count(count, len(statistics.clients))
    apart = np.sqrt(distances_squared(statistics.gram))
    chosen = scheduling.diverse(apart, count)
    nearest = apart[:, chosen]
    return {
        "clients": [statistics.clients[row] for row in chosen],
        "stands_for": {
            name: statistics.clients[chosen[int(nearest[row].argmin())]]
            for row, name in enumerate(statistics.clients)
        },
        "distance_sum": float(nearest.min(axis=1).sum()),
    }


def by_loss(
    history: History, *, count: int, candidates: int = 0, loss: str = "loss", seed: int = 0
) -> Answer:
    """Return the clients with the highest loss, of all or of candidates drawn by their data."""
    clients, _, (losses, counts) = _latest(history, (loss, "example_count"))
    _check_count(count, len(clients))
    if candidates and not count <= candidates <= len(clients):
        raise ValueError(f"`candidates` is from `count` ({count}) to {len(clients)}")
    drawn = candidates or len(clients)
    weights = shares(counts)
    chosen = scheduling.power_of_choice(losses, weights, count, drawn, generator(seed))
    return {
        "clients": [clients[row] for row in chosen],
        "losses": by_client(clients, losses),
    }


def _latest(history: History, names: Sequence[str]) -> tuple[list[str], Float, list[Float]]:
    """Return every client's newest values of the columns, and the round that they are of.

    Clients that never sent one of them are left out.
    """
    check_held(history)
    found: dict[str, tuple[int, list[float]]] = {}
    is_known = dict.fromkeys(names, False)
    for statistics in history:
        try:
            values = np.stack([column(statistics, name) for name in names])
        except ValueError:
            continue
        is_complete = np.isfinite(values).all(axis=0)
        for name, row in zip(names, values, strict=True):
            is_known[name] = is_known[name] or bool(np.isfinite(row).any())
        for row in np.flatnonzero(is_complete):
            found[statistics.clients[row]] = (statistics.round, values[:, row].tolist())
    if not found:
        for name in names:
            if not is_known[name]:
                column(history[-1], name)
        raise ValueError(f"no client sent all of {named(names)} with one update")
    rounds = np.array([float(number) for number, _ in found.values()])
    table = np.array([row for _, row in found.values()])
    return list(found), rounds, list(table.T)


def _optional(history: History, clients: Sequence[str], name: str) -> Float:
    values: dict[str, float] = {}
    for statistics in history:
        if name in statistics.columns:
            known = zip(statistics.clients, statistics.columns[name].tolist(), strict=True)
            values.update({client: value for client, value in known if value == value})
    return np.array([values.get(client, np.nan) for client in clients])


def _mean(values: Float) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def _strangers(newcomers: Any, clients: Sequence[str]) -> list[str]:
    if isinstance(newcomers, str) or not all(isinstance(name, str) for name in newcomers):
        raise ValueError("`newcomers` is a list of clients' names")
    known = set(clients)
    return [name for name in dict.fromkeys(newcomers) if name not in known]


def _check_count(count: int, available: int) -> None:
    if not 1 <= count <= available:
        raise ValueError(
            f"`count` is how many clients to choose: 1 to {available} are known, not {count}"
        )


_COUNT = "how many clients to choose"
_LOSS = "column with the loss: the root of the mean square (Oort), or the mean"

QUESTIONS = (
    Question(
        name="accuracy-weights",
        summary="Weights by accuracy, for a model made of all",
        needs="statistics",
        function=accuracy_weights,
        arguments={
            "metric": "column with the accuracy",
            "sharpness": "power of it: 0 equal weights, larger ones favour the best",
        },
        source="McMahan et al. 2017, Alg. 1, with accuracies for counts",
    ),
    Question(
        name="similar-weights",
        summary="Weights of those that move like one client, for its own model",
        needs="statistics",
        function=similar_weights,
        arguments={
            "client": "whose model",
            "scale": "σ of exp(−distance² ÷ σ); the median squared distance if not given",
        },
        source="FedAMP, Huang et al., AAAI 2021, section 3",
    ),
    Question(
        name="fedfomo-weights",
        summary="Weights by how much each model helps one client, for its own model",
        needs="statistics",
        function=fomo_weights,
        arguments={
            "client": "whose model",
            "losses": "by client, the loss of its model on the data (see score-clients)",
            "loss_before": "loss of the model that the client had before",
            "start": "that model: the round's `base`, or its `own` update",
        },
        source="Zhang et al., ICLR 2021, section 3",
    ),
    Question(
        name="schedule-oort",
        summary="Whom to ask next: much to learn from, not too slow, not seen for long",
        needs="statistics",
        function=oort,
        arguments={
            "count": _COUNT,
            "loss": _LOSS,
            "duration": "column with what a round took the client, s",
            "preferred_s": "wanted duration of a round; the median if not given",
            "alpha": "how much slower clients are held back",
            "newcomers": "clients that have never been asked",
            "explore": "share of `count` that they get",
            "seed": "of the draw among them",
        },
        source="Lai et al., OSDI 2021, section 4 and Alg. 1",
        rounds=16,
    ),
    Question(
        name="schedule-tifl",
        summary="Clients of one speed, from a tier drawn by how badly it is served",
        needs="statistics",
        function=tifl,
        arguments={
            "count": _COUNT,
            "tiers": "how many",
            "duration": "column with what a round took the client, s",
            "accuracy": "column with its accuracy",
            "seed": "of tier and clients",
        },
        source="Chai et al., HPDC 2020, section 4 and Alg. 2",
        rounds=16,
    ),
    Question(
        name="schedule-diverse",
        summary="Clients whose deltas stand for those of all",
        needs="statistics",
        function=diverse,
        arguments={"count": _COUNT},
        source="DivFL, Balakrishnan et al., ICLR 2022, section 3",
    ),
    Question(
        name="schedule-loss",
        summary="Clients with the highest loss",
        needs="statistics",
        function=by_loss,
        arguments={
            "count": _COUNT,
            "candidates": "draw so many by their data first; all if not given",
            "loss": "column with the loss",
            "seed": "of that draw",
        },
        source="Power-of-choice, Cho, Wang and Joshi, AISTATS 2022, section 4",
        rounds=16,
    ),
)
