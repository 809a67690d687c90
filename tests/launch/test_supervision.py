"""Ranks that stand still, that die, that are asked to stop: what the process that started them makes of it."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import made_up_ranks as ranks
import pytest

from ulysses_exp.config import Config
from ulysses_exp.launch import heartbeat, stopping
from ulysses_exp.launch.environment import record_collectives
from ulysses_exp.launch.failure import RankFailure
from ulysses_exp.launch.standstill import waited_in
from ulysses_exp.launch.supervision import prepare, supervise
from ulysses_exp.launch.task import Task


@pytest.fixture
def task(tmp_path):
    config = Config()
    config = replace(config, launch=replace(config.launch, name="local", timeout_s=1))
    task = Task("main", config, (), tmp_path)
    prepare(task)
    return task


@pytest.fixture(autouse=True)
def no_request():
    yield
    stopping.requests.signal = None


def when_all_have_begun(task, forks, do):
    """Calls `do` in another thread once every fork has given its first sign of life."""

    def wait():
        while any(fork.pid is None for fork in forks.values()) or any(
            (beat := heartbeat.last(task.results, rank)) is None or beat.count < 2 for rank in forks
        ):
            time.sleep(0.01)
        do()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def nobody_left(forks):
    return not any(fork.pid and Path(f"/proc/{fork.pid}").exists() for fork in forks.values())


def test_a_stopped_rank_is_named_and_all_ranks_end(server, task):
    forks = {rank: server.fork(ranks.waits, task.results, rank) for rank in range(2)}
    when_all_have_begun(task, forks, lambda: os.kill(forks[1].pid, signal.SIGSTOP))
    began = time.monotonic()
    with pytest.raises(RankFailure) as caught:
        supervise(task, forks)
    assert time.monotonic() - began < 15
    said = str(caught.value)
    assert said.startswith("rank 1: stands still since ") and "stopped by a signal (SIGSTOP)" in said
    assert "at step 5 (training)" in said and "rank 0 is" in said
    assert "in waits" in caught.value.trace, "the stack of the rank that answers"
    assert nobody_left(forks)


def test_a_server_that_does_not_end_importing_is_told_and_leaves_nothing(importing_server, task):
    forks = {rank: importing_server.fork(ranks.waits, task.results, rank) for rank in range(2)}
    began = time.monotonic()
    with pytest.raises(RankFailure) as caught:
        supervise(task, forks)
    assert time.monotonic() - began < 15
    assert str(caught.value).startswith("the process that starts ranks stands still since ")
    assert not importing_server.alive
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert b"sleep\x0061.5\x00" not in commands


def test_a_rank_that_gave_up_waiting_is_not_the_one_to_name(server, task):
    forks = {
        0: server.fork(ranks.gives_up, task.results, 0, 0.5),
        1: server.fork(ranks.waits, task.results, 1),
    }
    with pytest.raises(RankFailure) as caught:
        supervise(task, forks)
    assert str(caught.value).startswith("rank 1: stands still") and "rank 0 waited in" in str(caught.value)
    assert "Timed out waiting" in caught.value.trace
    assert nobody_left(forks)


def test_a_rank_that_computes_for_longer_than_the_timeout_is_left_alone(server, task):
    supervise(task, {0: server.fork(ranks.computes, task.results, 0, 2.0)})


def test_the_first_cause_is_told(server, task):
    forks = {rank: server.fork(ranks.waits, task.results, rank) for rank in range(2)}
    when_all_have_begun(task, forks, lambda: os.kill(forks[1].pid, signal.SIGKILL))
    with pytest.raises(RankFailure, match="rank 1: killed by SIGKILL"):
        supervise(task, forks)
    assert nobody_left(forks)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_a_request_to_stop_lets_ranks_save(server, task, number):
    before = signal.signal(number, signal.SIG_DFL)  # where the tests run under nohup it is ignored, and stays so
    try:
        forks = {rank: server.fork(ranks.saves_when_asked, task.results, rank, 0.2) for rank in range(2)}
        with stopping.requests.heeded(), stopping.requests.deferred():  # from here on: the fork may be quick
            when_all_have_begun(task, forks, lambda: os.kill(os.getpid(), number))
            with pytest.raises(KeyboardInterrupt, match=signal.Signals(number).name):
                supervise(task, forks)
        assert {path.name for path in task.results.glob("saved*")} == {"saved0", "saved1"}
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(
    ("seconds", "on_signal_s", "function"),
    [(60, 1, "saves_when_asked"), (60, 0, "saves_when_asked"), (None, 60, "evaluates")],
    ids=["no longer than on_signal_s", "not with 0", "not where nothing is to be saved"],
)
def test_a_request_to_stop_ends_ranks(server, task, seconds, on_signal_s, function):
    task = replace(
        task, config=replace(task.config, checkpoint=replace(task.config.checkpoint, on_signal_s=on_signal_s))
    )
    more = () if seconds is None else (seconds,)
    forks = {0: server.fork(getattr(ranks, function), task.results, 0, *more)}
    began = time.monotonic()
    with stopping.requests.heeded(), stopping.requests.deferred():  # from here on: the fork may be quick
        when_all_have_begun(task, forks, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            supervise(task, forks)
    assert time.monotonic() - began < 10 and nobody_left(forks)


def test_a_second_request_ends_at_once(server, task):
    forks = {0: server.fork(ranks.saves_when_asked, task.results, 0, 60)}

    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    with stopping.requests.heeded(), stopping.requests.deferred():  # from here on: the fork may be quick
        when_all_have_begun(task, forks, twice)
        with pytest.raises(KeyboardInterrupt):
            supervise(task, forks)
    assert nobody_left(forks)


def test_a_killed_server_is_told_of(server, task):
    from ulysses_exp.launch.server import Server

    own = Server("json")
    fork = own.fork(time.sleep, 60)
    threading.Timer(0.5, own.kill).start()
    with pytest.raises(RankFailure, match="the process that starts ranks was ended by SIGKILL"):
        supervise(task, {0: fork})


def test_where_a_rank_waited_is_read_from_its_traceback():
    trace = """Traceback (most recent call last):
  File "/x/ulysses_exp/rank/step.py", line 196, in make_step
    engine.backward(loss)
  File "/x/ulysses_exp/rank/metrics/communication.py", line 44, in counted_single
    return single(output)
  File "/y/torch/distributed/distributed_c10d.py", line 4900, in all_to_all_single
    work.wait()
RuntimeError: Timed out waiting 20000ms"""
    assert waited_in(trace) == "waited in all_to_all_single at ulysses_exp/rank/step.py:196"


NCCL_GAVE_UP = (
    "[rank0]:[E1125 12:00:00.1 ProcessGroupNCCL.cpp:700] [Rank 0] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=12, OpType=ALLTOALL_BASE, NumelIn=8, NumelOut=8, Timeout(ms)=1000) ran for 1001 milliseconds "
    "before timing out.\n"
)


def test_of_ranks_that_nccls_watchdog_ends_the_one_they_waited_for_is_named_and_the_collectives_told(server, task):
    forks = {
        0: server.fork(ranks.aborted, task.results, 0, NCCL_GAVE_UP),
        1: server.fork(ranks.waits, task.results, 1),
    }
    with pytest.raises(RankFailure) as caught:
        supervise(task, forks)
    said = str(caught.value)
    assert said.startswith("rank 1: stands still"), said
    assert "rank 0 waited in NCCL's alltoall_base for launch.timeout_s" in said
    assert said.endswith("the ranks' last collectives: torchfrtrace -p collectives-rank ranks/main")


def test_where_collectives_are_written_is_for_the_user_to_say(monkeypatch, tmp_path):
    for name in [n for n in os.environ if n.startswith(("TORCH_FR_", "TORCH_NCCL_"))]:
        monkeypatch.delenv(name)
    for name in ("TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    record_collectives(tmp_path)
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "collectives-rank")
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "2000" and os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    monkeypatch.delenv("TORCH_FR_DUMP_TEMP_FILE")
    monkeypatch.setenv("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "/elsewhere/rank")
    record_collectives(tmp_path)
    assert "TORCH_FR_DUMP_TEMP_FILE" not in os.environ
