"""Cached objects ⇄ protobuf: what goes out comes back, and what is wrong is refused by name."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierwise.domain.cache import (
    Durability,
    HeldRounds,
    ObjectInfo,
    ObjectKey,
    ObjectKind,
    RoundClient,
    RoundManifest,
)
from tierwise.errors import InvalidArgument
from tierwise.v1 import cache_pb2, types_pb2
from tierwise.wire import convert_cache as convert
from tierwise.wire import payload

names = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,20}[a-z0-9])?", fullmatch=True)
clients = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:@=+-]{0,20}", fullmatch=True)
numbers = st.integers(0, 2**31 - 1)
uris = st.sampled_from(["", "tierwise://user/ada", "tierwise://node/edge-1"])


def key_of(kind: ObjectKind, namespace: str, job: str, number: int, client: str) -> ObjectKey:
    is_whole = kind is ObjectKind.MATRIX
    return ObjectKey(
        namespace=namespace, job=job, round=number, kind=kind, client="" if is_whole else client
    )


keys = st.builds(key_of, st.sampled_from(ObjectKind), names, names, numbers, clients)
manifests = st.builds(
    RoundManifest,
    namespace=names,
    job=names,
    round=numbers,
    clients=st.lists(
        st.builds(RoundClient, client=clients, writer=uris),
        max_size=4,
        unique_by=lambda c: c.client,
    ).map(tuple),
    parameter_count=st.integers(1, 2**34),
    distance_max=st.floats(0, 1e9),
    base=st.none() | keys,
    replica_nodes=st.lists(names, max_size=3).map(tuple),
    owner=uris,
    home=st.just("") | names,
)
infos = st.builds(
    ObjectInfo,
    key=keys,
    size_bytes=st.integers(0, 2**62),
    digest=st.sampled_from(["", "0a" * 32]),
    durability=st.sampled_from(Durability),
    node_ids=st.lists(names, max_size=3).map(tuple),
    is_in_memory=st.booleans(),
    quarantined=st.sampled_from(["", "holds NaN"]),
    metadata=st.none() | st.dictionaries(names, st.floats(0, 1) | names, min_size=1, max_size=3),
)
holdings = st.builds(
    HeldRounds,
    namespace=names,
    job=names,
    rounds=st.lists(numbers, max_size=64).map(lambda found: tuple(sorted(found))),
    size_bytes=st.integers(0, 2**62),
    owner=uris,
    is_copy=st.booleans(),
    newest_done=st.integers(-1, 2**31 - 1),
)


@given(keys)
def test_a_key_comes_back(key: ObjectKey) -> None:
    assert convert.key_from_pb(convert.key_to_pb(key)) == key


@given(manifests)
def test_a_manifest_comes_back(manifest: RoundManifest) -> None:
    assert convert.manifest_from_pb(convert.manifest_to_pb(manifest)) == manifest


@given(infos)
def test_what_is_known_of_an_object_comes_back(info: ObjectInfo) -> None:
    assert convert.info_from_pb(convert.info_to_pb(info)) == info


@given(st.lists(holdings, max_size=4))
def test_what_a_node_holds_comes_back(held: list[HeldRounds]) -> None:
    assert convert.held_from_pb(map(convert.held_to_pb, held)) == tuple(held)


def key(**changes: Any) -> cache_pb2.ObjectKey:
    found = cache_pb2.ObjectKey(
        namespace="default", job="digits", round=1, client="a", kind=cache_pb2.OBJECT_KIND_UPDATE
    )
    for name, value in changes.items():
        setattr(found, name, value)
    return found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"namespace": "../etc"}, "namespace"),
        ({"job": ""}, "job"),
        ({"round": -1}, "round"),
        ({"client": "a\nb"}, "client"),
        ({"client": "a" * 200}, "client"),
        ({"client": ""}, "needs a client"),
        ({"kind": 0}, "kind"),
        ({"kind": cache_pb2.OBJECT_KIND_MATRIX}, "of a round"),
    ],
)
def test_a_wrong_key_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        convert.key_from_pb(key(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parameter_count": 0}, "parameter_count"),
        ({"distance_max": -1.0}, "distance_max"),
        ({"distance_max": float("nan")}, "distance_max"),
        ({"replica_nodes": ["x"] * 20}, "replica_nodes"),
        ({"clients": [cache_pb2.RoundClient(client="a")] * 2}, "twice"),
        ({"owner": "x" * 300}, "owner"),
    ],
)
def test_a_wrong_manifest_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    fields: dict[str, Any] = {"namespace": "n", "job": "j", "parameter_count": 1, **changes}
    with pytest.raises(InvalidArgument, match=words):
        convert.manifest_from_pb(cache_pb2.RoundManifest(**fields))


def test_metadata_is_a_small_dict() -> None:
    facts = {"example_count": 3, "loss": 0.25, "layers": [1, 2]}
    assert convert.metadata_from_bytes(convert.metadata_to_bytes(facts)) == facts
    assert convert.metadata_from_bytes(b"") is None
    with pytest.raises(InvalidArgument, match="at most"):
        convert.metadata_to_bytes({"x": "y" * convert.METADATA_BYTES_MAX})
    with pytest.raises(InvalidArgument, match="cannot travel"):
        convert.metadata_to_bytes({"x": object()})
    for blob in (b"junk", payload.encode([1]), payload.encode({1: 2})):
        with pytest.raises(InvalidArgument):
            convert.metadata_from_bytes(blob)


def invocation(**fields: Any) -> types_pb2.Invocation:
    return types_pb2.Invocation(arguments=[b"x"], **fields)


def test_who_reads_and_puts_is_filled_in_for_callers_and_kept_from_nodes() -> None:
    ref = cache_pb2.ObjectRef(key=key(), caller="tierwise://user/forged")
    asked = invocation(inputs=[ref], output=cache_pb2.ObjectSink(key=key()))
    assert convert.check_objects(asked, "tierwise://user/ada")
    assert asked.inputs[0].caller == asked.output.caller == "tierwise://user/ada"
    assert convert.check_objects(asked)
    assert asked.inputs[0].caller == "tierwise://user/ada"
    assert not convert.check_objects(invocation(), "tierwise://user/ada")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (invocation(inputs=[cache_pb2.ObjectRef(key=key(round=-1))]), "round"),
        (invocation(inputs=[cache_pb2.ObjectRef(key=key(), node_id="A B")]), "node_id"),
        (invocation(inputs=[cache_pb2.ObjectRef(key=key())] * 17), "inputs"),
        (invocation(inputs=[cache_pb2.ObjectRef(key=key())], attachments=[1]), "attachments"),
        (
            types_pb2.Invocation(arguments=[b"x"] * 2, inputs=[cache_pb2.ObjectRef(key=key())]),
            "single",
        ),
        (invocation(output=cache_pb2.ObjectSink(key=key(), encoding="zip")), "encoding"),
        (
            invocation(
                output=cache_pb2.ObjectSink(key=key(kind=cache_pb2.OBJECT_KIND_MATRIX, client=""))
            ),
            "matrix",
        ),
    ],
)
def test_wrong_inputs_and_outputs_are_refused(asked: types_pb2.Invocation, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        convert.check_objects(asked)
