"""Real ranks that train a shipped model with each memory option, one after another in the same processes."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import yaml
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ulysses_exp.config import MemoryConfig
from ulysses_exp.model import memory
from ulysses_exp.rank.upstream import without_operators_of_its_own

MODELS = Path(__file__).resolve().parents[2] / "conf" / "model"
SP, LENGTH, ACCUMULATION, IGNORED_LABELS = 2, 64, 2, 5

#: Tile counts that divide neither the local length nor each other: the last tile is shorter.
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {"loss_in_place": False},
    "loss_in_place": {},
    "non_reentrant": {"checkpointing": "non_reentrant"},
    "reentrant": {"checkpointing": "reentrant"},
    "offload": {"checkpointing": "non_reentrant", "offload_activations": True},
    "tiled_mlp": {"tiled_mlp": 5},
    "tiled_loss": {"tiled_loss": 7},
    "alst": {"checkpointing": "non_reentrant", "offload_activations": True, "tiled_mlp": 5, "tiled_loss": 7},
    "alst_reentrant": {"checkpointing": "reentrant", "tiled_mlp": 5, "tiled_loss": 7},
}


def new_model(name: str, option: str, **overrides: Any) -> PreTrainedModel:
    """A shipped model, its first and last layer only, with the same random weights every time."""
    architecture = yaml.safe_load((MODELS / f"{name}.yaml").read_text())["architecture"]
    if "layer_types" in architecture:
        architecture["layer_types"] = architecture["layer_types"][:: len(architecture["layer_types"]) - 1]
    architecture |= {"num_hidden_layers": 2, **overrides}
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture.pop("model_type"), **architecture)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    memory.apply(model, MemoryConfig(name=option, **OPTIONS[option]))
    return model


class GatheredElements:
    """Counts the parameter elements that ZeRO 3 gathers."""

    def __init__(self) -> None:
        self.backend = deepspeed.comm.comm.cdb
        self.gather = self.backend.all_gather_into_tensor
        self.count = 0

    def __enter__(self) -> GatheredElements:
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.count += (args[0] if args else kwargs["output_tensor"]).numel()
            return self.gather(*args, **kwargs)

        self.backend.all_gather_into_tensor = counting
        return self

    def __exit__(self, *_: object) -> None:
        self.backend.all_gather_into_tensor = self.gather


def gradient_norm(engine: deepspeed.DeepSpeedEngine) -> float:
    """Also at ZeRO 0, where DeepSpeed reports none."""
    norm = engine.get_global_grad_norm()
    if norm is None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters()])
    return float(norm)


def train(rank: int, model: PreTrainedModel, zero: dict[str, Any], mpu: Any, bf16: bool) -> dict[str, Any]:
    """SGD without clipping; losses, gradient norms, weights, and what ZeRO 3 gathered in the last step."""
    deepspeed.utils.groups.mpu = mpu
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        mpu=mpu,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": ACCUMULATION,
            "gradient_clipping": 0.0,
            "bf16": {"enabled": bf16},
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
        },
    )
    part = slice(rank * LENGTH // SP, (rank + 1) * LENGTH // SP)
    positions = torch.arange(LENGTH)[None, part]
    targets = torch.tensor(float(ACCUMULATION * (LENGTH - IGNORED_LABELS)))
    random = torch.Generator().manual_seed(1)
    losses, norms, gathered = [], [], 0
    for _ in range(2 if zero["stage"] == 3 else 1):  # ZeRO 3 fetches by the order of its first step from the second on
        with GatheredElements() as elements:
            for _ in range(ACCUMULATION):
                tokens = torch.randint(256, (1, LENGTH + 1), generator=random)
                labels = tokens[:, 1:].clone()
                labels[:, :IGNORED_LABELS] = -100
                output = engine(
                    input_ids=tokens[:, :-1][:, part], position_ids=positions, use_cache=False,
                    labels=labels[:, part], shift_labels=labels[:, part], num_items_in_batch=targets,
                )  # fmt: skip
                engine.backward(output.loss, scale_wrt_gas=False)
                losses.append(output.loss.item())
                if engine.zero_optimization_stage() == 0 and engine.is_gradient_accumulation_boundary():
                    norms.append(gradient_norm(engine))
                engine.step()
        if engine.zero_optimization_stage():
            norms.append(gradient_norm(engine))
        gathered = elements.count
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=zero["stage"] == 3):
        weights = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    engine.destroy()
    return {"loss": losses, "norm": norms, "weights": weights, "gathered": gathered}


def start(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    deepspeed.utils.logger.setLevel("ERROR")
    without_operators_of_its_own()
    deepspeed.init_distributed(
        "gloo", False, init_method=f"file://{folder}/store", rank=rank, world_size=SP, timeout=timedelta(seconds=60)
    )


def train_with_each_option(
    rank: int, folder: str, name: str, zero: dict[str, Any], options: list[str], bf16: bool
) -> None:
    """Rank 0 leaves {option: result of `train`} in `folder`/results."""
    start(rank, folder)
    mpu, results = None, {}
    for option in options:
        model = new_model(name, option)
        if mpu is None:
            mpu = UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", SP, micro_batch_size=1)
        results[option] = train(rank, model, zero, mpu, bf16)
    if rank == 0:
        torch.save(results, f"{folder}/results")
