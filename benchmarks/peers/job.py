"""One job for all peers: the same model, weights, tokens, layout and steps, and the same record of how it went."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class Job:
    """What README.md describes; one JSON file."""

    architecture: dict[str, Any]  # `model_type` and arguments of its transformers config, as in `weights`
    weights: str  # folder written by `save_pretrained`
    tokens: str  # .npy of int64 [steps, global_batch, seq_len + 1]
    sp: int
    dp: int
    zero: int
    lr: float
    optimizer: str  # sgd or adamw
    grad_clip: float  # 0: off
    steps: int
    precision: str  # fp32 or bf16
    progress: str = ""  # file that gets a line at the end of each step

    @classmethod
    def load(cls, path: str) -> Job:
        return cls(**json.loads(Path(path).read_text()))

    def read_tokens(self) -> np.ndarray:
        return np.load(self.tokens)[: self.steps]

    def accumulation(self) -> int:
        """Micro batches of one sequence in an optimizer step of one sequence-parallel group."""
        return np.load(self.tokens, mmap_mode="r").shape[1] // self.dp

    def model(self) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(self.weights, attn_implementation="sdpa", dtype=torch.float32)
        model.config.use_cache = False
        return model.train()

    def new_optimizer(self, model: PreTrainedModel) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(model.parameters(), lr=self.lr)
        return torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.0)

    def deepspeed_config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.accumulation(),
            "gradient_clipping": self.grad_clip,
            "bf16": {"enabled": self.precision == "bf16"},
            "zero_optimization": {"stage": self.zero},
            "zero_allow_untested_optimizer": True,
            "sequence_parallel_size": self.sp,
            "steps_per_print": 1 << 30,
        }


class Samples(Dataset):
    """The sequences of one sequence-parallel group, in the order of its micro batches."""

    def __init__(self, job: Job, group: int):
        tokens = job.read_tokens()
        share = tokens.shape[1] // job.dp
        self.tokens = torch.from_numpy(tokens[:, group * share : (group + 1) * share]).flatten(0, 1)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        inputs = self.tokens[index, :-1]
        return {"input_ids": inputs, "labels": inputs, "position_ids": torch.arange(len(inputs))}

    def loader(self, rank: int, sp: int) -> DataLoader:
        """As the adapter wants it: rank `rank` of the group reads every sp-th sequence (else each comes sp times)."""
        return DataLoader(self, batch_size=1, sampler=DistributedSampler(self, sp, rank, shuffle=False))

    def last_target(self, index: int) -> torch.Tensor:
        """The adapter shifts labels within a sequence and has no target for its last token; the tokens' file has."""
        return self.tokens[index, -1]


class Record:
    """Loss, gradient norm and time of each step; memory and versions at the end. Times in seconds, memory in bytes."""

    def __init__(self, job: Job, packages: tuple[str, ...] = ()):
        self.progress = job.progress
        self.result: dict[str, Any] = {"loss": [], "grad_norm": [], "step_time_s": []}
        self.packages = ("torch", "transformers", "deepspeed", *packages)
        self.began = time.perf_counter()

    def step(self, loss: torch.Tensor, grad_norm: float | torch.Tensor | None) -> None:
        """`loss`: sum over the step's micro batches, each divided by their number; averaged over the ranks here."""
        dist.all_reduce(loss)
        self.result["loss"].append(loss.item() / dist.get_world_size())
        self.result["grad_norm"].append(None if grad_norm is None else float(grad_norm))
        now = time.perf_counter()
        self.result["step_time_s"].append(now - self.began)
        self.began = now
        if self.progress and dist.get_rank() == 0:
            with Path(self.progress).open("a") as file:
                file.write(f"{len(self.result['loss'])}\n")
        if "time_to_first_step_s" not in self.result:
            launcher = psutil.Process(os.getppid())  # torchrun
            self.result["time_to_first_step_s"] = time.time() - launcher.create_time()

    def write(self, path: str) -> None:
        """On rank 0. Collective over all ranks."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peaks: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(peaks, int(status["VmHWM"].split()[0]) * 1024)
        self.result["peak_memory_bytes"] = peaks
        self.result["versions"] = {package: version(package) for package in self.packages}
        if dist.get_rank() == 0:
            Path(path).write_text(json.dumps(self.result, indent=1) + "\n")
