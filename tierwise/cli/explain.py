"""`tierwise explain`: why a call ran where it did."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from tierwise.cli.common import operator
from tierwise.cli.output import Format, Output, Record, ms, print_table, show_value, usd
from tierwise.errors import TierwiseError

if TYPE_CHECKING:
    from tierwise.placement.score import ScoreWeights

PARTS = ("transfer_s", "cold_start_s", "run_s", "return_s")


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(explain)


def explain(
    call: Annotated[str, typer.Argument(help="a call's id, or the start of it")],
    output: Output = Format.TABLE,
) -> None:
    """Show why a call ran where it did: candidates, scores, what was predicted and what came."""
    weights: list[ScoreWeights] = []
    with operator() as ask:
        outcome = ask.call(call)["outcome"]
        why = outcome.get("explanation")
        if why is not None and output is Format.TABLE:
            weights = list(_weights(outcome["policy_id"], ask.policies))
    if output is Format.NAME:
        print(outcome["node_id"])
    elif output is not Format.TABLE:
        show_value(outcome, output)
    else:
        _print_summary(outcome)
        if why is None:
            print(_no_explanation(outcome))
        else:
            _print_candidates(outcome, why)
            _print_scores(outcome, why, weights)
            _print_split(outcome, why)


def _print_summary(outcome: Record) -> None:
    total_s = sum(outcome["latency"].values())
    is_met = outcome["state"] == "ok" and total_s <= outcome["deadline_s"]
    verdict = "met" if is_met else "missed"
    why = outcome.get("explanation") or {}
    fallback = f"  fallback: {why['fallback']}" if why.get("fallback") else ""
    print(f"call      {outcome['request_id']}  {outcome['function_id']}")
    print(f"came to   {outcome['origin']}, with {outcome['priority']} priority")
    print(f"ran on    {outcome['node_id'] or 'no node'}")
    print(f"decided   by {outcome['policy_id'] or 'nobody'}{fallback}")
    print(f"took      {ms(total_s)}, deadline {ms(outcome['deadline_s'])} {verdict}")
    print(f"cost      {usd(outcome['money_usd'])}")
    if outcome["error_code"]:
        print(f"ended as  {outcome['error_code']}: {outcome['message']}")
    for attempt in outcome["tried"]:
        print(f"refused   {attempt['node_id']}: {attempt['reason']}")
    if why.get("heuristic_choice"):
        print(f"base      score alone: {_same(why['heuristic_choice'], why)}")
    shadow = outcome.get("shadow")
    if shadow:
        gain = "" if shadow["is_same"] else f", estimated gain {shadow['gain_s'] * 1e3:+.2f} ms"
        answer = shadow["error"] or f"{_same(shadow['node_id'] or 'no node', why)}{gain}"
        print(f"shadow    {shadow['policy_id']}: {answer}")
    if outcome.get("trial_id"):
        block = outcome["block"]
        counted = f"block {block}" if block else "not counted: the block had just begun"
        print(f"canary    trial {outcome['trial_id']}, {counted}")


def _same(node: str, why: Record) -> str:
    return f"{node}, the same" if node == why.get("choice") else node


def _no_explanation(outcome: Record) -> str:
    if not outcome["policy_id"]:
        return "Nothing to explain: it ended before a policy was asked."
    return "No explanation was kept: agents send the first 200 of each heartbeat."


def _print_candidates(outcome: Record, why: Record) -> None:
    titles = ["candidate", "transfer", "wait", "cold", "run", "return", "displaced", "cost"]
    rows = [
        [
            row["node_id"],
            ms(row["transfer_s"]),
            ms(row["wait_s"]),
            ms(row["cold_start_s"]),
            ms(row["run_s"]),
            ms(row["return_s"]),
            ms(row["displaced_s"]),
            usd(row["money_usd"]),
            f"{row['score']:.4f}",
            f"{row['residual']:+.2f}" if row["residual"] else "",
            f"{row['propensity']:.2f}" if row["propensity"] else "",
            _marks(row["node_id"], outcome, why),
        ]
        for row in sorted(why["candidates"], key=lambda row: float(row["score"]))
    ]
    print()
    if rows:
        print_table([*titles, "score", "residual", "p", ""], rows)
    else:
        print("no node was a candidate")
    for masked in why["masked"]:
        print(f"masked    {masked['node_id']}: {masked['reason']}")


def _weights(policy: str, policies: "Callable[[], list[Record]]") -> "Iterator[ScoreWeights]":
    """Yield the weights that may have made the scores: the default ones, then those on the card."""
    import base64

    from tierwise.placement.score import DEFAULT_WEIGHTS, ScoreWeights
    from tierwise.placement.weights import unpack_card

    yield DEFAULT_WEIGHTS
    try:
        for known in policies():
            if known["card"] and known["policy_id"] in (policy, policy.partition("@")[0]):
                yield ScoreWeights(**unpack_card(base64.b64decode(known["card"])).score)
    except TierwiseError:
        return  # the card is no longer there, or not ours to see


def _print_scores(outcome: Record, why: Record, choices: "Sequence[ScoreWeights]") -> None:
    """Print the base score as the sum that it is, in second-equivalents."""
    import numpy as np

    from tierwise.cost.estimate import TERMS
    from tierwise.domain.function import Priority
    from tierwise.placement.score import PARTS, weighted

    candidates = sorted(why["candidates"], key=lambda row: float(row["score"]))
    if not candidates:
        return
    terms = np.array([[row[name] for name in TERMS] for row in candidates], dtype=np.float64)
    scores = np.array([row["score"] for row in candidates], dtype=np.float64)
    priority = Priority[outcome["priority"].upper()]
    tables = [weighted(terms, outcome["deadline_s"], priority, weights) for weights in choices]
    parts = min(tables, key=lambda table: float(np.abs(table.sum(axis=1) - scores).max()))
    rest = scores - parts.sum(axis=1)
    has_rest = np.abs(rest).max() > 1e-6 * max(1.0, float(np.abs(scores).max()))
    shown = [i for i in range(len(PARTS)) if np.abs(parts[:, i]).max() > 0.0]
    print()
    print_table(
        [
            "base score of",
            *(PARTS[i].replace("_", " ") for i in shown),
            *(["rest"] if has_rest else []),
            "sum",
        ],
        [
            [
                row["node_id"],
                *(f"{parts[i, column]:.4f}" for column in shown),
                *([f"{rest[i]:.4f}"] if has_rest else []),
                f"{scores[i]:.4f}",
            ]
            for i, row in enumerate(candidates)
        ],
    )
    if has_rest:
        print("rest: decided again with less time left, or with weights that are not known here")


def _print_split(outcome: Record, why: Record) -> None:
    """Print where the time was expected to go, and where it went."""
    ran = [row for row in why["candidates"] if row["node_id"] == outcome["node_id"]]
    if not ran:
        return
    predicted = [ran[0]["wait_s"], *(ran[0][part] for part in PARTS)]
    actual = [outcome["latency"][part] for part in ("queue_s", *PARTS)]
    print()
    print_table(
        ["", "wait", "transfer", "cold", "run", "return", "total"],
        [
            [title, *(ms(value_s) for value_s in (*values, sum(values)))]
            for title, values in (("predicted", predicted), ("actual", actual))
        ],
    )


def _marks(node: str, outcome: Record, why: Record) -> str:
    marks = []
    if node == outcome["node_id"]:
        marks.append("ran here")
    if node == why["heuristic_choice"]:
        marks.append("base score's choice")
    if node == (outcome.get("shadow") or {}).get("node_id"):
        marks.append("shadow's choice")
    return ", ".join(marks)
