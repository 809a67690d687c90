"""Forks of a warm server: how they end, how the server ends, and that nothing is left of either."""

import os
import signal
import time
from pathlib import Path

import made_up_ranks as ranks
import pytest

from ulysses_exp.launch.server import Server, ServerEnded


@pytest.mark.parametrize(("function", "code"), [(ranks.returns, 0), (ranks.raises, 1), (ranks.kills_itself, -9)])
def test_how_a_fork_ended_is_known(server, function, code):
    assert server.fork(function).join() == code


def test_a_fork_gets_open_files(server):
    reader, writer = os.pipe()
    fork = server.fork(ranks.answers, fds=[writer])
    os.close(writer)
    assert fork.join() == 0 and os.read(reader, 10) == b"here"
    assert os.read(reader, 10) == b"", "the server holds on to it"
    os.close(reader)


def test_a_signal_to_the_whole_group_ends_no_server(server):
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(server._process.pid, number)
    assert server.fork(ranks.returns).join() == 0


def test_a_killed_server_says_so_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    before = set(os.listdir("/dev/shm"))
    server = Server("json")
    fork = server.fork(ranks.sleeps)
    while fork.poll() is None and fork.pid is None:
        time.sleep(0.01)
    assert not [name for name in set(os.listdir("/dev/shm")) - before if name.startswith("sem.")]
    os.kill(server._process.pid, signal.SIGKILL)
    with pytest.raises(ServerEnded, match="the process that starts ranks was ended by SIGKILL"):
        fork.join()
    with pytest.raises(ServerEnded, match="SIGKILL"):
        server.fork(ranks.returns)
    assert not server.alive and os.listdir(tmp_path) == []
    end = time.monotonic() + 5
    while Path(f"/proc/{fork.pid}/cmdline").exists() and Path(f"/proc/{fork.pid}/cmdline").read_bytes():
        assert time.monotonic() < end, "a fork outlives its server"
        time.sleep(0.01)


def test_what_cannot_be_imported_is_told_by_the_fork(capfd):
    server = Server("no_such_module")
    assert server.fork(ranks.returns).join() == 1
    assert "no_such_module" in capfd.readouterr().err
    server.kill()
