"""Whoever waits for news of one thing: a piece of work, a federated job."""

import asyncio
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Listeners(Generic[Key]):
    """Wakes those that listen. Belongs to one event loop."""

    def __init__(self) -> None:
        self._by_key: dict[Key, set[asyncio.Event]] = {}

    @contextmanager
    def listening(self, key: Key) -> Iterator[asyncio.Event]:
        """Give an event that `notify` sets; whoever listens clears it before it looks."""
        changed = asyncio.Event()
        listeners = self._by_key.setdefault(key, set())
        listeners.add(changed)
        try:
            yield changed
        finally:
            listeners.discard(changed)
            if not listeners:
                self._by_key.pop(key, None)

    def notify(self, key: Key) -> None:
        """Tell those that listen that something has changed."""
        for changed in self._by_key.get(key, ()):
            changed.set()
