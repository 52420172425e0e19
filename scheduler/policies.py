"""Placement policies: published, promoted, rolled back. Serves PolicyService."""

import hashlib
from collections.abc import Callable
from typing import Any

import structlog
from sqlalchemy import Connection, delete, func, select

from scheduler.store.store import Store
from scheduler.store.tables import policies, promotions
from tierwise.clock import wall_s
from tierwise.errors import FailedPrecondition, InvalidArgument, NotFound, TierwiseError
from tierwise.placement.policies import learned
from tierwise.placement.policy import Policy, create, names
from tierwise.v1 import node_pb2, policy_pb2, policy_pb2_grpc
from tierwise.wire.identity import peer_identity

log = structlog.get_logger()
POLICIES_MAX = 1000


class PolicyStore(policy_pb2_grpc.PolicyServiceServicer):
    """Keeps policy files and which one is in use."""

    def __init__(self, store: Store, default: str) -> None:
        """Open the store; `default` is used until somebody promotes.

        Raises:
            NotFound: `default` is no built-in policy.
        """
        self._store = store
        self._default = default
        self.on_promoted: Callable[[], None] = lambda: None
        self.active_id, self.is_builtin = default, True
        create(default)
        last = store.read_now(
            lambda c: c.execute(select(promotions).order_by(promotions.c.sequence.desc())).first()
        )
        if last is not None:
            self.active_id, self.is_builtin = last.policy_id, last.is_builtin

    def active(self) -> Policy:
        """Return the policy in use, for durable work."""
        if self.is_builtin:
            return create(self.active_id)
        row = self._store.read_now(
            lambda c: c.execute(
                select(policies).where(policies.c.policy_id == self.active_id)
            ).first()
        )
        if row is None:
            raise NotFound(f"policy {self.active_id} is gone from the store")
        return learned.load(row.weights, row.card)

    def assignment(self) -> node_pb2.PolicyAssignment:
        """Return what agents are told to use."""
        return node_pb2.PolicyAssignment(
            policy_id=self.active_id, builtin=self.active_id if self.is_builtin else ""
        )

    # -- RPCs -----------------------------------------------------------------------------------

    async def PublishPolicy(
        self, request: policy_pb2.PublishPolicyRequest, context: Any
    ) -> policy_pb2.PublishPolicyResponse:
        policy = learned.load(request.weights, request.card)
        if policy.card.name in names():
            raise InvalidArgument(
                f"{policy.card.name!r} is the name of a built-in policy; train with another --name"
            )
        digest = hashlib.sha256(request.weights + request.card).hexdigest()
        row = {
            "policy_id": policy.policy_id,
            "weights": request.weights,
            "card": request.card,
            "digest": digest,
            "published_unix_s": wall_s(),
            "published_by": peer_identity(context).uri,
        }

        def insert(connection: Connection) -> None:
            count = connection.scalar(select(func.count()).select_from(policies)) or 0
            if count >= POLICIES_MAX:
                raise FailedPrecondition(f"there are {POLICIES_MAX} policies; delete some")
            done = connection.execute(
                self._store.insert(policies).values(**row).on_conflict_do_nothing()
            )
            known = connection.scalar(
                select(policies.c.digest).where(policies.c.policy_id == policy.policy_id)
            )
            if not done.rowcount and known != digest:
                raise InvalidArgument(
                    f"{policy.policy_id} exists with other content: raise the version in its card"
                )

        await self._store.write(insert)
        return policy_pb2.PublishPolicyResponse(policy=await self._info(policy.policy_id))

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
        def remove_last(connection: Connection) -> Any:
            newest_first = select(promotions).order_by(promotions.c.sequence.desc())
            rows = connection.execute(newest_first.limit(2)).all()
            if not rows:
                raise FailedPrecondition("no policy was promoted yet: there is nothing to return to")
            connection.execute(
                delete(promotions).where(promotions.c.sequence == rows[0].sequence)
            )
            return rows[1] if len(rows) > 1 else None

        before = await self._store.write(remove_last)
        if before is None:
            self.active_id, self.is_builtin = self._default, True
        else:
            self.active_id, self.is_builtin = before.policy_id, before.is_builtin
        self.on_promoted()
        return policy_pb2.RollBackPolicyResponse(policy=await self._info(self.active_id))

    async def FetchPolicy(
        self, request: policy_pb2.FetchPolicyRequest, context: Any
    ) -> policy_pb2.FetchPolicyResponse:
        query = select(policies).where(policies.c.policy_id == request.policy_id)
        row = await self._store.read(lambda c: c.execute(query).first())
        if row is None:
            raise NotFound(f"there is no published policy {request.policy_id!r}")
        return policy_pb2.FetchPolicyResponse(weights=row.weights, card=row.card)

    async def _promote(self, policy_id: str, is_builtin: bool, who: str) -> None:
        if policy_id == self.active_id:
            return
        await self._store.write(
            lambda c: c.execute(
                promotions.insert().values(
                    policy_id=policy_id,
                    is_builtin=is_builtin,
                    promoted_unix_s=wall_s(),
                    promoted_by=who,
                )
            )
        )
        self.active_id, self.is_builtin = policy_id, is_builtin
        log.info("policy.promoted", policy_id=policy_id, by=who)
        self.on_promoted()

    async def _info(self, policy_id: str) -> policy_pb2.PolicyInfo:
        if policy_id in names():
            card = b""
            if policy_id == "learned":
                try:
                    card = learned.package_card()
                except TierwiseError:
                    pass  # this installation ships none; listing still works
            return policy_pb2.PolicyInfo(
                policy_id=policy_id,
                is_active=policy_id == self.active_id,
                is_builtin=True,
                card=card,
            )
        query = select(policies).where(policies.c.policy_id == policy_id)
        row = await self._store.read(lambda c: c.execute(query).first())
        if row is None:
            raise NotFound(
                f"there is no policy {policy_id!r}; `tierwise get policies` lists those that exist"
            )
        return policy_pb2.PolicyInfo(
            policy_id=policy_id,
            is_active=policy_id == self.active_id,
            published_unix_s=row.published_unix_s,
            published_by=row.published_by,
            digest=row.digest,
            card=row.card,
        )
