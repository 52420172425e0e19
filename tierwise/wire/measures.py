"""What a payload says of its own size: numbers, lengths, dimensions, bytes. Nothing is executed.

The arguments themselves are not built: containers are skipped over in C, arrays are described by
their heads. Work and result are bounded, whatever was sent.
"""

import math
import struct
from collections.abc import Sequence
from typing import Any

import msgspec

from tierwise.wire.payload import ARRAY, ARRAYS_MAX, DETACHED, MAGIC, TUPLE

MEASURES_MAX = 24  # per call
NAME_LENGTH_MAX = 40
HEAD_BYTES_MAX = 256 << 10  # of a longer one only the length is taken
DEPTH_MAX = 3  # the arguments are at depth 1, what is inside them at 2 and 3
KEYWORDS_MAX = 256  # of a call with more only what stands by position is measured
MEMBERS_MAX = 16  # longer containers count by their length only
VALUE_MAX = 1e15
ITEMS_MEASURED_MAX = 64
_HEADER = struct.Struct("<2sHI")
_raws = msgspec.msgpack.Decoder(list[msgspec.Raw])
_fields = msgspec.msgpack.Decoder(dict[str | int, msgspec.Raw])
_plain = msgspec.msgpack.Decoder(bool | int | float)
_extension = msgspec.msgpack.Decoder(msgspec.msgpack.Ext)
_array_head = msgspec.msgpack.Decoder(tuple[int, str, list[int], bool])


def measures(blob: bytes | memoryview) -> dict[str, float]:
    """Return the measures of one encoded (args, kwargs), at most MEASURES_MAX.

    `bytes` is always there. An argument is named by its position or keyword: a number stands for
    itself, `x.length` counts what a text or container holds, `x.bytes` and `x.0`, `x.1` … are the
    size and shape of an array; a container's members follow as `x.name`. A blob that is no payload
    has its length alone: the worker will say what is wrong with it.
    """
    found = {"bytes": float(len(blob))}
    try:
        magic, array_count, head_length = _HEADER.unpack_from(blob)
        if magic != MAGIC or array_count > ARRAYS_MAX:
            return found
        start = _HEADER.size + 8 * array_count
        found["arrays"] = float(array_count)
        if 0 < array_count <= MEMBERS_MAX:  # those that travel beside the blob count too
            lengths = struct.unpack_from(f"<{array_count}Q", blob, _HEADER.size)
            beside = sum(n ^ DETACHED for n in lengths if n & DETACHED)
            found["bytes"] += float(min(beside, int(VALUE_MAX / 2)))
        if head_length > HEAD_BYTES_MAX:
            found["head"] = float(head_length)
            return found
        head = memoryview(blob)[start : start + head_length]
        args, kwargs = _members(head)
        for position, argument in enumerate(_members(args)[:MEMBERS_MAX]):
            _measure(argument, str(position), 1, found)
        if _count(kwargs) <= KEYWORDS_MAX:
            for name, argument in list(_fields.decode(kwargs).items())[:MEMBERS_MAX]:
                _measure(argument, str(name), 1, found)
    except (ValueError, TypeError, LookupError, struct.error, RecursionError):
        pass  # what was found so far is of use, and the worker refuses the call
    return found


def largest(blobs: Sequence[bytes]) -> dict[str, float]:
    """Return the largest value of each measure over the items of a call.

    They run one after the other in one process, so the hungriest item decides.
    """
    if len(blobs) == 1:
        return measures(blobs[0])
    found: dict[str, float] = {}
    for blob in _spaced(blobs):
        for name, value in measures(blob).items():
            if value > found.get(name, -math.inf) and (name in found or len(found) < MEASURES_MAX):
                found[name] = value
    return found


def _spaced(blobs: Sequence[bytes]) -> Sequence[bytes]:
    """Return the blobs, or the largest and evenly spaced others if there are many."""
    if len(blobs) <= ITEMS_MEASURED_MAX:
        return blobs
    return [max(blobs, key=len), *blobs[:: math.ceil(len(blobs) / ITEMS_MEASURED_MAX)]]


def _measure(raw: Any, name: str, depth: int, found: dict[str, float]) -> None:
    name = name[:NAME_LENGTH_MAX]
    if len(found) >= MEASURES_MAX or not name.isprintable():
        return
    view = memoryview(raw)
    first = view[0]
    if first <= 0x7F or first >= 0xE0 or first in _NUMBERS:
        _put(found, name, float(_plain.decode(view)))
    elif 0x80 <= first <= 0x8F or first in (0xDE, 0xDF):
        count = _count(view)
        _put(found, f"{name}.length", count)
        if count <= MEMBERS_MAX and depth < DEPTH_MAX:
            for key, member in _fields.decode(view).items():
                _measure(member, f"{name}.{key}", depth + 1, found)
    elif 0x90 <= first <= 0x9F or first in (0xDC, 0xDD):
        count = first & 0x0F if first <= 0x9F else _length(view, first - 0xDB)
        _measure_list(view, name, count, depth, found)
    elif 0xA0 <= first <= 0xBF:
        _put(found, f"{name}.length", first & 0x1F)
    elif first in _TEXTS:
        _put(found, f"{name}.length", _length(view, _TEXTS[first]))
    elif first != 0xC0:  # nil says nothing
        extension = _extension.decode(view)
        if extension.code == ARRAY:
            _measure_array(extension.data, name, found)
        elif extension.code == TUPLE:
            count = len(_raws.decode(extension.data))
            _measure_list(extension.data, name, count, depth, found)


def _measure_list(view: Any, name: str, count: int, depth: int, found: dict[str, float]) -> None:
    _put(found, f"{name}.length", count)
    if count <= MEMBERS_MAX and depth < DEPTH_MAX:
        for position, member in enumerate(_raws.decode(view)):
            _measure(member, f"{name}.{position}", depth + 1, found)


def _measure_array(head: Any, name: str, found: dict[str, float]) -> None:
    _, dtype, shape, _ = _array_head.decode(head)
    item_bytes = int(dtype[2:]) if dtype[2:].isdigit() else 8
    _put(found, f"{name}.bytes", item_bytes * math.prod(shape))
    for axis, extent in enumerate(shape[:3]):
        _put(found, f"{name}.{axis}", extent)


_NUMBERS = frozenset((0xC2, 0xC3, *range(0xCA, 0xD4)))
# First byte of a text or of bytes → which of 1, 2 and 4 bytes hold its length.
_TEXTS = {0xC4: 0, 0xC5: 1, 0xC6: 2, 0xD9: 0, 0xDA: 1, 0xDB: 2}


def _length(view: memoryview, width: int) -> int:
    return int.from_bytes(view[1 : 1 + 2**width], "big")


def _count(raw: Any) -> int:
    """Return how many members a msgpack map has."""
    view = memoryview(raw)
    return view[0] & 0x0F if view[0] <= 0x8F else _length(view, view[0] - 0xDD)


def _put(found: dict[str, float], name: str, value: float) -> None:
    if len(found) < MEASURES_MAX and abs(value) <= VALUE_MAX:
        found[name] = float(value)


def _members(view: Any) -> list[Any]:
    """Return the members of a list or tuple, not decoded."""
    view = memoryview(view)
    if view[0] in range(0x90, 0xA0) or view[0] in (0xDC, 0xDD):
        return _raws.decode(view)
    extension = _extension.decode(view)
    if extension.code != TUPLE:
        raise ValueError("neither list nor tuple")
    return _raws.decode(extension.data)
