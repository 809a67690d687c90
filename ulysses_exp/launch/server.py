"""Processes that start warm: forks of a server that has imported what ranks need.

Like multiprocessing's forkserver, with less to leave behind: the server is reached through a socket that it inherits,
so nothing lies in the temporary folder; a fork is waited for through a pipe, so there are no semaphores in /dev/shm and
no process that tracks them; and what ended the server is known.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ulysses_exp.launch.environment import make_importable
from ulysses_exp.launch.orphans import die_with_parent

#: What a batch system, a terminal or a launcher sends to a whole process group. The parent decides what it means.
GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_HEADER = struct.Struct("!I")  # bytes of the request
_NUMBER = struct.Struct("!i")  # the server's answers: a fork's process id, and how it ended
_MOST_FDS = 8


#: What ranks import, once for all of a machine; by name, for this folder knows how ranks start and not what they do
PRELOAD = "ulysses_exp.rank.preload"


class ServerEnded(Exception):
    """The server is gone, and its forks with it; `str()` says how it ended."""


class Fork:
    """A process that the server has been asked for."""

    def __init__(self, answers: int, server: Server):
        self._answers, self._server, self._read = answers, server, b""
        self.pid: int | None = None  # None while the server is still importing
        self.exitcode: int | None = None  # negative: the signal that ended it

    def fileno(self) -> int:
        """For select: readable when there is something for `poll`."""
        return self._answers

    @property
    def server_pid(self) -> int:
        return self._server.pid

    def poll(self) -> int | None:
        """The exit code, None while it runs. Raises ServerEnded."""
        while self.exitcode is None and select.select([self._answers], [], [], 0)[0]:
            more = os.read(self._answers, 2 * _NUMBER.size - len(self._read))
            if not more:
                raise ServerEnded(self._server.how_it_ended())
            self._read += more
            if self.pid is None and len(self._read) >= _NUMBER.size:
                (self.pid,) = _NUMBER.unpack(self._read[: _NUMBER.size])
            if len(self._read) == 2 * _NUMBER.size:
                (self.exitcode,) = _NUMBER.unpack(self._read[_NUMBER.size :])
        return self.exitcode

    def join(self) -> int:
        """The exit code, when it has ended. Raises ServerEnded."""
        while self.poll() is None:
            select.select([self._answers], [], [])
        assert self.exitcode is not None
        return self.exitcode

    def send(self, number: int) -> None:
        """Sends a signal, if the process runs. Raises ServerEnded."""
        if self.poll() is None and self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends the process, or the server where that has not started it yet."""
        with contextlib.suppress(ServerEnded):
            if self.poll() is None:
                if self.pid is None:
                    self._server.kill()
                self.send(signal.SIGKILL)

    def close(self) -> None:
        """Lets go of the pipe."""
        os.close(self._answers)


class Server:
    """Starts the server and asks it for forks; threads may ask at the same time.

    Args:
        module: what the server imports before its first fork.
    """

    def __init__(self, module: str = PRELOAD) -> None:
        make_importable()
        ours, its = socket.socketpair()
        with its:
            flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
            code = f"from ulysses_exp.launch.server import serve; serve({its.fileno()}, {os.getpid()}, {module!r})"
            self._process = subprocess.Popen(
                [sys.executable, *flags, "-P", "-c", code], pass_fds=[its.fileno()], stdin=subprocess.DEVNULL
            )
        self._socket, self._lock = ours, threading.Lock()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def fork(self, function: Callable[..., None], *arguments: Any, fds: Sequence[int] = ()) -> Fork:
        """Has `function(*arguments, *fds)` called in a process of its own, with copies of `fds`.

        `function` is imported there by name; the process ends with exit code 0 when it returns, 1 when it raises.

        Raises:
            ServerEnded: the server is not there any more.
        """
        message = pickle.dumps((function, arguments))
        reader, writer = os.pipe()
        try:
            with self._lock:
                socket.send_fds(self._socket, [_HEADER.pack(len(message))], [writer, *fds])
                self._socket.sendall(message)
        except OSError:
            os.close(reader)
            raise ServerEnded(self.how_it_ended()) from None
        finally:
            os.close(writer)
        return Fork(reader, self)

    def how_it_ended(self) -> str:
        """In words, for the user."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2)
        code = self._process.returncode
        if code is not None and code < 0:
            return f"the process that starts ranks was ended by {signal.Signals(-code).name}"
        return f"the process that starts ranks ended with exit code {code}"

    def kill(self) -> None:
        """Ends the server, and with it all forks and what it runs while it imports, such as a compiler."""
        children = _children(self._process.pid)
        self._process.kill()
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


_servers: dict[str, Server] = {}


def server(start: str = "fork") -> Server:
    """The server of this process; started by the first call, and again where it has ended.

    Args:
        start: `fork`: forks have what ranks need; `spawn`: they import it themselves, for seconds each.
    """
    module = PRELOAD if start == "fork" else __name__
    if module not in _servers or not _servers[module].alive:
        _servers[module] = Server(module)
    return _servers[module]


# -- in the server --------------------------------------------------------------------------------------------


def serve(fd: int, owner: int, module: str) -> None:
    """The server's life: until `owner`, at the other end of socket `fd`, has ended."""
    for number in GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(owner)
    failed = _preload(module)
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    requests: Any = socket.socket(fileno=fd)
    running: dict[int, int] = {}  # process id -> where its end is told
    while True:
        ready: list[Any] = select.select([requests, woken], [], [])[0]
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(woken, 4096)
            _tell_ends(running)
        if requests in ready:
            header, fds, _, _ = socket.recv_fds(requests, _HEADER.size, _MOST_FDS)
            if not header:
                return
            message = _exactly(requests, _HEADER.unpack(header)[0])
            answers, *given = fds
            pid = os.fork()
            if pid == 0:
                die_with_parent()
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                requests.close()
                for other in (woken, wake, answers, *running.values()):
                    os.close(other)
                _be(message, given, failed)
            for other in given:
                os.close(other)
            running[pid] = answers
            _tell(answers, pid)


def _preload(module: str) -> BaseException | None:
    """What goes wrong is kept for the forks, which can tell the user."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return error
    return None


def _exactly(requests: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        parts.append(requests.recv(size))
        if not parts[-1]:
            os._exit(1)
        size -= len(parts[-1])
    return b"".join(parts)


def _tell(answers: int, number: int) -> None:
    with contextlib.suppress(OSError):  # nobody waits any more
        os.write(answers, _NUMBER.pack(number))


def _tell_ends(running: dict[int, int]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        if (answers := running.pop(pid, None)) is not None:
            _tell(answers, os.waitstatus_to_exitcode(status))
            os.close(answers)


def _be(message: bytes, fds: list[int], failed: BaseException | None) -> None:
    """The life of a fork. Nothing that the server has set up is torn down."""
    code = 1
    try:
        if failed is not None:
            raise failed
        function, arguments = pickle.loads(message)  # written by this process's own parent
        function(*arguments, *fds)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(forks: Sequence[Fork], seconds: float) -> None:
    """Returns when one of `forks`, or after `seconds` none, has something to tell."""
    open_ones = [fork for fork in forks if fork.exitcode is None]
    if open_ones:
        select.select(open_ones, [], [], seconds)
    else:
        time.sleep(seconds)
