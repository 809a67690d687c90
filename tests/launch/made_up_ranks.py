"""What forks do in these tests, in the place of ranks: it needs no torch, so a fork is there in milliseconds."""

import os
import signal
import time

from ulysses_exp.launch import failure, heartbeat, standstill, stopping


def returns():
    pass


def raises():
    raise ValueError("as it should")


def answers(fd):
    os.write(fd, b"here")


def sleeps():
    time.sleep(60)


def kills_itself():
    os.kill(os.getpid(), signal.SIGKILL)


def begin(folder, rank):
    stopping.requests.note()
    heartbeat.start(folder, rank)
    standstill.show_stack_on_signal(folder, rank)
    heartbeat.beat("training", 5)


def waits(folder, rank):
    begin(folder, rank)
    time.sleep(60)


def gives_up(folder, rank, seconds):
    """As a collective that has waited for its timeout."""
    begin(folder, rank)
    time.sleep(seconds)
    try:
        raise RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1000ms for recv operation")
    except RuntimeError as error:
        failure.record(folder, rank, error)
        raise


def computes(folder, rank, seconds):
    """No sign of life, but not for want of work."""
    begin(folder, rank)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def saves_when_asked(folder, rank, seconds):
    begin(folder, rank)
    while stopping.requests.signal is None:
        heartbeat.beat(step=6)
        time.sleep(0.01)
    heartbeat.beat("saving", 6)
    time.sleep(seconds)
    (folder / f"saved{rank}").write_text(stopping.requests.signal)


def evaluates(folder, rank):
    begin(folder, rank)
    heartbeat.beat("evaluating")
    time.sleep(60)


def aborted(folder, rank, said):
    """As NCCL's watchdog ends a process, after its flight recorder has written."""
    begin(folder, rank)
    (folder / f"collectives-rank{rank}").write_bytes(b"")
    (folder / f"rank{rank}.err").write_text(said)
    os.abort()
