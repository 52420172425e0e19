"""What nodes know of each other's caches, and who may touch which job."""

from dataclasses import replace

import numpy as np
import pytest

from agent.cache.holders import HolderIndex
from agent.cache.lists import merged
from agent.cache.own import copies_of
from agent.cache.residuals import Residuals
from agent.cache.rights import CLUSTER, Rights
from tierwise.domain.cache import (
    DATA_NODES_MAX,
    HeldRounds,
    ObjectKey,
    ObjectKind,
    RoundClient,
    RoundManifest,
    most_bytes,
)
from tierwise.domain.event import PeerSeen, ViewReceived
from tierwise.domain.ids import NodeId
from tierwise.domain.resources import Resources
from tierwise.domain.topology import Node, NodeState, Tier
from tierwise.domain.view import NodeReading
from tierwise.errors import PermissionDenied
from tierwise.v1 import cache_pb2
from tierwise.wire.identity import Identity, Role

HERE, FOG, CLOUD = NodeId("edge-1"), NodeId("fog-1"), NodeId("cloud-1")
ADA, MALLORY = "tierwise://user/ada", "tierwise://user/mallory"
ADMIN = "tierwise://admin/admin"


def held(*rounds: int, owner: str = ADA, **changes: object) -> HeldRounds:
    base = HeldRounds(namespace="default", job="digits", rounds=rounds, owner=owner)
    return replace(base, **changes)  # type: ignore[arg-type]


def seen(
    name: NodeId, *rows: HeldRounds, state: NodeState = NodeState.READY, is_news: bool = True
) -> PeerSeen:
    capacity = Resources(cpus=1, memory_mib=512)
    return PeerSeen(
        node=Node(node_id=name, tier=Tier.FOG, capacity=capacity),
        state=state,
        reading=NodeReading(),
        age_s=0.0,
        held=rows if is_news else None,
    )


def index(*peers: PeerSeen) -> HolderIndex:
    found = HolderIndex(HERE)
    found.received(ViewReceived(peers=peers))
    return found


def manifest(number: int = 1, **changes: object) -> RoundManifest:
    base = RoundManifest(
        namespace="default",
        job="digits",
        round=number,
        clients=(
            RoundClient(client="hers"),
            RoundClient(client="his", writer=MALLORY),
            RoundClient(client="its", writer="tierwise://node/fog-1"),
        ),
        parameter_count=10,
        owner=ADA,
        home=HERE,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def key(kind: ObjectKind = ObjectKind.UPDATE, client: str = "hers", number: int = 1) -> ObjectKey:
    return ObjectKey(namespace="default", job="digits", round=number, kind=kind, client=client)


def rights(*manifests: RoundManifest, owner: str = "") -> Rights:
    return Rights(lambda namespace, job: list(manifests), lambda namespace, job: owner)


# -- who holds what --------------------------------------------------------------------------------


def test_who_took_a_round_comes_before_copies_and_who_is_lost_comes_last() -> None:
    found = index(seen(CLOUD, held(1, is_copy=True)), seen(FOG, held(1)))
    assert found.holders("default", "digits", 1) == [FOG, CLOUD]
    lost = index(seen(CLOUD, held(1, is_copy=True)), seen(FOG, held(1), state=NodeState.LOST))
    assert lost.holders("default", "digits", 1) == [CLOUD, FOG]
    assert lost.holders("default", "digits", 2) == []
    assert lost.holders("default", "other", 1) == []
    assert lost.others() == [CLOUD]


def test_no_news_changes_nothing_and_an_empty_list_says_that_all_is_gone() -> None:
    found = index(seen(FOG, held(1)))
    found.received(ViewReceived(peers=(seen(FOG, is_news=False),)))
    assert found.holders("default", "digits", 1) == [FOG]
    found.received(ViewReceived(peers=(seen(FOG),)))
    assert found.holders("default", "digits", 1) == []


def test_a_node_that_is_gone_from_a_full_view_is_forgotten() -> None:
    found = index(seen(FOG, held(1)), seen(CLOUD, held(1)))
    found.received(ViewReceived(peers=(seen(CLOUD, is_news=False),), is_full=True))
    assert found.holders("default", "digits", 1) == [CLOUD]
    assert found.owner("default", "digits") == ADA


def test_the_newest_round_that_is_done_is_where_questions_go() -> None:
    found = index(seen(FOG, held(1, 2, newest_done=1)), seen(CLOUD, held(3)))
    assert found.newest("default", "digits") == (1, 3, [FOG])
    assert index(seen(CLOUD, held(3))).newest("default", "digits") == (-1, 3, [CLOUD])
    assert index().newest("default", "digits") is None


def test_a_call_goes_to_who_holds_most_of_what_it_reads() -> None:
    assert most_bytes([([FOG, CLOUD], 10), ([CLOUD], 5), ([FOG], 4)]) == (CLOUD,)
    assert most_bytes([([FOG, CLOUD], 10)]) == (CLOUD, FOG)
    assert most_bytes([([], 10)]) == ()
    many = [NodeId(f"n{i}") for i in range(50)]
    assert len(most_bytes([(many, 1)])) == DATA_NODES_MAX


def test_copies_go_to_every_other_node_of_a_round_its_home_among_them() -> None:
    found = manifest(replica_nodes=("fog-1", "cloud-1"))
    assert copies_of(found, HERE) == [FOG, CLOUD]
    assert copies_of(found, FOG) == [HERE, CLOUD]
    assert copies_of(manifest(), HERE) == []


# -- who may touch what ----------------------------------------------------------------------------


@pytest.mark.parametrize("caller", [ADA, ADMIN, CLUSTER, "tierwise://scheduler/scheduler"])
def test_a_job_is_its_owners_and_administrators(caller: str) -> None:
    for known in (rights(manifest()), rights(owner=ADA)):
        known.check_owner(caller, "default", "digits")
        known.check_read(caller, key())


@pytest.mark.parametrize("caller", [MALLORY, "tierwise://node/fog-1", "nonsense"])
def test_nobody_else_touches_it(caller: str) -> None:
    for known in (rights(manifest()), rights(owner=ADA)):
        with pytest.raises(PermissionDenied, match="ada"):
            known.check_owner(caller, "default", "digits")
        with pytest.raises(PermissionDenied):
            known.check_read(caller, key())
    rights().check_owner(caller, "default", "digits")  # nobody's yet


def test_a_writer_reads_aggregates_and_its_own_update() -> None:
    known = rights(manifest())
    known.check_read(MALLORY, key(ObjectKind.AGGREGATE, client=""))
    known.check_read(MALLORY, key(client="his"))
    for other in (key(), key(ObjectKind.MATRIX, client=""), key(ObjectKind.METADATA, client="")):
        with pytest.raises(PermissionDenied):
            known.check_read(MALLORY, other)


def test_a_node_that_is_named_as_writer_must_bring_the_update_itself() -> None:
    known = rights(manifest())
    fog, cloud = Identity(Role.NODE, "fog-1"), Identity(Role.NODE, "cloud-1")
    assert known.writer(key(client="its"), ADA, fog) == fog.uri
    assert known.writer(key(client="its"), CLUSTER, cloud) == cloud.uri  # which the store refuses
    assert known.writer(key(client="its"), MALLORY, fog) == MALLORY  # as it does him
    ada = Identity(Role.USER, "ada")
    assert known.writer(key(client="its"), ADA, ada) == ADA
    assert known.writer(key(client="hers"), ADMIN, Identity(Role.ADMIN, "admin")) == ADA
    assert known.writer(key(client="his"), MALLORY, cloud) == MALLORY
    assert known.writer(key(client="hers"), CLUSTER, cloud) == CLUSTER


# -- lists and leftovers ---------------------------------------------------------------------------


def info(client: str, node: str, digest: str = "aa", durability: int = 2) -> cache_pb2.ObjectInfo:
    name = cache_pb2.ObjectKey(
        namespace="n", job="j", round=1, client=client, kind=cache_pb2.OBJECT_KIND_UPDATE
    )
    return cache_pb2.ObjectInfo(
        key=name,
        digest=digest,
        durability=cache_pb2.Durability.ValueType(durability),
        node_ids=[node],
    )


def test_an_object_at_several_nodes_is_one_row_as_durable_as_its_best_copy() -> None:
    own = cache_pb2.ListObjectsResponse(objects=[info("b", "edge-1"), info("a", "edge-1")])
    other = cache_pb2.ListObjectsResponse(
        objects=[info("a", "fog-1", durability=4), info("b", "fog-1", digest="bb")]
    )
    found = merged(own, [other]).objects
    assert [(row.key.client, list(row.node_ids), row.durability) for row in found] == [
        ("a", ["edge-1", "fog-1"], 4),
        ("b", ["edge-1"], 2),
        ("b", ["fog-1"], 2),  # another content: both are shown
    ]


def test_residuals_are_bounded_and_begin_again_when_a_model_changes() -> None:
    kept = Residuals(bytes_max=100)
    for client in ("a", "b", "c"):
        kept.keep(key(client=client), np.ones(10, np.float32))
    assert not kept.copy_of(key(client="a"), 10).any()  # the oldest went
    assert kept.copy_of(key(client="c"), 10).all()
    assert not kept.copy_of(key(client="c"), 11).any()
    kept.forget("default", "digits")
    assert not kept.copy_of(key(client="c"), 10).any()
