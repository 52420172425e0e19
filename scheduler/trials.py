"""Trials of policies: in the shadow, or as a canary. Kept, so that a restart interrupts none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy import Connection, select, update

from scheduler.store.store import Store
from scheduler.store.tables import trial_blocks, trials
from tierwise.clock import wall_s
from tierwise.cost.objective import DEFAULT_OBJECTIVE
from tierwise.domain.outcome import Outcome, OutcomeState
from tierwise.placement.canary import Arm, Schedule, compare
from tierwise.v1 import node_pb2, policy_pb2

SHADOW, CANARY = "shadow", "canary"
BLOCKS_MAX = 100_000  # of one trial that are compared
LATE_S = 3600.0  # for how long after its end a trial takes calls of nodes that were cut off


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One trial; `ended_unix_s` is 0 while it goes on."""

    trial_id: int
    kind: str
    policy_id: str
    is_builtin: bool
    baseline_id: str
    share: float
    block_s: float
    seed: int
    started_unix_s: float
    ended_unix_s: float

    @property
    def schedule(self) -> Schedule:
        """Return which blocks are the canary's."""
        return Schedule(self.share, self.block_s, self.seed)

    @property
    def ref(self) -> node_pb2.PolicyRef:
        """Return the policy as agents are told of it."""
        return node_pb2.PolicyRef(
            policy_id=self.policy_id, builtin=self.policy_id if self.is_builtin else ""
        )


class Trials:
    """Which trials run, and what came of them."""

    def __init__(self, store: Store) -> None:
        """Load what is known."""
        self._store = store
        query = select(*_HEADS).order_by(trials.c.trial_id)
        rows = store.read_now(lambda c: c.execute(query).mappings().all())
        self._known = {row["trial_id"]: Trial(**row) for row in rows}

    def running(self, kind: str) -> Trial | None:
        """Return the trial of that kind that goes on, or None."""
        for trial in self._known.values():
            if trial.kind == kind and not trial.ended_unix_s:
                return trial
        return None

    def add_to(self, assignment: node_pb2.PolicyAssignment) -> None:
        """Tell agents of the trials that go on."""
        shadow, canary = self.running(SHADOW), self.running(CANARY)
        if shadow is not None:
            assignment.shadow.CopyFrom(shadow.ref)
        if canary is not None:
            assignment.canary.CopyFrom(
                node_pb2.CanaryAssignment(
                    policy=canary.ref,
                    trial_id=canary.trial_id,
                    share=canary.share,
                    block_s=canary.block_s,
                    seed=canary.seed,
                    elapsed_s=max(0.0, wall_s() - canary.started_unix_s),
                )
            )

    # -- changes: to be called inside a write, then `took` on the event loop ---------------------

    def start(self, connection: Connection, trial: dict[str, Any]) -> list[Trial]:
        """Begin a trial, ending one of its kind; return what has changed."""
        changed = self.end(connection, trial["kind"])
        row: dict[str, Any] = {**trial, "started_unix_s": wall_s(), "ended_unix_s": 0.0, **_NO_SUMS}
        done = connection.execute(trials.insert().values(**row))
        trial_id = done.inserted_primary_key[0] if done.inserted_primary_key else 0
        heads = {column.name for column in _HEADS} - {"trial_id"}
        return [*changed, Trial(trial_id=trial_id, **{key: row[key] for key in heads})]

    def end(self, connection: Connection, kind: str) -> list[Trial]:
        """End the trial of that kind, if one goes on; return what has changed."""
        is_running = (trials.c.kind == kind) & (trials.c.ended_unix_s == 0.0)
        rows = connection.execute(select(*_HEADS).where(is_running)).mappings().all()
        ended_unix_s = wall_s()
        connection.execute(update(trials).where(is_running).values(ended_unix_s=ended_unix_s))
        return [Trial(**{**row, "ended_unix_s": ended_unix_s}) for row in rows]

    def took(self, changed: Sequence[Trial]) -> None:
        """Follow in memory what was stored; `keep` may be reading in the store's thread."""
        self._known = {**self._known, **{trial.trial_id: trial for trial in changed}}

    # -- what came of them ----------------------------------------------------------------------

    def keep(self, connection: Connection, outcomes: Sequence[Outcome]) -> None:
        """Add ended calls to the sums of the trials that they were part of."""
        shadows: dict[int, dict[str, float]] = {}
        blocks: dict[tuple[int, int], dict[str, float]] = {}
        now_s = wall_s()
        for outcome in outcomes:
            shadow = outcome.shadow
            if shadow is not None:
                trial = self._latest(SHADOW, shadow.policy_id)
                if trial is not None and _takes(trial, now_s):
                    is_sound = not shadow.error
                    _add(
                        shadows.setdefault(trial.trial_id, {}),
                        decision_count=1,
                        error_count=int(not is_sound),
                        same_count=int(is_sound and shadow.is_same),
                        gain_s=shadow.gain_s if is_sound else 0.0,
                    )
            if outcome.block and outcome.state is not OutcomeState.CANCELLED:
                canary = self._known.get(outcome.trial_id)
                if canary is not None and canary.kind == CANARY and _takes(canary, now_s):
                    _add(
                        blocks.setdefault((outcome.trial_id, outcome.block), {}),
                        call_count=1,
                        missed_count=int(outcome.is_missed),
                        cost_s=DEFAULT_OBJECTIVE.cost_s(outcome),
                    )
        for trial_id, sums in shadows.items():
            values = {key: trials.c[key] + value for key, value in sums.items()}
            connection.execute(update(trials).where(trials.c.trial_id == trial_id).values(values))
        for (trial_id, block), sums in blocks.items():
            insert = self._store.insert(trial_blocks).values(trial_id=trial_id, block=block, **sums)
            connection.execute(
                insert.on_conflict_do_update(
                    index_elements=["trial_id", "block"],
                    set_={key: trial_blocks.c[key] + insert.excluded[key] for key in sums},
                )
            )

    async def shadow(self, policy_id: str) -> policy_pb2.ShadowTrial | None:
        """Return the newest trial of a policy in the shadow, or None."""
        trial = self._latest(SHADOW, policy_id)
        if trial is None:
            return None
        query = select(trials).where(trials.c.trial_id == trial.trial_id)
        row = await self._store.read(lambda c: c.execute(query).mappings().one())
        sound = max(1, row["decision_count"] - row["error_count"])
        return policy_pb2.ShadowTrial(
            trial_id=trial.trial_id,
            started_unix_s=trial.started_unix_s,
            ended_unix_s=trial.ended_unix_s,
            decision_count=row["decision_count"],
            error_count=row["error_count"],
            same_share=row["same_count"] / sound,
            mean_gain_s=row["gain_s"] / sound,
        )

    async def canary(self, policy_id: str) -> policy_pb2.CanaryTrial | None:
        """Return the newest trial of a policy as a canary, compared with the baseline, or None."""
        trial = self._latest(CANARY, policy_id)
        if trial is None:
            return None
        t = trial_blocks.c
        query = (
            select(t.block, t.call_count, t.missed_count, t.cost_s)
            .where(t.trial_id == trial.trial_id)
            .order_by(t.block.desc())
            .limit(BLOCKS_MAX)
        )
        rows = await self._store.read(lambda c: c.execute(query).all())
        schedule = trial.schedule
        turns = np.array([schedule.is_canary(row[0]) for row in reversed(rows)], dtype=np.bool_)
        sums = np.array([tuple(row)[1:] for row in reversed(rows)], dtype=np.float64)
        sums = sums.reshape(-1, 3)
        canary, baseline = Arm(blocks=sums[turns]), Arm(blocks=sums[~turns])
        return policy_pb2.CanaryTrial(
            trial_id=trial.trial_id,
            started_unix_s=trial.started_unix_s,
            ended_unix_s=trial.ended_unix_s,
            share=trial.share,
            block_s=trial.block_s,
            baseline_id=trial.baseline_id,
            canary=_arm(canary),
            baseline=_arm(baseline),
            cost_s=_difference(canary, baseline, 2),
            missed_share=_difference(canary, baseline, 1),
        )

    def _latest(self, kind: str, policy_id: str) -> Trial | None:
        """Return the newest trial of a policy; agents call built-in ones `name@1`."""
        for trial in reversed(self._known.values()):
            if trial.kind == kind and (
                trial.policy_id == policy_id
                or (trial.is_builtin and trial.policy_id == policy_id.partition("@")[0])
            ):
                return trial
        return None


_HEADS = [
    trials.c[name]
    for name in (
        *("trial_id", "kind", "policy_id", "is_builtin", "baseline_id"),
        *("share", "block_s", "seed", "started_unix_s", "ended_unix_s"),
    )
]
_NO_SUMS = {"decision_count": 0, "error_count": 0, "same_count": 0, "gain_s": 0.0}


def _takes(trial: Trial, now_s: float) -> bool:
    return not trial.ended_unix_s or now_s < trial.ended_unix_s + LATE_S


def _add(sums: dict[str, float], **amounts: float) -> None:
    for key, amount in amounts.items():
        sums[key] = sums.get(key, 0) + amount


def _arm(arm: Arm) -> policy_pb2.TrialArm:
    return policy_pb2.TrialArm(
        block_count=int((arm.blocks[:, 0] > 0).sum()),
        call_count=arm.calls,
        missed_count=arm.misses,
        mean_cost_s=arm.mean_cost_s if arm.calls else 0.0,
    )


def _difference(canary: Arm, baseline: Arm, column: int) -> policy_pb2.Difference:
    found = compare(canary, baseline, column)
    figures = {"mean": found.mean, "low": found.low, "high": found.high}
    return policy_pb2.Difference(**{k: v for k, v in figures.items() if np.isfinite(v)})
