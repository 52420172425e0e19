"""What is in memory, within its bound and each namespace's quota.

The unit of memory is a file: a round's matrix with all its rows, or one object. To drop some rows
of a matrix, the whole is dropped and the others are wished back from the disk, as files of their
own. Only what is on the disk or in the store is ever dropped, and memory that somebody still maps
counts until it is let go.
"""

import weakref
from collections import Counter, deque
from collections.abc import Iterator

from agent.cache.arena import Matrix
from agent.cache.index import Entry, Round
from agent.cache.policies import CachePolicy
from tierwise.domain.cache import Durability, ObjectKey, ObjectKind
from tierwise.errors import Overloaded, PayloadTooLarge
from tierwise.wire.memfd import Memfd

WISHES_MAX = 256
RETRY_S = 2.0


class Residency:
    """Files in shared memory."""

    def __init__(self, policy: CachePolicy, *, bytes_max: int, quota_bytes: int) -> None:
        self.policy = policy
        self.bytes_max = bytes_max
        self.quota_bytes = quota_bytes
        self.wishes: deque[ObjectKey] = deque(maxlen=WISHES_MAX)
        self.copies: weakref.WeakValueDictionary[ObjectKey, Memfd] = weakref.WeakValueDictionary()
        self._claims: Counter[str] = Counter()  # bytes by namespace, not yet a file
        self._matrices: dict[tuple[str, str, int], Round] = {}
        self._files: dict[ObjectKey, Entry] = {}
        self._lent: list[tuple[str, int, list[weakref.ref[object]]]] = []

    def used_bytes(self, namespace: str | None = None) -> int:
        """Return bytes in memory, of one namespace or all; claims and what is lent included."""
        return sum(
            size_bytes for of, size_bytes in self._parts() if namespace is None or of == namespace
        )

    def is_resident(self, entry: Entry) -> bool:
        """Return whether an object can be read without the disk."""
        if entry.file is not None or entry.key.kind is ObjectKind.METADATA:
            return True
        round_ = self._matrices.get(_name(entry.key))
        return round_ is not None and round_.row(entry.key) is not None

    def claim(self, namespace: str, size_bytes: int) -> None:
        """Make room and hold it, until `release`.

        Raises:
            PayloadTooLarge: It could never fit.
            Overloaded: There is no room now.
        """
        bound = min(self.bytes_max, self.quota_bytes)
        if size_bytes > bound:
            raise PayloadTooLarge(
                f"{size_bytes >> 20} MiB do not fit into the cache: memory_mib and quota_mib of "
                f"[cache] allow {bound >> 20} MiB"
            )
        for of, limit, knob in (
            (namespace, self.quota_bytes, "quota_mib"),
            (None, self.bytes_max, "memory_mib"),
        ):
            while (over := self.used_bytes(of) + size_bytes - limit) > 0:
                if not self._evict(of, over):  # what went may still be mapped: more has to go
                    break
            if over > 0:
                raise Overloaded(
                    f"the cache is full of what cannot go yet: {over >> 20} MiB too much for "
                    f"{knob} of [cache] ({limit >> 20} MiB)",
                    retry_after_s=RETRY_S,
                )
        self._claims[namespace] += size_bytes

    def release(self, namespace: str, size_bytes: int) -> None:
        """End a claim."""
        self._claims[namespace] -= size_bytes
        if self._claims[namespace] <= 0:
            del self._claims[namespace]

    def is_worth(self, key: ObjectKey, size_bytes: int) -> bool:
        """Return whether an object that nobody waits for is worth more than what would go."""
        for of, limit in ((key.namespace, self.quota_bytes), (None, self.bytes_max)):
            over = self.used_bytes(of) + size_bytes - limit
            if over <= 0:
                continue
            held = {**dict(self._evictable(of)), key: size_bytes}
            if sum(held.values()) - size_bytes < over or key in self.policy.victims(held, over):
                return False
        return True

    def place(self, round_: Round, matrix: Matrix) -> None:
        """Give a round its matrix; the claim for it must be released."""
        round_.matrix = matrix
        manifest = round_.manifest
        self._matrices[manifest.namespace, manifest.job, manifest.round] = round_

    def keep(self, entry: Entry, file: Memfd) -> None:
        """Give an object its file; the claim for it must be released."""
        entry.file = file
        self._files[entry.key] = entry

    def drop(self, entry: Entry) -> None:
        """Let go of an object's own file."""
        file, entry.file = entry.file, None
        self._files.pop(entry.key, None)
        if file is not None:
            self._lend(entry.key.namespace, file.nbytes, [file])

    def drop_matrix(self, round_: Round) -> None:
        """Let go of a round's matrix."""
        matrix, round_.matrix = round_.matrix, None
        manifest = round_.manifest
        self._matrices.pop((manifest.namespace, manifest.job, manifest.round), None)
        if matrix is not None:
            self._lend(manifest.namespace, matrix.nbytes, [matrix.file, matrix.mapping])

    def forget(self, namespace: str, job: str) -> None:
        """Let go of a job."""
        for name, round_ in list(self._matrices.items()):
            if name[:2] == (namespace, job):
                self.drop_matrix(round_)
        for key, entry in list(self._files.items()):
            if (key.namespace, key.job) == (namespace, job):
                self.drop(entry)
        self.policy.forget(namespace, job)

    def lend(self, namespace: str, file: Memfd) -> None:
        """Count a file that a reader gets and the cache does not keep."""
        self._lend(namespace, file.nbytes, [file])

    def tidy(self) -> None:
        """Drop what the policy never wanted, once it is safe elsewhere."""
        for round_ in list(self._matrices.values()):
            keys = [entry.key for entry in round_.updates()]
            is_idle = round_.has_ended and keys and self._may_go(round_)
            if is_idle and not any(map(self.policy.is_admitted, keys)):
                self.drop_matrix(round_)
        for entry in list(self._files.values()):
            if entry.durability >= Durability.DISK and not self.policy.is_admitted(entry.key):
                self.drop(entry)

    def _evict(self, namespace: str | None, need_bytes: int) -> bool:
        """Drop what the policy says; return whether there was anything to drop."""
        held = dict(self._evictable(namespace))
        chosen = self.policy.victims(held, need_bytes)
        # Whatever a policy answers, the bound holds.
        victims = [key for key in dict.fromkeys(chosen) if key in held]
        freed = sum(held[key] for key in victims)
        for key in held:
            if freed >= need_bytes:
                break
            if key not in victims:
                victims.append(key)
                freed += held[key]
        self._drop_all(set(victims))
        return bool(victims)

    def _drop_all(self, victims: set[ObjectKey]) -> None:
        for key in victims & self._files.keys():
            self.drop(self._files[key])
        for round_ in [r for name, r in self._matrices.items() if _has(victims, name)]:
            rows = [entry.key for entry in round_.updates() if round_.row(entry.key) is not None]
            self.drop_matrix(round_)
            self.wishes.extend(key for key in rows if key not in victims)

    def _evictable(self, namespace: str | None) -> Iterator[tuple[ObjectKey, int]]:
        for round_ in self._matrices.values():
            if namespace in (None, round_.manifest.namespace) and self._may_go(round_):
                assert round_.matrix is not None
                filled = [e.key for e in round_.updates() if round_.row(e.key) is not None]
                for key in filled:
                    yield key, round_.row_bytes
                if left := round_.matrix_bytes - len(filled) * round_.row_bytes:
                    yield round_.key(ObjectKind.MATRIX), left
        for key, entry in self._files.items():
            is_of = namespace in (None, key.namespace)
            if is_of and entry.file is not None and entry.durability >= Durability.DISK:
                yield key, entry.file.nbytes

    def _may_go(self, round_: Round) -> bool:
        return not round_.user_count and all(
            entry.durability >= Durability.DISK
            for entry in round_.updates()
            if round_.row(entry.key) is not None
        )

    def _parts(self) -> Iterator[tuple[str, int]]:
        yield from self._claims.items()
        for name, round_ in self._matrices.items():
            yield name[0], round_.matrix_bytes
        for key, entry in self._files.items():
            yield key.namespace, entry.file.nbytes if entry.file else 0
        for key, file in list(self.copies.items()):
            yield key.namespace, file.nbytes
        self._lent = [each for each in self._lent if any(ref() is not None for ref in each[2])]
        for namespace, size_bytes, _ in self._lent:
            yield namespace, size_bytes

    def _lend(self, namespace: str, size_bytes: int, owners: list[object]) -> None:
        self._lent.append((namespace, size_bytes, [weakref.ref(owner) for owner in owners]))


def _name(key: ObjectKey) -> tuple[str, str, int]:
    return key.namespace, key.job, key.round


def _has(victims: set[ObjectKey], name: tuple[str, str, int]) -> bool:
    return any(
        _name(key) == name and key.kind in (ObjectKind.UPDATE, ObjectKind.MATRIX) for key in victims
    )
