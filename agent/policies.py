"""The placement policies on duty on this node, kept on disk for times without a scheduler."""

import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import structlog

from agent.decider import Canary, Duties
from tierwise.errors import TierwiseError
from tierwise.files import write_atomically
from tierwise.placement.canary import Schedule
from tierwise.placement.policies import learned
from tierwise.placement.policy import Policy, create
from tierwise.v1 import node_pb2

log = structlog.get_logger()

Fetch = Callable[[str], Awaitable[tuple[bytes, bytes]]]


class PolicySlot:
    """Turns an assignment into a policy and remembers the last one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: tuple[tuple[str, str], Policy] | None = None

    def last(self) -> Policy | None:
        """Return the policy that was assigned last, or None.

        Raises:
            TierwiseError: It is not usable.
            OSError: It cannot be read.
        """
        name_file = self._folder / "builtin"
        if name_file.exists():
            return create(name_file.read_text())
        if (self._folder / "weights.npz").exists():
            return learned.load(
                (self._folder / "weights.npz").read_bytes(),
                (self._folder / "card.json").read_bytes(),
            )
        return None

    async def assign(self, policy_id: str, builtin: str, fetch: Fetch) -> Policy:
        """Return the assigned policy and remember it; one that is held already is not fetched.

        Raises:
            TierwiseError: It does not exist or its file is refused; the one before stays.
        """
        if self._held is not None and self._held[0] == (policy_id, builtin):
            return self._held[1]
        name_file = self._folder / "builtin"
        if builtin:
            policy = create(builtin)
            _store(name_file, builtin.encode())
        else:
            weights, card = await fetch(policy_id)
            policy = learned.load(weights, card)
            if _store(self._folder / "weights.npz", weights):
                _store(self._folder / "card.json", card)
            name_file.unlink(missing_ok=True)
        self._held = (policy_id, builtin), policy
        return policy

    def clear(self) -> None:
        """Forget the policy."""
        self._held = None
        shutil.rmtree(self._folder, ignore_errors=True)


class _Trial(msgspec.Struct, kw_only=True, frozen=True):
    """A canary's time table on disk."""

    trial_id: int
    share: float
    block_s: float
    seed: int
    started_unix_s: float


class PolicySlots:
    """The three duties: active, canary, shadow."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._active = PolicySlot(folder)
        self._canary = PolicySlot(folder / "canary")
        self._shadow = PolicySlot(folder / "shadow")

    def restore(self, default: str, *, now_s: float, wall_s: float) -> Duties:
        """Return the duties that were assigned last; the built-in `default` if there are none.

        Args:
            default: Name of a built-in policy.
            now_s: Monotonic time.
            wall_s: Wall time, for a canary's blocks went on while this node was down.

        Raises:
            NotFound: `default` is no built-in policy.
        """
        active, shadow = _restored(self._active), _restored(self._shadow)
        canary, policy = None, _restored(self._canary)
        if policy is not None:
            try:
                encoded = (self._folder / "canary" / "trial.json").read_bytes()
                trial = msgspec.json.decode(encoded, type=_Trial)
                canary = _canary(policy, trial, now_s - (wall_s - trial.started_unix_s))
            except (OSError, msgspec.DecodeError) as error:
                log.warning("policy.not_restored", cause=str(error))
        return Duties(active=active or create(default), canary=canary, shadow=shadow)

    async def assign(
        self,
        assignment: node_pb2.PolicyAssignment,
        fetch: Fetch,
        active: Policy,
        *,
        now_s: float,
        wall_s: float,
    ) -> Duties:
        """Return the assigned duties and remember them; what is unusable is left out and named.

        Args:
            assignment: What the scheduler says.
            fetch: Gets a policy's file.
            active: Stays in use if the one assigned is unusable.
            now_s: Monotonic time when the assignment came.
            wall_s: Wall time of this node at that moment.
        """
        refused: list[tuple[str, str, str]] = []

        async def get(slot: PolicySlot, duty: str, policy_id: str, builtin: str) -> Policy | None:
            try:
                return await slot.assign(policy_id, builtin, fetch)
            except (TierwiseError, OSError) as error:
                log.error("policy.refused", policy_id=policy_id, duty=duty, cause=str(error))
                refused.append((duty, policy_id or builtin, str(error)))
                return None

        found = await get(self._active, "active", assignment.policy_id, assignment.builtin)
        shadow = canary = policy = None
        if assignment.HasField("shadow"):
            ref = assignment.shadow
            shadow = await get(self._shadow, "shadow", ref.policy_id, ref.builtin)
        if assignment.HasField("canary"):
            ref = assignment.canary.policy
            policy = await get(self._canary, "canary", ref.policy_id, ref.builtin)
        if shadow is None:
            self._shadow.clear()
        if policy is None:
            self._canary.clear()
        else:
            pb = assignment.canary
            trial = _Trial(
                trial_id=pb.trial_id,
                share=pb.share,
                block_s=pb.block_s,
                seed=pb.seed,
                started_unix_s=wall_s - pb.elapsed_s,
            )
            _store(self._folder / "canary" / "trial.json", msgspec.json.encode(trial))
            canary = _canary(policy, trial, now_s - pb.elapsed_s)
        return Duties(active=found or active, canary=canary, shadow=shadow, refused=tuple(refused))


def _store(path: Path, content: bytes) -> bool:
    """Write a file if there is room for it; without, what it says is forgotten by a restart."""
    try:
        write_atomically(path, content)
    except OSError as error:
        log.error("policy.not_stored", path=str(path), cause=str(error))
        return False
    return True


def _restored(slot: PolicySlot) -> Policy | None:
    try:
        return slot.last()
    except (TierwiseError, OSError) as error:
        log.warning("policy.not_restored", cause=str(error))
        return None


def _canary(policy: Policy, trial: _Trial, started_at_s: float) -> Canary:
    return Canary(
        policy=policy,
        trial_id=trial.trial_id,
        schedule=Schedule(trial.share, trial.block_s, trial.seed),
        started_at_s=started_at_s,
    )
