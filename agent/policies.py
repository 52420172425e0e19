"""The placement policy in use on this node, kept on disk for times without a scheduler."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from tierwise.errors import TierwiseError
from tierwise.files import write_atomically
from tierwise.placement.policies import learned
from tierwise.placement.policy import Policy, create

log = structlog.get_logger()

Fetch = Callable[[str], Awaitable[tuple[bytes, bytes]]]


class PolicySlot:
    """Turns assignments into policies and remembers the last one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def last(self, default: str) -> Policy:
        """Return the policy that was assigned last, or the built-in `default`.

        Raises:
            NotFound: `default` is no built-in policy.
        """
        name_file = self._folder / "builtin"
        try:
            if name_file.exists():
                return create(name_file.read_text())
            if (self._folder / "weights.npz").exists():
                return learned.load(
                    (self._folder / "weights.npz").read_bytes(),
                    (self._folder / "card.json").read_bytes(),
                )
        except (TierwiseError, OSError) as error:
            log.warning("policy.not_restored", cause=str(error))
        return create(default)

    async def assign(self, policy_id: str, builtin: str, fetch: Fetch) -> Policy:
        """Return the assigned policy and remember it.

        Raises:
            TierwiseError: It does not exist or its file is refused; the one before stays.
        """
        name_file = self._folder / "builtin"
        if builtin:
            policy = create(builtin)
            write_atomically(name_file, builtin.encode())
            return policy
        weights, card = await fetch(policy_id)
        policy = learned.load(weights, card)
        write_atomically(self._folder / "weights.npz", weights)
        write_atomically(self._folder / "card.json", card)
        name_file.unlink(missing_ok=True)
        return policy
