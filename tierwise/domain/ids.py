"""Names of things. All are short printable strings, unique within a cluster."""

import re
from typing import NewType

NodeId = NewType("NodeId", str)
FunctionId = NewType("FunctionId", str)  # "namespace/name@version"
RequestId = NewType("RequestId", str)
InstanceId = NewType("InstanceId", str)
PolicyId = NewType("PolicyId", str)  # "name@version"

NO_POLICY = PolicyId("")  # nobody has decided

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")


def is_name(text: str) -> bool:
    """Return whether `text` may name a node, namespace, function or policy (≤ 63 characters)."""
    return _NAME.fullmatch(text) is not None


def function_id(namespace: str, name: str, version: int) -> FunctionId:
    """Return the id of one version of a function, for example `default/resize@3`."""
    return FunctionId(f"{namespace}/{name}@{version}")


def split_function_id(text: str) -> tuple[str, str, int | None]:
    """Return (namespace, name, version) of `name`, `ns/name` or `ns/name@3`; None means latest.

    Raises:
        ValueError: A part is not a valid name or the version is not a positive integer.
    """
    path, _, version_text = text.partition("@")
    namespace, _, name = path.rpartition("/")
    namespace = namespace or "default"
    if not is_name(namespace) or not is_name(name):
        raise ValueError(f"{text!r} is no function: use name, namespace/name or namespace/name@3")
    if not version_text:
        if "@" in text:
            raise ValueError(f"{text!r} ends in '@' without a version")
        return namespace, name, None
    if not version_text.isdigit() or int(version_text) < 1:
        raise ValueError(f"{text!r}: the version after '@' must be a positive integer")
    return namespace, name, int(version_text)
