"""`tierwise explain`: why a call ran where it did."""

from typing import Annotated

import typer

from tierwise.cli.common import operator
from tierwise.cli.output import Format, Output, Record, ms, print_table, show_value, usd

PARTS = ("transfer_s", "cold_start_s", "run_s", "return_s")


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(explain)


def explain(
    call: Annotated[str, typer.Argument(help="a call's id, or the start of it")],
    output: Output = Format.TABLE,
) -> None:
    """Show why a call ran where it did: candidates, scores, what was predicted and what came."""
    with operator() as ask:
        outcome = ask.call(call)["outcome"]
    if output is Format.NAME:
        print(outcome["node_id"])
    elif output is not Format.TABLE:
        show_value(outcome, output)
    else:
        _print_summary(outcome)
        why = outcome.get("explanation")
        if why is None:
            print(_no_explanation(outcome))
        else:
            _print_candidates(outcome, why)
            _print_split(outcome, why)


def _print_summary(outcome: Record) -> None:
    total_s = sum(outcome["latency"].values())
    is_met = outcome["state"] == "ok" and total_s <= outcome["deadline_s"]
    verdict = "met" if is_met else "missed"
    why = outcome.get("explanation")
    fallback = f"  fallback: {why['fallback']}" if why and why["fallback"] else ""
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
    return ", ".join(marks)
