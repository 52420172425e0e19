"""What every value that comes in must satisfy. A refusal names field, value and what to do."""

import re
from collections.abc import Sized
from enum import IntEnum
from functools import lru_cache
from typing import TypeVar

from tierwise.domain.ids import is_name, split_function_id
from tierwise.errors import InvalidArgument

Member = TypeVar("Member", bound=IntEnum)

SHOWN_MAX = 80
TEXT_LENGTH_MAX = 4_096
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PORT_MAX = 65_535

# Names repeat in every message: asking the pattern once each keeps the check under 0.1 µs.
_is_name = lru_cache(maxsize=8_192)(is_name)


def number(value: float, field: str, low: float, high: float) -> float:
    """Return `value` if it lies in [low, high]; NaN lies nowhere."""
    if not low <= value <= high:
        raise InvalidArgument(f"{field} = {value}: use a number from {low:g} to {high:g}")
    return value


def integer(value: int, field: str, low: int, high: int) -> int:
    """Return `value` if it lies in [low, high]."""
    if not low <= value <= high:
        raise InvalidArgument(f"{field} = {value}: use a whole number from {low} to {high}")
    return value


def member(kind: type[Member], value: int, field: str) -> Member:
    """Return the member of an enumeration; 0 is what an unset field holds."""
    found = kind._value2member_map_.get(value)
    if found is None:
        known = ", ".join(f"{choice.name} ({choice.value})" for choice in kind)
        wrong = "is not set" if value == 0 else f"= {value} is not known here"
        raise InvalidArgument(f"{field} {wrong}: use one of {known}")
    return found  # type: ignore[return-value]  # the map's values are members of `kind`


def name(value: str, field: str) -> str:
    """Return `value` if it may name a node, namespace, function or policy."""
    if not _is_name(value):
        raise InvalidArgument(
            f"{field} {shown(value)} is no name: use a-z, 0-9, '-', '.', '_', at most 63, with a "
            "letter or digit at both ends"
        )
    return value


def function_id(value: str, field: str) -> str:
    """Return `value` if it is `namespace/name@version`."""
    if not _is_function_id(value):
        raise InvalidArgument(
            f"{field} {shown(value)} is no function version: write namespace/name@version"
        )
    return value


def text(value: str, field: str, length_max: int = TEXT_LENGTH_MAX) -> str:
    """Return `value` if it is at most so long and prints on one line."""
    if len(value) > length_max:
        raise InvalidArgument(
            f"{field} has {len(value)} characters: use at most {length_max} ({shown(value)})"
        )
    if not value.isprintable():
        raise InvalidArgument(f"{field} {shown(value)}: remove the control characters")
    return value


def digest(value: str, field: str, algorithm: str = "SHA-256") -> str:
    """Return `value` if it is a digest of 256 bits in hex, or empty."""
    if value and _DIGEST.fullmatch(value) is None:
        raise InvalidArgument(f"{field} {shown(value)}: use the {algorithm}, 64 hex digits")
    return value


def address(value: str, field: str) -> str:
    """Return `value` if it is `host:port`, or empty for what cannot be dialled."""
    if not value:
        return value
    text(value, field, 255)
    host, _, port = value.rpartition(":")
    if not host or " " in host or not port.isdecimal() or not 0 < int(port) <= _PORT_MAX:
        raise InvalidArgument(f"{field} {shown(value)}: write host:port")
    return value


def at_most(items: Sized, field: str, count_max: int) -> None:
    """Refuse a collection of more than `count_max`."""
    if len(items) > count_max:
        raise InvalidArgument(f"{field}: {len(items)} are too many, send at most {count_max}")


def clean(value: str, length_max: int) -> str:
    """Return text of others, such as an exception's, so that it can travel: cut, valid UTF-8."""
    cut = value if len(value) <= length_max else value[: length_max - 1] + "…"
    return cut if cut.isascii() else cut.encode("utf-8", "replace").decode()


def shown(value: str) -> str:
    """Return a value for a message: quoted, escaped and not long."""
    return repr(value if len(value) <= SHOWN_MAX else value[: SHOWN_MAX - 1] + "…")


@lru_cache(maxsize=8_192)
def _is_function_id(value: str) -> bool:
    try:
        return split_function_id(value)[2] is not None and "/" in value
    except ValueError:
        return False
