"""Questions that are answered from the statistics which were taken while updates came in."""

import asyncio
from typing import Any

from agent.cache.store import CacheStore
from tierwise.errors import FailedPrecondition, InvalidArgument, NotFound
from tierwise.functions.fl.questions import find

QUICK_CLIENTS_MAX = 64  # of more, a question is answered in a thread
HISTORY_MAX = 64  # rounds that one question reads


class Answers:
    """Answers for one node."""

    def __init__(self, store: CacheStore) -> None:
        self._store = store

    async def of(
        self, namespace: str, job: str, number: int, name: str, arguments: dict[str, Any]
    ) -> tuple[Any, int]:
        """Return an answer, and the round that it is of.

        Args:
            namespace: Of the job.
            job: Its name.
            number: The round; −1: the newest.
            name: Of the question.
            arguments: What it takes.

        Raises:
            NotFound: No such round is held here.
            InvalidArgument: There is no such question, or it is asked wrongly.
            FailedPrecondition: It needs the vectors themselves.
        """
        try:
            question = find(name)
        except ValueError as error:
            raise InvalidArgument(str(error)) from None
        if question.needs != "statistics":
            raise FailedPrecondition(
                f"{question.name} needs the vectors themselves: ask it with Rounds.ask or "
                "`tierwise fl ask`, which run it where they lie"
            )
        found: Any
        if question.rounds == 1:
            found = await self._store.statistics(namespace, job, number)
            newest = found
        else:
            count = min(question.rounds or HISTORY_MAX, HISTORY_MAX)
            found = await self._store.history(namespace, job, count=count)
            if not found:
                raise NotFound(f"no round of {namespace}/{job} is held here")
            newest = found[-1]
        try:
            checked = question.checked(arguments)
            if len(newest.clients) <= QUICK_CLIENTS_MAX:
                return question.function(found, **checked), newest.round
            answer = await asyncio.to_thread(question.function, found, **checked)
        except ValueError as error:
            raise InvalidArgument(f"{question.name}: {error}") from None
        return answer, newest.round
