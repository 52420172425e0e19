"""Policy files: the network as `.npz` without pickles, and a JSON card that says what it is.

They come over the network, so every declared size and shape is checked before anything is
inflated or allocated, and nothing in them is ever executed.
"""

import io
import math
import struct
import zipfile
import zlib
from dataclasses import fields
from typing import Any

import msgspec
import numpy as np

from tierwise.domain.ids import is_name
from tierwise.errors import InvalidArgument
from tierwise.placement.features import FEATURES, SCHEMA
from tierwise.placement.network import Float32, Network
from tierwise.placement.score import ScoreWeights
from tierwise.placement.signals import SIGNALS

FILE_BYTES_MAX = 8 << 20  # of the weights, packed and unpacked
CARD_BYTES_MAX = 1 << 20
HIDDEN_MAX = 512
DIAL_MAX = 1e6  # of β, λ and the score's weights


class Price(msgspec.Struct, kw_only=True, frozen=True):
    """What a policy adds to the base score per unit of a signal, and the signal's trained range."""

    weight: float
    low: float
    high: float


class Card(msgspec.Struct, kw_only=True, frozen=True):
    """What a policy file says of itself."""

    name: str
    version: int
    schema: int
    beta: float
    lam: float
    temperature: float = 0.0  # of the softmax that a decision is drawn from; 0 takes the largest
    score: dict[str, float]
    low: list[float]  # per feature, what was seen in training
    high: list[float]
    prices: dict[str, Price] = msgspec.field(default_factory=dict)  # by SIGNALS; none is 0
    command: str = ""
    seed: int = 0
    commit: str = ""
    data: str = ""
    evaluation: dict[str, Any] = msgspec.field(default_factory=dict)


def pack(network: Network, card: Card) -> tuple[bytes, bytes]:
    """Return (npz, JSON card)."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = dict(network.arrays())
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue(), msgspec.json.format(msgspec.json.encode(card), indent=2)


def unpack_card(card: bytes) -> Card:
    """Return a checked card.

    Raises:
        InvalidArgument: Wrong size, format, schema or numbers; the message names the field.
    """
    if len(card) > CARD_BYTES_MAX:
        raise InvalidArgument(f"the policy's card has {len(card)} bytes; at most {CARD_BYTES_MAX}")
    try:
        about = msgspec.json.decode(card, type=Card)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidArgument(
            f"the policy's card is not valid: {error}; use the policy.json that training wrote"
        ) from None
    if about.schema != SCHEMA:
        raise InvalidArgument(
            f"the policy was trained for feature schema {about.schema}, this is schema {SCHEMA}: "
            "train it again"
        )
    if not is_name(about.name) or about.version < 1:
        raise InvalidArgument(
            "the card needs a name (a-z, 0-9, '.', '_', '-') and a version from 1"
        )
    wrong = set(about.score) ^ {f.name for f in fields(ScoreWeights)}
    if wrong:  # defaults change, and the network was trained on top of these very weights
        raise InvalidArgument(
            f"the card's score must hold every weight of the base score and no other; "
            f"missing or unknown: {', '.join(sorted(wrong))}"
        )
    dials = {"beta": about.beta, "lam": about.lam, "temperature": about.temperature}
    dials |= about.score
    for name, dial in dials.items():
        if not 0.0 <= dial <= DIAL_MAX:
            raise InvalidArgument(f"the card's {name} is {dial}; it must be 0 to {DIAL_MAX:g}")
    if not len(about.low) == len(about.high) == len(FEATURES):
        raise InvalidArgument(f"the card's low and high must have {len(FEATURES)} numbers each")
    for name, low, high in zip(FEATURES, about.low, about.high, strict=True):
        if not -math.inf < low <= high < math.inf:
            raise InvalidArgument(f"the card's range of {name} is {low} to {high}: no finite range")
    for name, price in about.prices.items():
        if name not in SIGNALS:
            raise InvalidArgument(
                f"the card prices {name!r}, which is no signal; known: {', '.join(SIGNALS)}"
            )
        if not abs(price.weight) <= DIAL_MAX or not 0.0 <= price.low <= price.high < math.inf:
            raise InvalidArgument(
                f"the card's price of {name} is {price.weight} in {price.low} to {price.high}; the "
                f"weight must be within ±{DIAL_MAX:g}, the range finite and not negative"
            )
    return about


def unpack_network(weights: bytes) -> Network:
    """Return a checked network.

    Raises:
        InvalidArgument: Wrong size, format, names, shapes or non-finite numbers.
    """
    if len(weights) > FILE_BYTES_MAX:
        raise InvalidArgument(f"the policy file has {len(weights)} bytes; at most {FILE_BYTES_MAX}")
    try:
        with zipfile.ZipFile(io.BytesIO(weights)) as archive:
            arrays = _arrays(archive)
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        ValueError,
        OSError,
        EOFError,
        KeyError,
        RuntimeError,  # encrypted; also NotImplementedError, an unknown feature of zip
    ) as error:
        raise InvalidArgument(
            f"this is no policy file (an .npz without pickled objects): {error}; "
            "publish the policy.npz that training wrote"
        ) from None
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise InvalidArgument(f"{name} holds numbers that are not finite: train it again")
    return Network(**arrays)


def _arrays(archive: zipfile.ZipFile) -> dict[str, Float32]:
    """Read exactly the arrays of a Network; headers are judged before their data is touched."""
    names = [f.name for f in fields(Network)]
    entries = archive.infolist()
    if sorted(entry.filename for entry in entries) != sorted(f"{name}.npy" for name in names):
        raise InvalidArgument(f"the policy file must hold exactly the arrays {', '.join(names)}")
    if sum(entry.file_size for entry in entries) > FILE_BYTES_MAX:
        raise InvalidArgument(f"the policy inflates beyond {FILE_BYTES_MAX} bytes")
    if any(e.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for e in entries):
        raise InvalidArgument("the policy file may be stored or deflated, nothing else")
    arrays: dict[str, Float32] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        raw = archive.read(f"{name}.npy")  # stops at the declared size
        stream = io.BytesIO(raw)
        if np.lib.format.read_magic(stream) != (1, 0):
            raise InvalidArgument(f"{name} is not in .npy format 1.0, as np.savez writes it")
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        if not shapes:  # w1 comes first and sets the width
            inputs, hidden = shape if len(shape) == 2 else (0, 0)
            if inputs != len(FEATURES) or not 1 <= hidden <= HIDDEN_MAX:
                raise InvalidArgument(
                    f"w1 has shape {shape}; it must have {len(FEATURES)} rows and "
                    f"1 to {HIDDEN_MAX} columns"
                )
            shapes = _shapes(hidden)
        if dtype != np.float32 or shape != shapes[name]:
            raise InvalidArgument(f"{name} is {dtype}{shape}; it must be float32{shapes[name]}")
        if len(raw) - stream.tell() != 4 * math.prod(shape):
            raise InvalidArgument(f"{name} holds more or less data than its shape {shape} says")
        flat = np.frombuffer(raw, dtype=np.float32, offset=stream.tell())
        arrays[name] = flat.reshape(shape, order="F" if is_fortran else "C").copy()
    return arrays


def _shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        "w1": (len(FEATURES), hidden),
        "b1": (hidden,),
        "w2": (hidden, hidden),
        "b2": (hidden,),
        "w3": (3 * hidden, hidden),
        "b3": (hidden,),
        "w4": (hidden,),
        "b4": (),
    }
