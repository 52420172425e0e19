"""The cache's disk within its bound: what may be written, and what goes for it.

Only files that the object store has too are ever removed for room, and none if that store is a
folder on the same disk, for then nothing would be gained.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Executor
from pathlib import Path

from agent.cache.folder import Draft, Folder
from agent.cache.index import Entry, Index
from agent.cache.journal import Journal, Marked
from agent.cache.policies import CachePolicy
from agent.cache.tasks import Tasks
from tierwise.domain.cache import ObjectKey, ObjectKind
from tierwise.errors import Overloaded

BASES_KEPT = 2  # newest aggregates of a job, which open rounds measure from
RETRY_S = 5.0


class Disk:
    """Files of objects."""

    def __init__(
        self,
        index: Index,
        folder: Folder,
        journal: Journal,
        policy: CachePolicy,
        executor: Executor,
        tasks: Tasks,
        *,
        bytes_max: int,
        quota_bytes: int,
        may_evict: bool,
    ) -> None:
        self.folder = folder
        self._index = index
        self._journal = journal
        self._policy = policy
        self._executor = executor
        self._tasks = tasks
        self._bytes_max = bytes_max
        self._quota_bytes = quota_bytes
        self._may_evict = may_evict
        self._claims: Counter[str] = Counter()
        self._finishing: Counter[str] = Counter()
        self._draft_number = 0

    def claim(self, namespace: str, size_bytes: int) -> None:
        """Make room for a file and hold it, until `release`.

        Raises:
            Overloaded: The disk or the namespace's quota is full of what cannot go.
        """
        for of, limit, knob in (
            (namespace, self._quota_bytes, "quota_mib"),
            (None, self._bytes_max, "disk_mib"),
        ):
            over = self._used_bytes(of) + size_bytes - limit
            if over > 0 and self._may_evict:
                self._evict(of, over)
                over = self._used_bytes(of) + size_bytes - limit
            if over > 0:
                raise Overloaded(
                    f"the cache's disk is full: {over >> 20} MiB too much for {knob} of [cache] "
                    f"({limit >> 20} MiB); forget jobs, raise it, or name a store elsewhere",
                    retry_after_s=RETRY_S,
                )
        self._claims[namespace] += size_bytes

    def release(self, namespace: str, size_bytes: int) -> None:
        """End a claim."""
        self._claims[namespace] -= size_bytes

    def begin(self) -> Draft:
        """Return a file to write to.

        Raises:
            OSError: The disk is full.
        """
        self._draft_number += 1
        return self.folder.begin(self._draft_number)

    async def finish(self, draft: Draft, digest: str) -> None:
        """Put a file on the disk, under its name.

        Raises:
            OSError: The disk is full.
        """
        self._finishing[digest] += 1
        try:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._executor, draft.finish, digest)
        finally:
            self._finishing[digest] -= 1
            if not self._finishing[digest]:
                del self._finishing[digest]

    def discard(self, digests: Iterable[str]) -> None:
        """Delete files that no object is in; "" is none.

        Renamed at once, for one of the same name may come, and deleted in a thread.
        """
        gone: list[Path] = []
        for digest in digests:
            if digest and not self._index.is_used(digest) and digest not in self._finishing:
                self._draft_number += 1
                gone += self.folder.set_aside(digest, self._draft_number)
        if gone:
            self._tasks.start_unattended(asyncio.to_thread(_delete, gone))

    def _used_bytes(self, namespace: str | None) -> int:
        if namespace is None:
            return self._index.disk_bytes + self._claims.total()
        return self._index.namespace_bytes(namespace) + self._claims[namespace]

    def _evict(self, namespace: str | None, need_bytes: int) -> None:
        held = {
            entry.key: entry
            for entry in self._index.entries(namespace or "")
            if entry.is_stored and entry.has_file and not entry.reader_count
        }
        held = {key: entry for key, entry in held.items() if not self._is_base(key)}
        sizes = {key: entry.size_bytes for key, entry in held.items()}
        victims: list[Entry] = [
            held[key] for key in self._policy.victims(sizes, need_bytes) if key in held
        ]
        self.discard([self._index.mark_on_disk(entry, False) for entry in victims])
        if victims:
            marks = [Marked(key=entry.key, is_on_disk=False) for entry in victims]
            self._tasks.start_unattended(self._journal.append(*marks))

    def _is_base(self, key: ObjectKey) -> bool:
        if key.kind is not ObjectKind.AGGREGATE:
            return False
        job = self._index.jobs[key.namespace, key.job]
        ended = sorted(number for number, round_ in job.rounds.items() if round_.has_ended)
        return key.round in ended[-BASES_KEPT:]


def _delete(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
