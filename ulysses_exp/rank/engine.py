"""The DeepSpeed engine around a model."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.z3_leaf_module import set_z3_leaf_module
from transformers import PreTrainedModel, get_scheduler

from ulysses_exp.config import Config
from ulysses_exp.config.deepspeed_rules import merged
from ulysses_exp.rank import mixed_precision, upstream


def deepspeed_config(config: Config, parameters: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is told about a model of so many `parameters`.

    Gradients are reduced in buckets. DeepSpeed takes 2 GB for one (in fp32; its default of 5e8 elements) whatever the
    model; here a bucket is no larger than all gradients, and the reductions stay the same.
    """
    bucket = min(parameters, DeepSpeedZeroConfig.model_fields["reduce_bucket_size"].default)
    zero: dict[str, Any] = {"stage": config.zero.stage, "reduce_bucket_size": bucket}
    if config.zero.stage == 3:
        zero["stage3_param_persistence_threshold"] = config.zero.param_persistence_threshold
    if config.zero.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.zero.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    told = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.optim.grad_clip,
        "bf16": {
            "enabled": config.train.precision == "bf16",
            "check_grad_overflow": config.train.on_nonfinite == "skip",  # stages 1 and 2 would step anyway
        },
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's SGD
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also with offload: no operator to compile
        "steps_per_print": 1 << 30,
    }
    if config.train.precision == "bf16":
        told |= mixed_precision.entries(config.zero.stage)
    return merged(told, config)


def optimizer(config: Config, model: PreTrainedModel) -> torch.optim.Optimizer:
    """torch's own, over all parameters in one group.

    AdamW is fused: its other variants make temporaries of twice the masters' size on a GPU, and take four to eight
    times as long in host memory.
    """
    o = config.optim
    if o.name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=o.lr, momentum=o.momentum, weight_decay=o.weight_decay)
    return torch.optim.AdamW(
        model.parameters(),
        lr=o.lr,
        betas=(o.beta1, o.beta2),
        eps=o.eps,
        weight_decay=o.weight_decay,
        fused=True,
    )


def _schedule(config: Config) -> str:
    """transformers' name of it; its `constant` would pass over `optim.warmup_steps`."""
    name = config.optim.schedule
    return "constant_with_warmup" if name == "constant" and config.optim.warmup_steps else name


def build_engine(config: Config, model: PreTrainedModel, mpu: Any) -> deepspeed.DeepSpeedEngine:
    """Wraps `model` in DeepSpeed with the configured optimizer and schedule; `mpu` is None where sp is 1.

    `model` is in fp32. Every rank has rank 0's weights afterwards: DeepSpeed sends them, or under ZeRO 3 each rank's
    part of them.
    """
    full = mixed_precision.lower(model) if config.train.precision == "bf16" else {}
    steps = optimizer(config, model)
    schedule = get_scheduler(_schedule(config), steps, config.optim.warmup_steps, config.train.steps)
    told = deepspeed_config(config, sum(p.numel() for p in model.parameters()))
    if config.zero.stage == 3:
        _hook_small_layers_once(model, config.zero.param_persistence_threshold)
        # one parameter after the other: left to the engine, the whole model would be on the device first
        deepspeed.zero.Init(module=model, config_dict_or_path=told, mpu=mpu)
    with upstream.stage_1_like_the_others():
        engine, *_ = deepspeed.initialize(model=model, optimizer=steps, lr_scheduler=schedule, config=told, mpu=mpu)
    for buffer in model.buffers():  # which DeepSpeed neither sends nor, under ZeRO 3, moves
        buffer.data = buffer.data.to(engine.device)
        dist.broadcast(buffer.data, 0)
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        _undo_first_step(engine.optimizer)
        mixed_precision.accumulate(engine)
    if config.train.precision == "bf16":
        mixed_precision.give_masters(engine, full)
    return engine


def _hook_small_layers_once(model: PreTrainedModel, threshold: int) -> None:
    """Makes layers of which ZeRO 3 keeps every parameter gathered anyway its leaf modules.

    DeepSpeed hooks each module to gather before and release after it. Where nothing is released (persistent
    parameters: parameter_offload.py `mark_persistent_parameters`, 0.19.8), the hooks inside a layer only take time:
    about an eighth of a small model's step.
    """
    for module in model.modules():
        small = all(p.numel() <= threshold for p in module.parameters())
        if small and type(module).__name__ in (model._no_split_modules or ()):
            set_z3_leaf_module(module, True)


def _undo_first_step(optimizer: FP16_UnfusedOptimizer) -> None:
    """Back to before any step: the constructor has made one, with gradients of zero.

    DeepSpeed 0.19.8, stage 0 in bf16, `initialize_optimizer_states`: weights have decayed once, and AdamW counts one
    step too many in its bias correction for good. The other stages make no such step (docs/findings.md, 22).
    """
    for low, full in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for parameter, master in zip(low, full, strict=True):
            master.data.copy_(parameter.data)
    optimizer.optimizer.state.clear()
