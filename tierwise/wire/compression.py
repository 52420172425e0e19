"""How float32 vectors travel: as they are, as fp16, or as int8 with a scale per block.

`fp16` halves the bytes and rounds to 11 bits. `int8` quarters them: each block of 1024 elements is
a float32 scale (its largest magnitude ÷ 127) and one int8 per element, rounded to nearest (linear
quantisation per block, as in QSGD's max-norm variant, Alistarh et al. 2017, §3.3, without its
randomness). What rounding loses is kept by the sender and added to the next vector of the same
client: *error feedback* (Seide et al. 2014, §2; Karimireddy et al. 2019, algorithm 1), so that
errors do not add up over rounds. Differences from a vector that both sides have compress best.

Vectors are encoded and decoded chunk by chunk, so neither side holds a second copy.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierwise.domain.topology import Link
from tierwise.errors import InvalidArgument
from tierwise.wire.encodings import AUTO, ENCODINGS, FP16, INT8, RAW, check

BLOCK = 1024  # elements that share a scale
RECORD_BYTES = 4 + BLOCK
CHUNK_BYTES_MAX = 1 << 20
# Whole blocks, whose raw bytes fit into one message of the stream.
CHUNK_ELEMENTS = CHUNK_BYTES_MAX // 4
SAMPLE_ELEMENTS = 1 << 18  # to measure how fast this machine encodes
_LEVELS = 127.0

Vector = NDArray[np.float32]

__all__ = [
    "AUTO",
    "ENCODINGS",
    "FP16",
    "INT8",
    "RAW",
    "Decoder",
    "Rates",
    "Vector",
    "check",
    "choose",
    "encoded",
    "encoded_bytes",
    "measured",
]


def encoded_bytes(encoding: str, element_count: int) -> int:
    """Return how many bytes a vector travels as.

    Raises:
        InvalidArgument: There is no such encoding.
    """
    check(encoding)
    if encoding == FP16:
        return 2 * element_count
    if encoding == INT8:
        return element_count + 4 * -(-element_count // BLOCK)
    return 4 * element_count


def encoded(
    vector: Vector,
    encoding: str,
    *,
    relative_to: Vector | None = None,
    residual: Vector | None = None,
) -> Iterator[Any]:
    """Yield the bytes of a vector in chunks of at most 1 MiB.

    Args:
        vector: Shape (P,), float32.
        encoding: One of ENCODINGS.
        relative_to: Subtracted first; the other side adds it.
        residual: Shape (P,), float32: what the last encoding lost. It is added first, and replaced
            by what this one loses.

    Raises:
        InvalidArgument: There is no such encoding, or a value is too large for it.
    """
    check(encoding)
    for start in range(0, len(vector), CHUNK_ELEMENTS):
        part: Any = vector[start : start + CHUNK_ELEMENTS]
        stop = start + len(part)
        if relative_to is not None:
            part = part - relative_to[start:stop]
        if encoding == RAW:
            yield np.ascontiguousarray(part).view(np.uint8).data
            continue
        if residual is not None:
            part = part + residual[start:stop]
        blob, arrived = (_to_fp16 if encoding == FP16 else _to_int8)(part)
        if residual is not None:
            lost = part - arrived
            lost[~np.isfinite(lost)] = 0.0  # what is no number is not made up for
            residual[start:stop] = lost
        yield blob


class Decoder:
    """Turns the bytes of one vector, cut anywhere, back into float32."""

    def __init__(self, encoding: str, relative_to: Vector | None = None) -> None:
        """Begin a vector.

        Args:
            encoding: As it was encoded.
            relative_to: What was subtracted, shape (P,).

        Raises:
            InvalidArgument: There is no such encoding.
        """
        check(encoding)
        self._encoding = encoding
        self._relative_to = relative_to
        self._unit = {RAW: 4, FP16: 2, INT8: RECORD_BYTES}[encoding]
        self._rest = b""
        self._count = 0

    def feed(self, chunk: bytes) -> Any:
        """Return the bytes of the elements that are complete, as float32."""
        if self._encoding == RAW and self._relative_to is None:
            return chunk
        body: Any = self._rest + chunk if self._rest else chunk
        whole = len(body) // self._unit * self._unit
        self._rest = bytes(body[whole:])
        return self._decoded(memoryview(body)[:whole])

    def finish(self) -> Any:
        """Return the bytes of what is left: a last block may be short.

        Raises:
            InvalidArgument: An element is cut in two.
        """
        rest, self._rest = self._rest, b""
        if rest and (self._encoding != INT8 or len(rest) <= 4):
            raise InvalidArgument("the vector ends within an element: send all of it")
        return self._decoded(memoryview(rest))

    def _decoded(self, body: memoryview) -> Any:
        found: Any
        if self._encoding == RAW:
            found = np.frombuffer(body, np.float32)
        elif self._encoding == FP16:
            found = np.frombuffer(body, np.float16).astype(np.float32)
        else:
            found = _from_int8(body)
        start = self._count
        self._count += len(found)
        if self._relative_to is not None:
            base = self._relative_to[start : self._count]
            if len(base) < len(found):
                raise InvalidArgument("the vector is longer than the one it is relative to")
            found = found + base
        return memoryview(found).cast("B")


def _to_fp16(part: Vector) -> tuple[Any, Vector]:
    try:
        with np.errstate(over="raise"):
            half = part.astype(np.float16)
    except FloatingPointError:
        raise InvalidArgument(
            "a value is beyond 65504 and cannot travel as fp16: send it as it is"
        ) from None
    return half.tobytes(), half.astype(np.float32)


def _to_int8(part: Vector) -> tuple[Any, Vector]:
    count = len(part)
    full = count // BLOCK
    records = np.empty((full, RECORD_BYTES), np.uint8)
    arrived = np.empty(count, np.float32)
    whole, scales = _quantised(part[: full * BLOCK].reshape(full, BLOCK))
    records[:, :4] = scales.view(np.uint8)
    records[:, 4:] = whole.view(np.uint8)
    np.multiply(whole, scales, out=arrived[: full * BLOCK].reshape(full, BLOCK))
    blob = records.tobytes()
    if full * BLOCK < count:
        rest, scales = _quantised(part[full * BLOCK :].reshape(1, -1))
        arrived[full * BLOCK :] = (rest * scales)[0]
        blob += scales.tobytes() + rest.tobytes()
    return blob, arrived


def _quantised(blocks: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return int8 values of the same shape, and a scale per row; NaN where a row is not finite."""
    largest = np.maximum(blocks.max(axis=1, initial=0.0), -blocks.min(axis=1, initial=0.0))
    scales = (largest / np.float32(_LEVELS)).astype(np.float32)
    is_broken = ~np.isfinite(scales)
    inverse = np.zeros_like(scales)
    np.divide(1.0, scales, out=inverse, where=(scales > np.finfo(np.float32).tiny) & ~is_broken)
    scales[is_broken] = np.nan
    with np.errstate(invalid="ignore"):  # rows that are not finite are put right below
        scaled = blocks * inverse[:, None]
    if is_broken.any():
        scaled[is_broken] = 0.0
    np.rint(scaled, out=scaled)
    return scaled.astype(np.int8), scales[:, None]


def _from_int8(body: memoryview) -> Vector:
    full = len(body) // RECORD_BYTES
    records = np.frombuffer(body[: full * RECORD_BYTES], np.uint8).reshape(full, RECORD_BYTES)
    scales = np.ascontiguousarray(records[:, :4]).view(np.float32)
    found = (records[:, 4:].view(np.int8) * scales).reshape(-1)
    rest = body[full * RECORD_BYTES :]
    if rest:
        scale = np.frombuffer(rest[:4], np.float32)
        found = np.concatenate([found, np.frombuffer(rest[4:], np.int8) * scale])
    return found.astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds per element that this machine needs to encode and decode, by encoding."""

    seconds: Mapping[str, float]


def measured(clock_s: Callable[[], float]) -> Rates:
    """Measure how fast this machine encodes and decodes, in some milliseconds.

    The other side is taken to be as fast.
    """
    sample = np.linspace(-1.0, 1.0, SAMPLE_ELEMENTS, dtype=np.float32)
    seconds = {RAW: 0.0}
    for encoding in (FP16, INT8):
        best_s = float("inf")
        for _ in range(3):
            started_s = clock_s()
            residual = np.zeros_like(sample)
            decoder = Decoder(encoding)
            for chunk in encoded(sample, encoding, residual=residual):
                decoder.feed(chunk)
            best_s = min(best_s, clock_s() - started_s)
        seconds[encoding] = best_s / SAMPLE_ELEMENTS
    return Rates(seconds)


def choose(element_count: int, link: Link, rates: Rates) -> str:
    """Return the encoding that brings a vector over a link soonest; the exact one if it is equal.

    Args:
        element_count: Of the vector.
        link: The way to the other side.
        rates: Of this machine.
    """

    def total_s(encoding: str) -> float:
        moving_s = encoded_bytes(encoding, element_count) / link.bandwidth_bytes_per_s
        return moving_s + rates.seconds[encoding] * element_count

    return min(ENCODINGS, key=total_s)
