"""A chain of hashes over rounds: whoever knows its head notices any change before it. Pure.

    link_r = BLAKE2b-256(link_{r−1} ‖ record_r)

Linked records as in Haber and Stornetta, How to Time-Stamp a Digital Document (J. Cryptology 3,
1991), section 5. `record_r` is canonical JSON (sorted keys, no blanks) of the round's number and
the digests of what it took and gave.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GENESIS = "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One round in the chain.

    Attributes:
        updates: BLAKE2b-256 of each client's update, hex.
        aggregate: Of what the round ended with; empty: not yet.
        base: Of what the clients started from; empty: not known.
    """

    round: int
    updates: Mapping[str, str]
    aggregate: str = ""
    base: str = ""

    def canonical(self) -> bytes:
        """Return the bytes that are hashed."""
        fields = {
            "aggregate": self.aggregate,
            "base": self.base,
            "round": self.round,
            "updates": dict(self.updates),
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def link(before: str, record: Record) -> str:
    """Return the hash, hex, of a record after the link before it."""
    return hashlib.blake2b(bytes.fromhex(before) + record.canonical(), digest_size=32).hexdigest()


def chain(records: Sequence[Record], start: str = GENESIS) -> list[str]:
    """Return the link of every record, oldest first.

    Raises:
        ValueError: Rounds do not ascend, or `start` is no hash.
    """
    _check_hash(start, "start")
    links: list[str] = []
    last = None
    for record in records:
        if last is not None and record.round <= last:
            raise ValueError(
                f"round {record.round} comes after round {last}: give records oldest first"
            )
        last = record.round
        links.append(link(links[-1] if links else start, record))
    return links


def first_difference(found: Mapping[int, str], expected: Mapping[int, str]) -> int | None:
    """Return the first round whose link is not as expected, or None if all are.

    Args:
        found: Links by round, see `chain`.
        expected: The same, as they were noted before. They need not be complete: a link vouches
            for all rounds before it.

    Raises:
        ValueError: A link is expected of a round that was not found.
    """
    for number, wanted in sorted(expected.items()):
        _check_hash(wanted, f"link of round {number}")
        if number not in found:
            raise ValueError(f"round {number} is not held: ask for rounds {_named(list(found))}")
        if found[number] != wanted.lower():
            return number
    return None


def _check_hash(text: str, name: str) -> None:
    if len(text) != 64 or any(letter not in "0123456789abcdefABCDEF" for letter in text):
        raise ValueError(f"{name} must be 64 hexadecimal digits, not {text[:80]!r}")


def _named(rounds: list[int]) -> str:
    return f"{min(rounds)} to {max(rounds)}" if rounds else "(none)"
