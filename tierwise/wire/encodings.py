"""The names under which vectors travel; what they mean is in `compression`, which needs NumPy."""

from tierwise.errors import InvalidArgument

RAW, FP16, INT8, AUTO = "", "fp16", "int8", "auto"
ENCODINGS = (RAW, FP16, INT8)


def check(encoding: str) -> None:
    """Refuse what is no encoding.

    Raises:
        InvalidArgument: It is none.
    """
    if encoding not in ENCODINGS:
        raise InvalidArgument(f"encoding {encoding[:40]!r}: use fp16, int8 or none")
