"""Arguments and results as bytes: msgpack, with NumPy arrays out of band.

This file stands alone: workers load it by path, for they cannot import tierwise. A blob is

    b"T1" | u16 array count | u32 head length | count × u64 array length | head | arrays at 64 bytes

and `head` is msgpack in which an array is the extension 1 = msgpack [index, dtype, shape] and a
tuple the extension 2. Decoded arrays are read-only views into the blob: nothing is copied.

A length with its highest bit set says that the array is *detached*: its bytes travel beside the
blob (see memfd.py), in order, and `decode` is given views of them.
"""

import struct
from collections.abc import Sequence
from typing import Any

import msgspec

MAGIC = b"T1"
ARRAY, TUPLE = 1, 2
ARRAYS_MAX = 10_000
DETACHED = 1 << 63
DETACH_BYTES_MIN = 1 << 20
_HEADER = struct.Struct("<2sHI")
_ALIGN = 64
_PLAIN = (bool, int, float, str, bytes, type(None))


class PayloadError(ValueError):
    """A value cannot travel, or a blob is no payload; the message says where and what to do."""


def encode(
    value: object,
    name: str = "value",
    *,
    detached: list[Any] | None = None,
    detach_max: int = 16,
    only_refs: bool = False,
) -> bytes:
    """Return `value` as one blob.

    None, bool, int, float, str, bytes, list, tuple, dict, set, datetime and NumPy arrays and
    scalars may travel.

    Args:
        value: What travels.
        name: What messages call it.
        detached: If given, the first arrays of 1 MiB or more are put here instead of into the
            blob: as memoryviews, or as the objects with `__tierwise_array__` that held them.
        detach_max: At most so many.
        only_refs: Put nothing there but objects with `__tierwise_ref__` (dtype and shape), which
            stand for arrays that lie elsewhere. If there are any, arrays that are here stay inside.

    Raises:
        PayloadError: Something inside is of another type; the message names its place.
    """
    arrays: list[Any] = []
    try:
        head = msgspec.msgpack.encode(_lower(value, arrays, name, 0), enc_hook=_refuse)
    except (TypeError, OverflowError, RecursionError, ValueError) as error:
        if isinstance(error, PayloadError):
            raise
        raise PayloadError(f"{name} cannot travel: {error}") from None
    if not arrays:
        return _HEADER.pack(MAGIC, 0, len(head)) + head
    lengths, inside = [], []
    refs = [array for array in arrays if hasattr(type(array), "__tierwise_ref__")]
    if refs and (detached is None or len(refs) > detach_max):
        may = "here" if detached is None else f"in such numbers: use at most {detach_max}"
        raise PayloadError(f"{name} holds arrays that lie in a cache, which cannot travel {may}")
    for array in arrays:
        length = array.nbytes
        if refs or only_refs:
            is_beside = hasattr(type(array), "__tierwise_ref__")
        else:
            is_beside = length >= DETACH_BYTES_MIN
        if is_beside and detached is not None and len(detached) < detach_max:
            detached.append(array)
            lengths.append(length | DETACHED)
        else:
            inside.append(view_of(array))
            lengths.append(length)
    return _assemble(head, lengths, inside)


def inline(blob: bytes, attachments: Sequence[Any]) -> bytes:
    """Return a blob with its detached arrays put back inside, for those who share no memory.

    Raises:
        PayloadError: The blob is damaged, or an attachment is missing or too short.
    """
    if not attachments:
        return blob
    try:
        head, arrays = _split(blob, [view_of(attachment) for attachment in attachments])
    except struct.error as error:
        raise PayloadError(f"the payload is damaged: {error}") from None
    return _assemble(bytes(head), [array.nbytes for array in arrays], arrays)


def detached_bytes(blob: bytes) -> list[int]:
    """Return the sizes of the arrays that travel beside a blob, in order; none if it is damaged."""
    try:
        magic, count, _ = _HEADER.unpack_from(blob)
        if magic != MAGIC or count > ARRAYS_MAX:
            return []
        lengths = struct.unpack_from(f"<{count}Q", blob, _HEADER.size)
    except struct.error:
        return []
    return [length ^ DETACHED for length in lengths if length & DETACHED]


def view_of(array: Any) -> memoryview:
    """Return the bytes of what `encode` detaches."""
    return (
        array if isinstance(array, memoryview) else memoryview(array.__tierwise_array__).cast("B")
    )


def _assemble(head: bytes, lengths: list[int], arrays: list[memoryview]) -> bytes:
    parts: list[Any] = [
        _HEADER.pack(MAGIC, len(lengths), len(head)),
        struct.pack(f"<{len(lengths)}Q", *lengths),
        head,
    ]
    size = sum(map(len, parts))
    for array in arrays:
        padding = -size % _ALIGN
        parts += [b"\0" * padding, array]
        size += padding + array.nbytes
    return b"".join(parts)


def decode(blob: bytes | memoryview, attachments: Sequence[memoryview] = ()) -> Any:
    """Return the value in `blob`; arrays are read-only views of it, or of the attachments.

    Raises:
        PayloadError: It is truncated, damaged or no payload.
    """
    try:
        head, arrays = _split(blob, attachments)
        return msgspec.msgpack.decode(head, ext_hook=_Raiser(arrays))
    except PayloadError:
        raise
    except (ValueError, TypeError, struct.error, RecursionError, OverflowError) as error:
        raise PayloadError(f"the payload is damaged: {error}") from None
    except MemoryError:
        raise PayloadError("the payload is damaged: a length is out of bounds") from None


def _split(
    blob: bytes | memoryview, attachments: Sequence[memoryview]
) -> tuple[memoryview, list[memoryview]]:
    """Return the head of a blob and its arrays, wherever they are."""
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
    beside = iter(attachments)
    offset = start + head_length
    for length in lengths:
        if length & DETACHED:
            array = next(beside, None)
            if array is None or array.nbytes < length - DETACHED:
                raise PayloadError("an array that travelled beside the payload is missing")
            arrays.append(array[: length - DETACHED])
            continue
        offset += -offset % _ALIGN
        if offset + length > len(view):
            raise PayloadError("the payload is truncated")
        arrays.append(view[offset : offset + length])
        offset += length
    return head, arrays


def _lower(value: Any, arrays: list[Any], where: str, depth: int) -> Any:
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
    if hasattr(kind, "__tierwise_array__"):
        lowered = _lower_array(value.__tierwise_array__, arrays, where)
        arrays[-1] = value  # its bytes lie in shared memory already
        return lowered
    if hasattr(kind, "__tierwise_ref__"):
        dtype, shape = value.__tierwise_ref__
        head = [len(arrays), dtype, list(shape), False]
        arrays.append(value)
        return msgspec.msgpack.Ext(ARRAY, msgspec.msgpack.encode(head))
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


def _lower_array(value: Any, arrays: list[Any], where: str) -> msgspec.msgpack.Ext:
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


class _Raiser:
    """Makes arrays and tuples of their extensions. No closure: a cycle would keep large arrays."""

    __slots__ = ("_arrays",)

    def __init__(self, arrays: list[memoryview]) -> None:
        self._arrays = arrays

    def __call__(self, code: int, data: memoryview) -> Any:
        try:
            return self._raised(code, data)
        except (IndexError, KeyError, AttributeError) as error:
            raise PayloadError(f"the payload is damaged: {error}") from None

    def _raised(self, code: int, data: memoryview) -> Any:
        if code == TUPLE:
            return tuple(msgspec.msgpack.decode(data, ext_hook=self))
        if code != ARRAY:
            raise PayloadError(f"the payload has an unknown extension {code}")
        import numpy as np

        index, dtype_text, shape, is_scalar = msgspec.msgpack.decode(data)
        dtype = np.dtype(dtype_text)
        if dtype.hasobject or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise PayloadError("the payload describes an array that may not travel")
        array = np.frombuffer(self._arrays[index], dtype=dtype).reshape(shape)
        array.flags.writeable = False
        return array[()] if is_scalar else array
