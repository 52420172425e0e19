"""Arrays in shared memory, which calls on the same machine are given without a copy."""

from collections.abc import Iterable
from typing import Any

from tierwise.errors import InvalidArgument
from tierwise.wire import memfd


class SharedArray:
    """An array that was put into shared memory once: pass it to as many calls as you like.

    A function on this machine gets a read-only view of the same memory; to one elsewhere the bytes
    travel as those of any array. `array` is such a view for this process.
    """

    __slots__ = ("array", "file", "nbytes")

    def __init__(self, array: Any) -> None:
        import numpy as np

        found = np.ascontiguousarray(array)
        if found.dtype.hasobject or found.dtype.names or not found.nbytes:
            raise InvalidArgument(
                f"an array of {found.dtype} and shape {found.shape} cannot be shared: use a plain "
                "dtype, and at least one element"
            )
        self.file = memfd.make([found.reshape(-1).view(np.uint8).data])
        self.array = np.frombuffer(self.file.view(), dtype=found.dtype).reshape(np.shape(array))
        self.nbytes = self.file.nbytes

    @classmethod
    def joined(cls, parts: Iterable[Any]) -> "SharedArray":
        """Return the bytes of `parts`, one after the other, as one array of uint8; copied once."""
        import numpy as np

        made = cls.__new__(cls)
        made.file = memfd.make(parts)
        made.array = np.frombuffer(made.file.view(), dtype=np.uint8)
        made.nbytes = made.file.nbytes
        return made

    @property
    def __tierwise_array__(self) -> Any:
        """Return the array, for whoever must copy it."""
        return self.array


def share(array: Any) -> SharedArray:
    """Copy an array into shared memory, once, for calls on this machine.

    Raises:
        InvalidArgument: Its dtype cannot travel, or it is empty.
    """
    return SharedArray(array)
