"""What ranks of another launcher take from its store, to which anybody on its network can write."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from received_run import composed

from ulysses_exp import config
from ulysses_exp.config import Config
from ulysses_exp.launch import attached
from ulysses_exp.launch.seat import Seat
from ulysses_exp.launch.task import Task

OVERRIDES = ("device=cpu", "sp.size=1", "model=tiny_gemma3", "optim.lr=1", "reload.layouts=[sp1-dp1-z0]")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    options = {"checkpoint": "/a/b", "model_seed": 3, "bypassed_evaluation_bytes": 1.5, "none": None}
    return Task(
        "main", config.resolve(composed(*OVERRIDES)), ("train", "eval"), tmp_path_factory.mktemp("run"), options
    )


def test_a_task_comes_back_as_it_was(task: Task) -> None:
    assert Task.from_json(task.to_json()) == task
    assert Task.from_json(task.to_json().encode()) == task


class Payload:
    def __init__(self, outside: Path):
        self.outside = outside

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.outside}/executed",)


def _changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Task, Path], bytes]:
    def message(task: Task, outside: Path) -> bytes:
        content = json.loads(task.to_json())
        change(content)
        return json.dumps(content).encode()

    return message


MESSAGES: dict[str, tuple[Callable[[Task, Path], bytes], str]] = {
    "a pickle": (lambda task, outside: pickle.dumps(Payload(outside)), ""),
    "nothing": (lambda task, outside: b"", ""),
    "deep": (lambda task, outside: b"[" * 100_000, "deep"),
    "a list": (lambda task, outside: b"[]", "Task"),
    "a setting more": (_changed(lambda t: t["config"]["model"].update(hook="os.system")), "ModelConfig"),
    "a setting less": (_changed(lambda t: t.pop("options")), "Task"),
    "a text for a number": (_changed(lambda t: t["config"]["sp"].update(size="2")), "config.sp.size"),
    "a number for a list": (_changed(lambda t: t.update(work=1)), "work"),
    "code of a model": (
        _changed(lambda t: t["config"]["model"].update(trust_remote_code=True)), "model.trust_remote_code"
    ),
    "code of a hub": (_changed(lambda t: t["config"]["sp"].update(attention="somebody/kernel")), "sp.attention"),
    "pickles": (_changed(lambda t: t["config"]["checkpoint"].update(trust_pickle=True)), "checkpoint.trust_pickle"),
    "pickles by an option": (_changed(lambda t: t["options"].update(trust_pickle=True)), "checkpoint.trust_pickle"),
}  # fmt: skip


class Store:
    """The calls of torch's store that a waiting rank makes."""

    def __init__(self, message: bytes):
        self.message = message

    def set(self, key: str, value: bytes) -> None:
        assert key == "here/1"

    def check(self, keys: list[str]) -> bool:
        return keys == ["task1"]

    def get(self, key: str) -> bytes:
        assert key == "task1"
        return self.message


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_message_that_is_no_task_of_this_job_ends_the_rank(
    kind: str, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message, words = MESSAGES[kind]
    store = Store(message(task, tmp_path))
    place = Seat(rank=1, world=2, local_rank=1, host="127.0.0.1", port=1, hosted=True, attempt="0")
    monkeypatch.setattr(attached, "seat", lambda: place)
    monkeypatch.setattr(attached, "_sit_down", lambda place, timeout_s: store)
    own: Callable[[], Config] = lambda: config.resolve(composed(*OVERRIDES))  # noqa: E731
    assert attached.serve([], own) == 1
    said = capsys.readouterr().err
    assert said.startswith("rank 1: no task of this job: ") and words in said and said.count("\n") == 1
    assert not (tmp_path / "executed").exists()


def test_a_door_that_the_ranks_own_command_opens_is_open(task: Task) -> None:
    trusting = config.resolve(composed(*OVERRIDES, "model.trust_remote_code=true"))
    sent = Task.from_json(Task("main", trusting, ("train",), task.folder, {"trust_pickle": False}).to_json())
    attached._check_doors(sent, lambda: trusting)
    with pytest.raises(ValueError, match=r"model\.trust_remote_code=True"):
        attached._check_doors(sent, lambda: task.config)
