"""Which sockets the processes below this one listen on, while something runs."""

from __future__ import annotations

import os
import socket
import struct
import threading
from pathlib import Path

from descendants import children

LOOPBACK = {"127.0.0.1", "::1"}


class Listeners:
    """Adds (program, address) of every TCP listener and every bound UDP socket below this process to `seen`."""

    def __init__(self, seen: set[tuple[str, str]]):
        self.seen = seen
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Listeners:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            sockets = {inode: address for kind in ("tcp", "tcp6", "udp", "udp6") for inode, address in _bound(kind)}
            for pid in _below(os.getpid()):
                try:
                    program = Path(f"/proc/{pid}/comm").read_text().strip()
                    held = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
                except OSError:  # it has ended
                    continue
                inodes = {link[8:-1] for link in held if link.startswith("socket:[")}
                self.seen.update((program, sockets[inode]) for inode in inodes & sockets.keys())


def _below(pid: int) -> list[int]:
    found = []
    for child in children(pid):
        found += [child, *_below(child)]
    return found


def _bound(kind: str) -> list[tuple[str, str]]:
    """(inode, address) of the sockets that others can reach: TCP in state listen, UDP without a peer."""
    found = []
    for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == ("0A" if kind.startswith("tcp") else "07"):
            words = fields[1].split(":")[0]
            raw = b"".join(struct.pack("=I", int(words[i : i + 8], 16)) for i in range(0, len(words), 8))
            family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
            found.append((fields[9], socket.inet_ntop(family, raw).removeprefix("::ffff:")))
    return found
