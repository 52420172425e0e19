"""`tierwise policy estimate`: what a policy would have cost, from the records of another."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tierwise.cli.common import operator
from tierwise.cli.output import Format, Output, Record, print_table, say, show_value
from tierwise.errors import FailedPrecondition, InvalidArgument, NotFound

if TYPE_CHECKING:
    from tierwise.placement.offpolicy import Interval, OffPolicy
    from tierwise.placement.replay import LoggedCall, Target
    from tierwise.placement.weights import Card

COUNT_MIN = 30  # decisions, below which there is nothing to say
SUPPORT_MIN = 0.95
Cards = dict[str, "Card"]


def estimate(
    policy: Annotated[str, typer.Argument(help="id, as `tierwise get policies` lists it")],
    log: Annotated[
        Path | None, typer.Option(help="records from `tierwise get calls -o json --limit N`")
    ] = None,
    function: Annotated[str, typer.Option(help="calls of this function only")] = "",
    limit: Annotated[int, typer.Option(help="at most this many calls", min=1, max=10_000)] = 2000,
    lam: Annotated[float | None, typer.Option(help="λ to try, for the policy that decided")] = None,
    beta: Annotated[float | None, typer.Option(help="β to try, likewise")] = None,
    temperature: Annotated[float | None, typer.Option(help="temperature to try, likewise")] = None,
    output: Output = Format.TABLE,
) -> None:
    """Estimate the mean cost of a policy from decisions that another one took.

    Records hold predicted terms, scores, residuals and chances, not the network's inputs. So these
    can be estimated: ect, soft-ect and slowest-fit; the learned policy that decided, also with
    other --lam, --beta and --temperature; and any policy that was in the shadow of these very calls
    (`tierwise policy shadow POLICY`), by the chances that it gave then.

    The cost is the objective, in second-equivalents: latency, misses by priority, failures, money.
    """
    from tierwise.placement.offpolicy import CAVEATS, evaluate
    from tierwise.placement.replay import replay

    dials = {"lam": lam, "beta": beta, "temperature": temperature}
    records, cards = _records(log, function, limit)
    calls, left_out = _calls(records)
    target, how = _target(policy, calls, cards, {k: v for k, v in dials.items() if v is not None})
    replayed, told_nothing_count = replay(calls, target)
    if told_nothing_count:
        left_out["say nothing of this policy"] += told_nothing_count
    if len(replayed.cost) < COUNT_MIN:
        raise FailedPrecondition(
            f"only {len(replayed.cost)} of {len(records)} records can be used, at least "
            f"{COUNT_MIN} are needed ({_left_out(left_out)}); drive more calls, or raise --limit"
        )
    found = evaluate(replayed)
    if output is Format.TABLE:
        _print(found, policy, how, left_out)
        for caveat in CAVEATS:
            say(f"note: {caveat}")
    elif output is Format.NAME:
        print(policy)
    else:
        figures = asdict(found)
        shown = {k: _plain(v) for k, v in figures.items()}
        show_value(
            {"policy": policy, "how": how, **shown, "left_out": left_out, "caveats": list(CAVEATS)},
            output,
        )


def _records(log: Path | None, function: str, limit: int) -> tuple[list[Record], Cards]:
    """Return call records, oldest first, and the cards of the policies that are known."""
    from tierwise.placement.policies import learned

    cards: Cards = {}
    try:
        card = learned.unpack_card(learned.package_card())
        cards[f"{card.name}@{card.version}"] = card
    except NotFound:
        pass  # this installation ships none
    if log is None:
        with operator() as ask:
            records = ask.calls(function, limit=limit)
            for known in ask.policies():
                if not known["is_builtin"]:
                    cards[known["policy_id"]] = learned.unpack_card(_decoded(known["card"]))
        return records[::-1], cards
    try:
        records = json.loads(log.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFound(f"{log}: {error.strerror}") from None
    except ValueError as error:
        raise InvalidArgument(f"{log} is not JSON: {error}") from None
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise InvalidArgument(f"{log}: a list of calls, as `tierwise get calls -o json` prints it")
    if function:
        records = [r for r in records if function in str(r.get("outcome", {}).get("function_id"))]
    return records[:limit][::-1], cards


def _decoded(encoded: str) -> bytes:
    import base64

    return base64.b64decode(encoded)


def _calls(records: Sequence[Record]) -> tuple[list["LoggedCall"], Counter[str]]:
    """Return what can be replayed, and why the rest cannot."""
    calls: list[LoggedCall] = []
    left_out: Counter[str] = Counter()
    for record in records:
        try:
            call = _call(record["outcome"])
        except (KeyError, TypeError, ValueError, AttributeError):
            call = "are not as they should be"
        if isinstance(call, str):
            left_out[call] += 1
        else:
            calls.append(call)
    return calls, left_out


def _call(outcome: Record) -> "LoggedCall | str":
    """Return one call, or why it cannot be used."""
    from tierwise.cost.objective import DEFAULT_OBJECTIVE
    from tierwise.domain.decision import CandidateScore, ShadowDecision
    from tierwise.domain.function import Priority
    from tierwise.domain.ids import FunctionId, NodeId, PolicyId, RequestId
    from tierwise.domain.outcome import LatencySplit, Outcome, OutcomeState
    from tierwise.placement.replay import LoggedCall

    state = OutcomeState[outcome["state"].upper()]
    if state is OutcomeState.CANCELLED:
        return "were cancelled"
    if int(outcome["lease"]):
        return "were durable work, which the scheduler places"
    why = outcome.get("explanation")
    if not why or not why["candidates"]:
        return "hold no explanation"
    if not why.get("choice"):
        return "do not name the choice (older agents)"
    priority = Priority[outcome["priority"].upper()]
    ended = Outcome(
        request_id=RequestId(outcome["request_id"]),
        function_id=FunctionId(outcome["function_id"]),
        state=state,
        origin=NodeId(outcome["origin"]),
        node_id=NodeId(outcome["node_id"]),
        latency=LatencySplit(**{key: float(value) for key, value in outcome["latency"].items()}),
        deadline_s=float(outcome["deadline_s"]),
        priority=priority,
        money_usd=float(outcome["money_usd"]),
        energy_j=float(outcome["energy_j"]),
    )
    said = outcome.get("shadow")
    shadow = None
    if said:
        odds = tuple((NodeId(row["node_id"]), float(row["chance"])) for row in said["odds"])
        shadow = ShadowDecision(
            policy_id=PolicyId(said["policy_id"]), odds=odds, error=said["error"]
        )
    rows = tuple(
        CandidateScore(
            NodeId(row["node_id"]), *(float(row[name]) for name in CandidateScore._fields[1:])
        )
        for row in why["candidates"]
    )
    if not all(math.isfinite(figure) for row in rows for figure in row[1:]):
        raise ValueError("a figure is not finite")
    return LoggedCall(
        policy_id=outcome["policy_id"],
        rows=rows,
        choice=NodeId(why["choice"]),
        deadline_s=ended.deadline_s,
        priority=priority,
        cost_s=DEFAULT_OBJECTIVE.cost_s(ended),
        fallback=why["fallback"],
        shadow=shadow,
    )


def _target(
    policy: str, calls: Sequence["LoggedCall"], cards: Cards, dials: dict[str, float]
) -> tuple["Target", str]:
    """Return how to recompute the policy's chances, and how that is done in words.

    Raises:
        FailedPrecondition: These records do not tell.
        InvalidArgument: Dials for a policy that has none.
    """
    from tierwise.placement import replay
    from tierwise.placement.policies.ect import SOFT_TEMPERATURE

    names = (policy, f"{policy}@1")
    shadows = (call.shadow.policy_id for call in calls if call.shadow is not None)
    shadowed = next((policy_id for policy_id in shadows if policy_id in names), "")
    if shadowed and not dials:
        return replay.by_shadow(shadowed), "its own chances, logged in the shadow"
    deciders = (call.policy_id for call in calls if call.policy_id in cards)
    decided = next((policy_id for policy_id in deciders if policy_id in names), "")
    if decided:
        card = cards[decided]
        lam = dials.get("lam", card.lam)
        if lam and not card.lam:
            raise InvalidArgument(f"{decided} decided with λ = 0: its residuals are not in the log")
        temperature = dials.get("temperature", card.temperature)
        beta = dials.get("beta", card.beta)
        if min(lam, temperature, beta) < 0.0:
            raise InvalidArgument("λ, β and the temperature are not negative")
        target = replay.by_dials(
            decided,
            beta=beta,
            lam_factor=lam / card.lam if card.lam else 0.0,
            temperature=temperature,
        )
        return target, f"residuals logged, λ {lam:g}, β {beta:g}, temperature {temperature:g}"
    if dials:
        raise InvalidArgument(
            f"--lam, --beta and --temperature are for a learned policy that decided itself, and "
            f"whose card is known; {policy} did not in these records"
        )
    builtin: dict[str, Target] = {
        "ect": replay.by_base_score(),
        "soft-ect": replay.by_base_score(temperature=SOFT_TEMPERATURE),
        "slowest-fit": replay.by_slowest_fit(),
    }
    name = policy.removesuffix("@1")
    if name in builtin:
        return builtin[name], "recomputed from the predicted terms"
    raise FailedPrecondition(
        f"these records do not tell what {policy} would have done: they hold no inputs of a "
        f"network. Have it asked beside the policy in use (`tierwise policy shadow {policy}`), "
        "drive calls, and estimate again"
    )


def _print(found: "OffPolicy", policy: str, how: str, left_out: Counter[str]) -> None:
    rows = [
        [name, *_cells(interval)]
        for name, interval in (
            ("logged calls", found.logged),
            (f"{policy}, IPS", found.ips),
            (f"{policy}, SNIPS", found.snips),
            (f"{policy}, DR", found.dr),
        )
    ]
    print_table(["mean cost per call", "estimate", "95 % from", "to"], rows)
    print()
    print(f"how        {how}")
    print(f"decisions  {found.count}, worth {found.effective_count:.0f} of the target's own")
    print(f"weights    at most {found.weight_max:.3g}")
    print(f"support    {1.0 - found.unsupported_share:.1%} of what the target would have done")
    if left_out:
        print(f"left out   {_left_out(left_out)}")
    if found.unsupported_share > 1.0 - SUPPORT_MIN:
        say("warning: too little support: IPS is too low, SNIPS judges a part of the decisions")


def _cells(interval: "Interval") -> list[str]:
    return [
        f"{figure:.4f}" if math.isfinite(figure) else "–"
        for figure in (interval.mean, interval.low, interval.high)
    ]


def _left_out(counts: Counter[str]) -> str:
    return "; ".join(f"{count} {why}" for why, count in counts.most_common()) or "none left out"


def _plain(value: Any) -> Any:
    """Return a figure as JSON may hold it: no NaN."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
