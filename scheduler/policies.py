"""Placement policies: published, tried, promoted, rolled back. Serves PolicyService."""

# ruff: noqa: D102, N802 - gRPC methods are named and described by the protos

import asyncio
import hashlib
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import msgspec
import structlog
from sqlalchemy import Connection, delete, func, select

from scheduler.store.store import Store
from scheduler.store.tables import policies, promotions
from scheduler.trials import CANARY, SHADOW, Trial, Trials
from tierwise.clock import wall_s
from tierwise.domain.ids import is_name
from tierwise.errors import FailedPrecondition, InvalidArgument, NotFound, TierwiseError
from tierwise.placement.canary import BLOCK_S_MAX, BLOCK_S_MIN, SHARE_MAX, SHARE_MIN
from tierwise.placement.policies import learned
from tierwise.placement.policy import Policy, create, names
from tierwise.v1 import node_pb2, policy_pb2, policy_pb2_grpc, types_pb2
from tierwise.wire.identity import peer_identity

log = structlog.get_logger()
POLICIES_MAX = 1000
PROMOTIONS_MAX = 1000  # how far one can roll back
FALLBACK = "ect"


class PolicyStore(policy_pb2_grpc.PolicyServiceServicer):
    """Keeps policy files and which one is in use."""

    def __init__(self, store: Store, default: str) -> None:
        """Open the store; `default` is used until somebody promotes.

        Raises:
            NotFound: `default` is no built-in policy.
        """
        self._store = store
        self._default = default
        self.trials = Trials(store)
        self.on_changed: Callable[[], None] = lambda: None
        self.health: Callable[[], Iterable[tuple[str, types_pb2.PolicyHealth]]] = tuple
        self.active_id, self.is_builtin = default, True
        if default not in names():
            raise NotFound(f"policy = {default!r}: there is none; known: {', '.join(names())}")
        last = store.read_now(
            lambda c: c.execute(select(promotions).order_by(promotions.c.sequence.desc())).first()
        )
        if last is not None:
            self.active_id, self.is_builtin = last.policy_id, last.is_builtin

    def active(self) -> Policy:
        """Return the policy in use, for durable work; the base score if its file is unusable."""
        try:
            return self._load(self.active_id, is_builtin=self.is_builtin)
        except TierwiseError as error:
            log.error(
                "policy.unusable", policy_id=self.active_id, cause=str(error), instead=FALLBACK
            )
            return create(FALLBACK)

    def assignment(self) -> node_pb2.PolicyAssignment:
        """Return what agents are told to use, and to try."""
        assignment = node_pb2.PolicyAssignment(
            policy_id=self.active_id, builtin=self.active_id if self.is_builtin else ""
        )
        self.trials.add_to(assignment)
        return assignment

    def _load(self, policy_id: str, *, is_builtin: bool) -> Policy:
        if is_builtin:
            return create(policy_id)
        query = select(policies).where(policies.c.policy_id == policy_id)
        row = self._store.read_now(lambda c: c.execute(query).first())
        if row is None:
            raise _no_policy(policy_id)
        return learned.load(row.weights, row.card)

    # -- RPCs -----------------------------------------------------------------------------------

    async def PublishPolicy(
        self, request: policy_pb2.PublishPolicyRequest, context: Any
    ) -> policy_pb2.PublishPolicyResponse:
        card = learned.load(request.weights, request.card).card
        name = request.name or card.name
        if name in names():
            raise InvalidArgument(
                f"{name!r} is the name of a built-in policy: publish it under another name"
            )
        if not is_name(name):
            raise InvalidArgument(f"{name!r} is no name: use a-z, 0-9, '-', '.', '_'")
        digest = hashlib.sha256(request.weights + request.card).hexdigest()
        row = {
            "weights": request.weights,
            "digest": digest,
            "published_unix_s": wall_s(),
            "published_by": peer_identity(context).uri,
        }
        policy_id = await self._store.write(lambda c: _insert(c, name, card, row))
        return policy_pb2.PublishPolicyResponse(policy=await self._info(policy_id))

    async def ListPolicies(
        self, request: policy_pb2.ListPoliciesRequest, context: Any
    ) -> policy_pb2.ListPoliciesResponse:
        rows = await self._store.read(
            lambda c: c.execute(select(policies.c.policy_id).order_by(policies.c.policy_id)).all()
        )
        ids = [*names(), *(row.policy_id for row in rows)]
        return policy_pb2.ListPoliciesResponse(policies=[await self._info(i) for i in ids])

    async def PromotePolicy(
        self, request: policy_pb2.PromotePolicyRequest, context: Any
    ) -> policy_pb2.PromotePolicyResponse:
        info = await self._info(request.policy_id)
        await self._promote(info.policy_id, info.is_builtin, peer_identity(context).uri)
        return policy_pb2.PromotePolicyResponse(policy=await self._info(info.policy_id))

    async def RollBackPolicy(
        self, request: policy_pb2.RollBackPolicyRequest, context: Any
    ) -> policy_pb2.RollBackPolicyResponse:
        canary = self.trials.running(CANARY)
        if canary is not None:  # that was the last step: it is the one to take back
            await self._end_trials(CANARY, SHADOW)
            log.info("policy.canary_ended", policy_id=canary.policy_id)
            return policy_pb2.RollBackPolicyResponse(
                policy=await self._info(self.active_id), ended_canary=canary.policy_id
            )

        def remove_last(connection: Connection) -> Any:
            newest_first = select(promotions).order_by(promotions.c.sequence.desc())
            rows = connection.execute(newest_first.limit(2)).all()
            if not rows:
                raise FailedPrecondition(
                    "no policy was promoted yet: there is nothing to return to"
                )
            connection.execute(delete(promotions).where(promotions.c.sequence == rows[0].sequence))
            before = rows[1] if len(rows) > 1 else None
            return before, self.trials.end(connection, SHADOW)

        def removed(done: Any) -> None:
            before, ended = done
            self.trials.took(ended)
            if before is None:
                self._use(self._default, is_builtin=True)
            else:
                self._use(before.policy_id, is_builtin=before.is_builtin)

        await self._store.write(remove_last, on_stored=removed)
        log.info("policy.rolled_back", policy_id=self.active_id, by=peer_identity(context).uri)
        return policy_pb2.RollBackPolicyResponse(policy=await self._info(self.active_id))

    async def ShadowPolicy(
        self, request: policy_pb2.ShadowPolicyRequest, context: Any
    ) -> policy_pb2.ShadowPolicyResponse:
        if not request.policy_id:
            ended = await self._end_trials(SHADOW)
            return policy_pb2.ShadowPolicyResponse(policy=await self._info(ended or self.active_id))
        await self._start_trial(SHADOW, request.policy_id, 0.0, 0.0, context)
        return policy_pb2.ShadowPolicyResponse(policy=await self._info(request.policy_id))

    async def CanaryPolicy(
        self, request: policy_pb2.CanaryPolicyRequest, context: Any
    ) -> policy_pb2.CanaryPolicyResponse:
        if not request.policy_id:
            ended = await self._end_trials(CANARY)
            return policy_pb2.CanaryPolicyResponse(policy=await self._info(ended or self.active_id))
        if not SHARE_MIN <= request.share <= SHARE_MAX:
            raise InvalidArgument(f"share = {request.share:g}: use {SHARE_MIN} to {SHARE_MAX}")
        if not BLOCK_S_MIN <= request.block_s <= BLOCK_S_MAX:
            raise InvalidArgument(
                f"block_s = {request.block_s:g}: use {BLOCK_S_MIN:g} to {BLOCK_S_MAX:g} seconds"
            )
        await self._start_trial(CANARY, request.policy_id, request.share, request.block_s, context)
        return policy_pb2.CanaryPolicyResponse(policy=await self._info(request.policy_id))

    async def FetchPolicy(
        self, request: policy_pb2.FetchPolicyRequest, context: Any
    ) -> policy_pb2.FetchPolicyResponse:
        query = select(policies).where(policies.c.policy_id == request.policy_id)
        row = await self._store.read(lambda c: c.execute(query).first())
        if row is None:
            raise NotFound(f"there is no published policy {request.policy_id!r}")
        return policy_pb2.FetchPolicyResponse(weights=row.weights, card=row.card)

    async def _start_trial(
        self, kind: str, policy_id: str, share: float, block_s: float, context: Any
    ) -> None:
        """Begin a trial, unless an equal one goes on already.

        Raises:
            NotFound: There is no such policy.
            FailedPrecondition: It is the one that decides anyway.
        """
        info = await self._info(policy_id)
        if policy_id == self.active_id:
            raise FailedPrecondition(
                f"{policy_id} is the policy that decides already: there is nothing to try"
            )
        running = self.trials.running(kind)
        if running is not None and (running.policy_id, running.share, running.block_s) == (
            policy_id, share, block_s,
        ):  # fmt: skip
            return
        await asyncio.to_thread(self._load, policy_id, is_builtin=info.is_builtin)  # it can be used
        trial = {
            "kind": kind,
            "policy_id": policy_id,
            "is_builtin": info.is_builtin,
            "baseline_id": self.active_id,
            "share": share,
            "block_s": block_s,
            "seed": secrets.randbits(31),  # kept, so that the blocks can be drawn again
        }
        await self._store.write(
            lambda c: self.trials.start(c, trial), on_stored=self._trials_changed
        )
        log.info(
            "policy.trial_started", kind=kind, policy_id=policy_id, by=peer_identity(context).uri
        )

    async def _end_trials(self, *kinds: str) -> str:
        """End the trials of these kinds; return the policy of one that went on, or nothing."""
        policy_ids = [t.policy_id for kind in kinds if (t := self.trials.running(kind)) is not None]
        await self._store.write(
            lambda c: [trial for kind in kinds for trial in self.trials.end(c, kind)],
            on_stored=self._trials_changed,
        )
        return policy_ids[0] if policy_ids else ""

    def _trials_changed(self, changed: list[Trial]) -> None:
        self.trials.took(changed)
        if changed:
            self.on_changed()

    async def _promote(self, policy_id: str, is_builtin: bool, who: str) -> None:
        if policy_id == self.active_id:
            await self._end_trials(CANARY)
            return
        await asyncio.to_thread(self._load, policy_id, is_builtin=is_builtin)  # it can be used
        row = {
            "policy_id": policy_id,
            "is_builtin": is_builtin,
            "promoted_unix_s": wall_s(),
            "promoted_by": who,
        }

        def insert(connection: Connection) -> list[Trial]:
            connection.execute(promotions.insert().values(**row))
            newest = connection.scalar(select(func.max(promotions.c.sequence))) or 0
            connection.execute(
                delete(promotions).where(promotions.c.sequence <= newest - PROMOTIONS_MAX)
            )
            ended = self.trials.end(connection, CANARY)  # its baseline is no more
            shadow = self.trials.running(SHADOW)
            if shadow is not None and shadow.policy_id == policy_id:
                ended += self.trials.end(connection, SHADOW)
            return ended

        def inserted(ended: list[Trial]) -> None:
            self.trials.took(ended)
            self._use(policy_id, is_builtin=is_builtin)

        await self._store.write(insert, on_stored=inserted)
        log.info("policy.promoted", policy_id=policy_id, by=who)

    def _use(self, policy_id: str, *, is_builtin: bool) -> None:
        self.active_id, self.is_builtin = policy_id, is_builtin
        self.on_changed()

    async def _info(self, policy_id: str) -> policy_pb2.PolicyInfo:
        if policy_id in names():
            card = b""
            if policy_id == "learned":
                with suppress(TierwiseError):  # this installation may ship none
                    card = learned.package_card()
            return await self._with_trials(
                policy_pb2.PolicyInfo(
                    policy_id=policy_id,
                    is_active=policy_id == self.active_id,
                    is_builtin=True,
                    card=card,
                )
            )
        query = select(policies).where(policies.c.policy_id == policy_id)
        row = await self._store.read(lambda c: c.execute(query).first())
        if row is None:
            raise _no_policy(policy_id)
        return await self._with_trials(
            policy_pb2.PolicyInfo(
                policy_id=policy_id,
                is_active=policy_id == self.active_id,
                published_unix_s=row.published_unix_s,
                published_by=row.published_by,
                digest=row.digest,
                card=row.card,
            )
        )

    async def _with_trials(self, info: policy_pb2.PolicyInfo) -> policy_pb2.PolicyInfo:
        """Add what came of the policy's trials, and how it does on the nodes that use it now."""
        shadow = await self.trials.shadow(info.policy_id)
        canary = await self.trials.canary(info.policy_id)
        if shadow is not None:
            info.shadow.CopyFrom(shadow)
        if canary is not None:
            info.canary.CopyFrom(canary)
        for node_id, health in self.health():
            name = health.policy_id.partition("@")[0]  # nodes report built-in ones as name@version
            if info.policy_id == (name if info.is_builtin else health.policy_id):
                if health.breaker not in ("", "closed"):
                    info.open_nodes.append(node_id)
                for reason, count in health.fallbacks.items():
                    info.fallbacks[reason] += count
        return info


def _insert(connection: Connection, name: str, card: learned.Card, row: dict[str, Any]) -> str:
    """Store a policy under its name and the next free version; return its id.

    Raises:
        FailedPrecondition: There are too many.
    """
    prefix = f"{name}@"
    stored = connection.execute(select(policies.c.policy_id, policies.c.digest)).all()
    versions = {0}
    for known in stored:
        if known.policy_id.startswith(prefix):
            if known.digest == row["digest"]:
                return str(known.policy_id)
            versions.add(int(known.policy_id.removeprefix(prefix)))
    if len(stored) >= POLICIES_MAX:
        raise FailedPrecondition(f"there are {POLICIES_MAX} policies, which is the limit")
    version = card.version if card.version not in versions else max(versions) + 1
    card = msgspec.structs.replace(card, name=name, version=version)
    policy_id = f"{name}@{version}"
    encoded = msgspec.json.format(msgspec.json.encode(card), indent=2)
    connection.execute(policies.insert().values(policy_id=policy_id, card=encoded, **row))
    return policy_id


def _no_policy(policy_id: str) -> NotFound:
    return NotFound(
        f"there is no policy {policy_id!r}; `tierwise get policies` lists those that exist"
    )
