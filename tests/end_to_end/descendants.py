"""Processes that a command has started, and whether they and their shared memory are gone."""

import os
import re
import time
from pathlib import Path


def children(pid: int) -> list[int]:
    """Processes started by `pid`, oldest first."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return sorted(found)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while any(map(alive, pids)):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def left_in_shared_memory() -> set[str]:
    """Files of /dev/shm that no living process has mapped; another test's processes may work beside this one's.

    Compared by inode: a process maps a semaphore that it makes under a name that sem_open drops at once.
    """
    made = {}
    for file in os.scandir("/dev/shm"):
        try:
            made[file.name] = file.stat().st_ino
        except OSError:
            continue
    mapped: set[int] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            mapped.update(map(int, re.findall(r" (\d+) +/dev/shm/", maps.read_text())))
        except OSError:
            continue
    return {name for name, inode in made.items() if inode not in mapped}


def nothing_left(before: set[str], seconds: float = 5) -> bool:
    """Whether all that `left_in_shared_memory` names was there `before`; the resource tracker of a process that ended
    gets some time to remove its semaphores."""
    end = time.monotonic() + seconds
    while left_in_shared_memory() - before:
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
