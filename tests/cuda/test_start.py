"""What a GPU machine would see of the processes that ranks are forked from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

from ulysses_exp.launch.environment import prepare

PRETEND = Path(__file__).with_name("pretend.py")


def imported(module: str, environment: dict[str, str]) -> list[str]:
    """The calls that spoil forks for CUDA, made while `module` is imported."""
    paths = {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, str(PRETEND), module], env=environment | paths, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.fixture
def prepared():
    """The environment that ranks on GPUs inherit; this process keeps its own."""
    own = dict(os.environ)
    try:
        for name in ("DS_ACCELERATOR", "PYTORCH_NVML_BASED_CUDA_CHECK"):
            os.environ.pop(name, None)
        prepare("cuda")
        return dict(os.environ)
    finally:
        os.environ.clear()
        os.environ.update(own)


def test_nothing_that_the_server_imports_touches_cuda(prepared):
    assert imported("ulysses_exp.rank.preload", prepared) == []


def test_the_pretended_gpus_tell_of_what_would(monkeypatch):
    """Without what `prepare` sets, importing DeepSpeed alone asks CUDA: the test above can fail."""
    plain = {k: v for k, v in os.environ.items() if k not in ("DS_ACCELERATOR", "PYTORCH_NVML_BASED_CUDA_CHECK")}
    assert any("cudaGetDeviceCount" in call for call in imported("deepspeed", plain))
