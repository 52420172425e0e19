"""The cache of one node: rounds in shared memory, written through to disk and an object store.

Used on one event loop. What blocks (hashing, disk, statistics) runs in threads of its own.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from tierwise.config import CacheConfig
from tierwise.domain.cache import (
    CacheReading,
    Durability,
    HeldRounds,
    IncomingHead,
    ObjectInfo,
    ObjectKey,
    RoundManifest,
)
from tierwise.functions.fl.statistics import RoundStatistics
from tierwise.wire.memfd import Memfd


class Incoming:
    """One object on its way in. Exactly one of `commit` and `abort` ends it."""

    known: ObjectInfo | None
    """Set if the very same object (key and digest) is held already: no byte need be sent; `commit`
    returns it whether or not bytes were written."""

    def write(self, chunk: bytes | memoryview) -> None:
        """Take the next bytes: one copy, into the row or file in shared memory.

        Raises:
            InvalidArgument: There are more bytes than the head says.
            Cancelled: The same object is being sent anew, which ended this attempt.
        """
        raise NotImplementedError

    async def commit(self) -> ObjectInfo:
        """Return once the object is as durable as its head asks for, up to DISK or STORED.

        REPLICATED is the caller's business (`CacheStore.mark_replicated`): DISK is returned. The
        answer's `quarantined` says why an update does not count.

        Raises:
            InvalidArgument: Bytes are missing, or they have another digest; nothing is kept.
            AlreadyExists: The key is held with other content.
            FailedPrecondition: The round has ended meanwhile.
            Overloaded: The disk is full; nothing is kept.
            Unavailable: STORED was asked for, and the store does not answer; it is on disk.
        """
        raise NotImplementedError

    def abort(self) -> None:
        """Forget what came. Safe to call after `commit` and twice."""
        raise NotImplementedError


class CacheStore:
    """See the module. `run_forever` must run for the store write-through to happen."""

    on_committed: list[Callable[[ObjectInfo, IncomingHead], None]]
    """Called on the loop after each commit of a new object, quarantined ones excepted."""

    def __init__(self, folder: Path, config: CacheConfig, *, node_id: str = "") -> None:
        """Use `folder` (made if missing) for files; touch nothing before `recover`."""

    async def recover(self) -> None:
        """Take up what the disk holds; call once, before anything else.

        Raises:
            FailedPrecondition: Another process uses this folder.
        """

    async def run_forever(self) -> None:
        """Write through to the object store, save statistics, evict; until cancelled."""

    async def close(self) -> None:
        """Finish what is being written and release the folder."""

    async def open_round(self, manifest: RoundManifest) -> None:
        """Make room for a round; durable when it returns. The same manifest again is no error.

        Raises:
            InvalidArgument: A name or number is out of bounds; it could never fit.
            AlreadyExists: The round is open with another manifest.
            PermissionDenied: The job belongs to another owner.
            FailedPrecondition: A later round has ended; the base is not known here.
            Overloaded: Memory, disk or quota are full.
        """

    def manifest(self, namespace: str, job: str, round_number: int) -> RoundManifest | None:
        """Return how a round was opened, or None."""
        raise NotImplementedError

    def receive(self, head: IncomingHead, writer_uri: str) -> Incoming:
        """Begin to take an object.

        Args:
            head: What comes.
            writer_uri: Identity that puts it; empty: the cluster itself (a peer's copy, this node).

        Raises:
            InvalidArgument: A field is wrong, the client is not in the manifest.
            AlreadyExists: The key is held with another digest than the head's.
            PermissionDenied: Not this client's writer, or not the owner.
            FailedPrecondition: The round is not open, or has ended.
            Overloaded: Memory, disk, quota, or too many at a time.
        """
        raise NotImplementedError

    async def read(
        self, key: ObjectKey, *, with_quarantined: bool = False
    ) -> tuple[Memfd, ObjectInfo]:
        """Return an object as a shared file: from memory, else disk, else the object store.

        A MATRIX is shape (K, P) float32, row k of the k-th client of the manifest; rows of clients
        that are not in are zeros or unfinished. Its info's metadata holds `clients` (K names),
        `is_in` (K booleans) and `parameter_count`. An UPDATE of a round in memory is copied once
        (a row is part of a larger file): who only sends the bytes on uses `view`.

        Raises:
            NotFound: Nothing of that name is here or in the store, or it is quarantined.
            Unavailable: It is in the store, which does not answer.
            Overloaded: There is no memory for it.
        """
        raise NotImplementedError

    async def view(
        self, key: ObjectKey, *, with_quarantined: bool = False
    ) -> tuple[memoryview, ObjectInfo]:
        """Return an object's bytes, read-only and uncopied; as `read` otherwise."""
        raise NotImplementedError

    async def statistics(self, namespace: str, job: str, round_number: int = -1) -> RoundStatistics:
        """Return what is known of a round; waits for updates that are being counted.

        Args:
            round_number: −1: the newest that has ended or is complete, else the newest.

        Raises:
            NotFound: No such round is known here.
        """
        raise NotImplementedError

    async def history(
        self, namespace: str, job: str, *, count: int = 16
    ) -> Sequence[RoundStatistics]:
        """Return the statistics of the newest `count` rounds that have updates, ascending."""
        raise NotImplementedError

    def rounds(self, namespace: str, job: str) -> list[int]:
        """Return the rounds of a job that are known here, ascending."""
        raise NotImplementedError

    def newest_aggregate(self, namespace: str, job: str) -> ObjectKey | None:
        """Return the key of the newest round's end, or None."""
        raise NotImplementedError

    def info(self, key: ObjectKey) -> ObjectInfo | None:
        """Return one object's entry, quarantined or not."""
        raise NotImplementedError

    def list(self, namespace: str = "", job: str = "") -> list[ObjectInfo]:
        """Return entries in the order of their keys, quarantined ones among them."""
        raise NotImplementedError

    def mark_replicated(self, key: ObjectKey, node_ids: Sequence[str]) -> None:
        """Note that other nodes hold a copy; unknown keys are ignored."""

    async def settled(self, key: ObjectKey, durability: Durability) -> ObjectInfo:
        """Wait until an object is so durable.

        Raises:
            NotFound: It is not here.
            Unavailable: The store has not answered for 30 s.
        """
        raise NotImplementedError

    def held(self) -> Sequence[HeldRounds]:
        """Return what heartbeats say: the newest 256 jobs, 64 rounds of each."""
        raise NotImplementedError

    def reading(self) -> CacheReading:
        """Return how full the cache is and how often it was hit."""
        raise NotImplementedError

    async def forget(self, namespace: str, job: str, *, with_store: bool = False) -> int:
        """Drop a job from memory and disk, and the store if asked; return how many objects."""
        raise NotImplementedError
