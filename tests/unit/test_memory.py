"""Memory that large payloads leave behind goes back to the system."""

from agent.memory import GIVE_BACK_AFTER_S, LARGE_BYTES, GiveBack
from agent.shell import ANSWERS_BYTES_MAX, ANSWERS_KEPT_S, _Answers
from tierwise.v1 import types_pb2


def test_memory_is_given_back_once_a_while_after_a_large_payload_and_not_for_small_ones() -> None:
    times: list[float] = []
    now_s = 0.0
    memory = GiveBack(lambda: times.append(now_s))
    for now_s in (1.0, 2.0, 3.0):
        memory.freed(1000)
        memory.tick(now_s)
    assert times == []
    memory.freed(LARGE_BYTES)
    for now_s in (4.0, 4.5, 4.0 + GIVE_BACK_AFTER_S, 6.0, 9.0):
        memory.tick(now_s)
    assert times == [4.0 + GIVE_BACK_AFTER_S]


def test_a_stream_of_large_payloads_is_not_held_up_by_giving_back() -> None:
    count = 0

    def trim() -> None:
        nonlocal count
        count += 1

    memory = GiveBack(trim)
    for tick in range(200):  # 10 s of them
        memory.freed(10 * LARGE_BYTES)
        memory.tick(tick * 0.05)
    assert count <= 10 / GIVE_BACK_AFTER_S
    assert count >= 5


def test_answers_are_kept_against_duplicates_for_a_while_and_within_bounds() -> None:
    def answer(name: str, size_bytes: int) -> types_pb2.InvocationResult:
        item = types_pb2.Item(value=bytes(size_bytes))
        return types_pb2.InvocationResult(request_id=name, items=[item])

    answers = _Answers()
    for index in range(20):
        answers.put(answer(str(index), 3 << 20), float(index))
    answers.put(answer("19", 3 << 20), 20.0)  # again
    assert answers.size_bytes <= ANSWERS_BYTES_MAX
    assert "19" in answers.results
    assert "0" not in answers.results
    assert answers.expire(19.0 + ANSWERS_KEPT_S) > 0
    assert list(answers.results) == ["19"]
    assert answers.expire(20.0 + ANSWERS_KEPT_S) > 3 << 20
    assert (answers.size_bytes, answers.put_at_s) == (0, {})
