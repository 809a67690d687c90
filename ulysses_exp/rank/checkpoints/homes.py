"""Where DeepSpeed keeps a parameter's fp32 weights and optimizer states on this rank, for every ZeRO stage.

DeepSpeed's public `safe_get_full_fp32_param` and `safe_get_full_optimizer_state` know nothing of stage 0, build the
whole tensor on every rank by an all-reduce of zero-padded fragments, and lose the sign of zero by it (-0.0 + 0.0 is
0.0; tests/checkpoints/test_upstream.py). So the fragments themselves are read and written, where they lie: no
communication, no copy, every bit. Written against DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from ulysses_exp.config.received.manifest import CheckpointError

WEIGHTS = "weights"


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + data.numel()) of a flattened tensor of the model's state, in live memory."""

    kind: str  # WEIGHTS, or a key of the optimizer's state such as exp_avg
    name: str  # of the parameter or buffer
    shape: tuple[int, ...]  # of the whole tensor
    start: int
    data: torch.Tensor  # one-dimensional, a view: what is written here is what the engine works with


@dataclass(frozen=True)
class _Home:
    """A part of a trainable parameter inside the (flat) tensor that the wrapped optimizer steps."""

    name: str
    shape: tuple[int, ...]
    stepped: torch.Tensor  # the key of the wrapped optimizer's state
    offset: int  # in elements of `stepped`
    start: int  # in elements of the parameter
    numel: int


def fragments(engine: deepspeed.DeepSpeedEngine) -> Iterator[Fragment]:
    """This rank's part of fp32 weights and optimizer states, and its copy of buffers and frozen parameters."""
    states = engine.basic_optimizer.state
    for home in _homes(engine):
        part = slice(home.offset, home.offset + home.numel)
        yield Fragment(WEIGHTS, home.name, home.shape, home.start, home.stepped.data.view(-1)[part])
        for key, state in states.get(home.stepped, {}).items():
            if isinstance(state, torch.Tensor) and state.shape == home.stepped.shape:
                yield Fragment(key, home.name, home.shape, home.start, state.data.view(-1)[part])
    for name, tensor in _untrained(engine):
        yield tensor_fragment(name, tensor)


def module_fragments(engine: deepspeed.DeepSpeedEngine) -> Iterator[Fragment]:
    """This rank's part of the weights that the forward pass uses, in their own type."""
    for name, parameter in engine.module.named_parameters():
        yield tensor_fragment(name, parameter)
    for name, buffer in _buffers(engine.module):
        yield tensor_fragment(name, buffer)


def tensor_fragment(name: str, tensor: Any) -> Fragment:
    """What this rank holds of a parameter or buffer: all of it, or its partition under ZeRO 3."""
    partition = getattr(tensor, "ds_tensor", None)
    if partition is None:
        return Fragment(WEIGHTS, name, tuple(tensor.shape), 0, tensor.data.contiguous().view(-1))
    size = partition.numel()
    start = min(dist.get_rank(tensor.ds_process_group) * size, tensor.ds_numel)
    held = min(size, tensor.ds_numel - start)
    return Fragment(WEIGHTS, name, tuple(tensor.ds_shape), start, partition.data.view(-1)[:held])


def scalars(engine: deepspeed.DeepSpeedEngine) -> dict[str, dict[str, float]]:
    """Optimizer states that are one number a parameter, such as AdamW's `step`, for the parts on this rank."""
    found: dict[str, dict[str, float]] = {}
    for home in _homes(engine):
        for key, state in engine.basic_optimizer.state.get(home.stepped, {}).items():
            if isinstance(state, torch.Tensor) and state.numel() == 1 and state.shape != home.stepped.shape:
                found.setdefault(home.name, {})[key] = state.item()
            elif isinstance(state, (int, float)):
                found.setdefault(home.name, {})[key] = state
    return found


def prepare_states(
    engine: deepspeed.DeepSpeedEngine, kinds: dict[str, set[str]], numbers: dict[str, dict[str, float]]
) -> None:
    """Makes the optimizer's state what the checkpoint's is, its tensors still to be filled.

    Args:
        kinds: for each parameter the optimizer states that are tensors.
        numbers: for each parameter those that are numbers.

    Raises:
        CheckpointError: parameters that this engine steps as one flat tensor have different kinds of state.
    """
    states = engine.basic_optimizer.state
    wanted: dict[torch.Tensor, tuple[set[str], dict[str, float], str]] = {}
    for home in _homes(engine):
        mine = (kinds.get(home.name, set()), numbers.get(home.name, {}), home.name)
        other = wanted.setdefault(home.stepped, mine)
        if other[:2] != mine[:2]:
            raise CheckpointError(
                home.name, f"its optimizer states differ from {other[2]}'s, with which ZeRO steps it as one tensor"
            )
    on_device = any(group.get("fused") for group in engine.basic_optimizer.param_groups)
    for stepped, (tensors, values, _) in wanted.items():
        state = states[stepped]
        for key in list(state):
            if key not in tensors:
                del state[key]
        for key in tensors:
            if key not in state:
                state[key] = torch.zeros_like(stepped.data)
        for key, value in values.items():
            # torch keeps `step` as an fp32 tensor on the host, a fused optimizer beside the weights
            place = stepped.device if on_device else None
            state[key] = torch.tensor(value, dtype=torch.float32, device=place) if isinstance(value, float) else value


def weights_changed(engine: deepspeed.DeepSpeedEngine) -> None:
    """Brings the weights of the forward pass in line with the fp32 weights, as an optimizer step does at its end.

    Collective over the world.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.update_lp_params()
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        persistent = optimizer.persistent_parameters  # small ones, which stay gathered between steps
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for low, full in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(low, full, strict=True):
                parameter.data.copy_(master.data)


def _homes(engine: deepspeed.DeepSpeedEngine) -> Iterator[_Home]:
    optimizer = engine.optimizer
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        if optimizer.swap_optimizer or optimizer.params_in_nvme_and_cpu:
            raise CheckpointError("zero", "states on NVMe cannot be saved; offload to host memory instead")
        for parameter, name in names.items():
            if parameter.requires_grad:
                group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = min(dist.get_rank(parameter.ds_process_group) * size, parameter.ds_numel)
                held = min(size, parameter.ds_numel - start)
                if held:
                    flat = optimizer.fp32_partitioned_groups_flat[group]
                    yield _Home(name, tuple(parameter.ds_shape), flat, offset, start, held)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
            for parameter in group:
                if (mapping := parameter._hp_mapping) is not None:
                    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                    yield _Home(names[parameter], tuple(parameter.shape), flat, here.start, there.start, here.numel)
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for low, full in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(low, full, strict=True):
                yield _Home(names[parameter], tuple(parameter.shape), master, 0, 0, parameter.numel())
    elif isinstance(optimizer, torch.optim.Optimizer):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    yield _Home(names[parameter], tuple(parameter.shape), parameter, 0, 0, parameter.numel())
    else:
        raise CheckpointError(type(optimizer).__name__, "is a DeepSpeed optimizer whose states cannot be saved yet")


def _untrained(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter
    yield from _buffers(engine.module)


def _buffers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that belong to the state dict."""
    saved = module.state_dict(keep_vars=True).keys()
    for name, buffer in module.named_buffers():
        if name in saved:
            yield name, buffer
