"""Who may touch which job. Pure.

A job belongs to the identity that opened its first round; administrators may touch every job. Who
is named in a round as the writer of a client may put that client's update and read the aggregates.
Nodes act for somebody and say for whom; the empty name is the cluster itself.
"""

from collections.abc import Callable, Iterable

from tierwise.domain.cache import ObjectKey, ObjectKind, RoundManifest
from tierwise.errors import PermissionDenied, Unauthenticated
from tierwise.wire.identity import Identity, Role, parse_identity

CLUSTER = ""


class Rights:
    """Answers for one node."""

    def __init__(
        self,
        manifests: Callable[[str, str], Iterable[RoundManifest]],
        owner_elsewhere: Callable[[str, str], str],
    ) -> None:
        """Answer by what is known here.

        Args:
            manifests: Gives the rounds of a job that this node holds, the newest first.
            owner_elsewhere: Gives whose job it is by the word of other nodes; empty: unknown.
        """
        self._manifests = manifests
        self._owner_elsewhere = owner_elsewhere

    def owner(self, namespace: str, job: str) -> str:
        """Return whose job it is; empty if nobody is known to have opened it."""
        for manifest in self._manifests(namespace, job):
            return manifest.owner
        return self._owner_elsewhere(namespace, job)

    def is_owner(self, caller: str, namespace: str, job: str) -> bool:
        """Return whether a job is the caller's, or nobody's yet."""
        if _is_above(caller):
            return True
        return self.owner(namespace, job) in ("", caller)

    def check_owner(self, caller: str, namespace: str, job: str) -> None:
        """Let the owner pass.

        Raises:
            PermissionDenied: The job is somebody else's.
        """
        if not self.is_owner(caller, namespace, job):
            raise PermissionDenied(
                f"the job {namespace}/{job} is of {self.owner(namespace, job)}; you are {caller}"
            )

    def check_read(self, caller: str, key: ObjectKey) -> None:
        """Let those pass who may read an object.

        Raises:
            PermissionDenied: The job is somebody else's, and this not for the caller.
        """
        if self.is_owner(caller, key.namespace, key.job):
            return
        for manifest in self._manifests(key.namespace, key.job):
            own = [each.client for each in manifest.clients if each.writer == caller]
            if own and (key.kind is ObjectKind.AGGREGATE or key.client in own):
                return
        self.check_owner(caller, key.namespace, key.job)

    def writer(self, key: ObjectKey, caller: str, bringer: Identity) -> str:
        """Return in whose name the store should take an object; it knows who may put what.

        Where a node is a client's writer, that node itself must bring the update.

        Args:
            key: The object.
            caller: For whom it comes.
            bringer: Who brings it: a node, or the caller.
        """
        manifest = next(
            (m for m in self._manifests(key.namespace, key.job) if m.round == key.round), None
        )
        if manifest is None:
            return caller
        named = next((c.writer for c in manifest.clients if c.client == key.client), "")
        is_nodes_own = named.startswith(f"tierwise://{Role.NODE}/")
        if is_nodes_own and bringer.role is Role.NODE:
            is_owners = _is_above(caller) or caller == manifest.owner
            return bringer.uri if is_owners else caller
        # The owner stands for those who may act for every owner.
        return manifest.owner if caller != CLUSTER and _is_above(caller) else caller


def _is_above(caller: str) -> bool:
    """Return whether a name stands for the cluster, the scheduler or an administrator."""
    if caller == CLUSTER:
        return True
    try:
        return parse_identity(caller).role in (Role.ADMIN, Role.SCHEDULER)
    except Unauthenticated:
        return False
