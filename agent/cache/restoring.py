"""What a cache finds when it starts: its files, its machine; and how short its journal is kept."""

import contextlib
import os
import threading
from pathlib import Path

import structlog

from agent.cache.folder import Folder
from agent.cache.index import Index
from agent.cache.journal import Journal
from agent.probe import Probe

log = structlog.get_logger()

JOURNAL_FACTOR, JOURNAL_RECORDS_MIN = 4, 2000  # rewritten when so much longer than needed
NICENESS = 5  # of the thread that counts: answers and updates come first


def restore(index: Index, folder: Folder, journal: Journal) -> None:
    """Take up what is on the disk. Blocking.

    An acknowledged object is there: its file was whole before the journal named it. A file that no
    record names was never acknowledged, and is deleted.
    """
    folder.open()
    for record in journal.open():
        index.apply(record)
    for entry in list(index.entries()):
        if entry.has_file and folder.size_bytes(entry.digest) != entry.size_bytes:
            # The file system lost it, or somebody did: the store may still have it.
            log.error("cache.file_lost", key=str(entry.key), is_stored=entry.is_stored)
            if entry.is_stored:
                index.mark_on_disk(entry, False)
            else:
                index.remove(entry.key)
    if count := folder.sweep(index.digests()):
        log.info("cache.unacknowledged_deleted", count=count)


async def compact(index: Index, journal: Journal) -> None:
    """Rewrite the journal when it says much more than what is."""
    needed = index.object_count + sum(len(job.rounds) for job in index.jobs.values())
    if journal.record_count > max(JOURNAL_FACTOR * needed, JOURNAL_RECORDS_MIN):
        try:
            await journal.replace(index.records)
        except OSError as error:
            log.warning("cache.journal_not_compacted", cause=str(error))


def step_back() -> None:
    """Let this thread have what the others leave."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def free_bytes(folder: Path) -> int:
    """Return how much of a folder's file system is free for us."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def memory_bytes_of_machine() -> int:
    """Return the size of the machine's memory, or of what its control group allows."""
    return Probe().capacity().memory_mib << 20
