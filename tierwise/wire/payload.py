"""Arguments and results as bytes: msgpack, with NumPy arrays out of band.

This file stands alone: workers load it by path, for they cannot import tierwise. A blob is

    b"T1" | u16 array count | u32 head length | count × u64 array length | head | arrays at 64 bytes

and `head` is msgpack in which an array is the extension 1 = msgpack [index, dtype, shape] and a
tuple the extension 2. Decoded arrays are read-only views into the blob: nothing is copied.
"""

import struct
from collections.abc import Callable
from typing import Any

import msgspec

MAGIC = b"T1"
ARRAY, TUPLE = 1, 2
ARRAYS_MAX = 10_000
_HEADER = struct.Struct("<2sHI")
_ALIGN = 64
_PLAIN = (bool, int, float, str, bytes, type(None))


class PayloadError(ValueError):
    """A value cannot travel, or a blob is no payload; the message says where and what to do."""


def encode(value: object, name: str = "value") -> bytes:
    """Return `value` as one blob.

    None, bool, int, float, str, bytes, list, tuple, dict, set, datetime and NumPy arrays and
    scalars may travel. `name` is what messages call it.

    Raises:
        PayloadError: Something inside is of another type; the message names its place.
    """
    arrays: list[memoryview] = []
    try:
        head = msgspec.msgpack.encode(_lower(value, arrays, name, 0), enc_hook=_refuse)
    except (TypeError, OverflowError, RecursionError, ValueError) as error:
        if isinstance(error, PayloadError):
            raise
        raise PayloadError(f"{name} cannot travel: {error}") from None
    if not arrays:
        return _HEADER.pack(MAGIC, 0, len(head)) + head
    parts = [
        _HEADER.pack(MAGIC, len(arrays), len(head)),
        struct.pack(f"<{len(arrays)}Q", *(a.nbytes for a in arrays)),
        head,
    ]
    size = sum(map(len, parts))
    for array in arrays:
        padding = -size % _ALIGN
        parts += [b"\0" * padding, array]  # type: ignore[list-item]
        size += padding + array.nbytes
    return b"".join(parts)


def decode(blob: bytes | memoryview) -> Any:
    """Return the value in `blob`; arrays are read-only views of it.

    Raises:
        PayloadError: It is truncated, damaged or no payload.
    """
    try:
        magic, count, head_length = _HEADER.unpack_from(blob)
        if magic != MAGIC or count > ARRAYS_MAX:
            raise PayloadError("this is no tierwise payload")
        view = memoryview(blob)
        start = _HEADER.size + 8 * count
        lengths = struct.unpack_from(f"<{count}Q", blob, _HEADER.size)
        head = view[start : start + head_length]
        if len(head) != head_length:
            raise PayloadError("the payload is truncated")
        arrays: list[memoryview] = []
        offset = start + head_length
        for length in lengths:
            offset += -offset % _ALIGN
            if offset + length > len(view):
                raise PayloadError("the payload is truncated")
            arrays.append(view[offset : offset + length])
            offset += length
        return msgspec.msgpack.decode(head, ext_hook=_raiser(arrays))
    except PayloadError:
        raise
    except (ValueError, TypeError, struct.error, RecursionError, OverflowError) as error:
        raise PayloadError(f"the payload is damaged: {error}") from None
    except MemoryError:
        raise PayloadError("the payload is damaged: a length is out of bounds") from None


def _lower(value: Any, arrays: list[memoryview], where: str, depth: int) -> Any:
    """Replace arrays and tuples by extensions; plain values pass as they are."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if depth > 100:
        raise PayloadError(f"{where[:80]}… is nested too deeply: flatten it")
    if kind is list:
        return [_lower(v, arrays, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
    if kind is tuple:
        items = [_lower(v, arrays, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
        return msgspec.msgpack.Ext(TUPLE, msgspec.msgpack.encode(items, enc_hook=_refuse))
    if kind is dict:
        return {
            k if type(k) in _PLAIN else _key(k, where): _lower(
                v, arrays, f"{where}[{k!r}]", depth + 1
            )
            for k, v in value.items()
        }
    if kind.__module__ == "numpy" and hasattr(value, "dtype"):
        return _lower_array(value, arrays, where)
    if kind in (set, frozenset):
        return {v if type(v) in _PLAIN else _key(v, where) for v in value}
    if kind is bytearray or kind is memoryview:
        return bytes(value)
    if kind.__module__ == "datetime":
        return value
    kind_name = kind.__qualname__
    if kind.__module__ != "builtins":
        kind_name = f"{kind.__module__}.{kind_name}"
    raise PayloadError(
        f"{where} is of type {kind_name}, which cannot travel: convert it to numbers, text, bytes, "
        "lists, dicts or NumPy arrays"
    )


def _lower_array(value: Any, arrays: list[memoryview], where: str) -> msgspec.msgpack.Ext:
    if value.dtype.hasobject or value.dtype.names or value.dtype.subdtype:
        raise PayloadError(f"{where} is an array of {value.dtype}: use a plain dtype")
    if len(arrays) >= ARRAYS_MAX:
        raise PayloadError(f"{where}: more than {ARRAYS_MAX} arrays; stack them into fewer")
    import numpy as np

    array = np.ascontiguousarray(value)
    shape = list(value.shape)
    head = [len(arrays), value.dtype.str, shape, isinstance(value, np.generic)]
    flat = array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")
    arrays.append(flat)
    return msgspec.msgpack.Ext(ARRAY, msgspec.msgpack.encode(head))


def _key(value: Any, where: str) -> Any:
    raise PayloadError(f"{where} has a key or member {value!r}: use text, numbers or bytes")


def _refuse(value: Any) -> Any:
    raise PayloadError(f"a {type(value).__qualname__} cannot travel")


def _raiser(arrays: list[memoryview]) -> Callable[[int, memoryview], Any]:
    def raise_extension(code: int, data: memoryview) -> Any:
        if code == TUPLE:
            return tuple(msgspec.msgpack.decode(data, ext_hook=raise_extension))
        if code != ARRAY:
            raise PayloadError(f"the payload has an unknown extension {code}")
        import numpy as np

        index, dtype_text, shape, is_scalar = msgspec.msgpack.decode(data)
        dtype = np.dtype(dtype_text)
        if dtype.hasobject or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise PayloadError("the payload describes an array that may not travel")
        array = np.frombuffer(arrays[index], dtype=dtype).reshape(shape)
        array.flags.writeable = False
        return array[()] if is_scalar else array

    def guarded(code: int, data: memoryview) -> Any:
        try:
            return raise_extension(code, data)
        except (IndexError, KeyError, AttributeError) as error:
            raise PayloadError(f"the payload is damaged: {error}") from None

    return guarded
