"""Floating-point operations of an optimizer step: the model's own (MFU) and the hardware's (HFU)."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ulysses_exp.config import MemoryConfig
from ulysses_exp.config.tiles import tiles_of
from ulysses_exp.model.memory import apply


@dataclass(frozen=True)
class StepFlops:
    """For the whole global batch, each token once, of all ranks together.

    `model`: every operation once, visible pairs of tokens only, forward and backward. `hardware`: with what the memory
    savers compute again.
    """

    model: float
    hardware: float


#: Dense peak in FLOP/s without sparsity, by a part of torch's device name; SXM parts, from NVIDIA's data sheets
#: ("NVIDIA H100 Tensor Core GPU", "H200", "A100", "L40S", "DGX B200"; those print the rate with sparsity, twice this).
#: fp32 is what torch does by default: no TF32.
PEAK = {
    "H200": {"bf16": 989e12, "fp32": 67e12},
    "H100": {"bf16": 989e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "fp32": 19.5e12},
    "L40S": {"bf16": 362e12, "fp32": 91.6e12},
    "B200": {"bf16": 2250e12, "fp32": 75e12},
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s of one device; None for CPUs and devices that the table lacks."""
    if "PCIe" in device_name or " NVL" in device_name:  # slower than the SXM parts of the same name
        return None
    return next((row[precision] for name, row in PEAK.items() if name in device_name), None)


@dataclass(frozen=True)
class AttentionLayer:
    """One layer's core attention: query heads, the sizes of a query and of a value head, and how far a token sees."""

    heads: int
    head_dim: int
    value_dim: int
    window: int | None

    def flops(self, seq_len: int) -> float:
        """Of the forward over one sequence: scores and values, 2 operations a pair and dimension each."""
        return 2.0 * pairs(seq_len, self.window) * self.heads * (self.head_dim + self.value_dim)


@dataclass(frozen=True)
class ForwardFlops:
    """What a forward computes: operations a token of all linear layers, and attention."""

    linear: float
    attention: tuple[AttentionLayer, ...]


def pairs(seq_len: int, window: int | None) -> float:
    """Pairs of a query and a key that it sees: T (T + 1) / 2, or with a window of W tokens W each after the first W."""
    reach = seq_len if window is None else min(window, seq_len)
    return reach * (reach + 1) / 2 + (seq_len - reach) * float(reach)


def forward_flops(architecture: PretrainedConfig) -> ForwardFlops:
    """Counts a forward of the configured model with torch's flop counter, on the meta device: no memory, no arithmetic.

    A mixture of experts counts what a token's own experts compute.
    """
    text = architecture.get_text_config()
    return _counted(architecture.model_type, json.dumps(text.to_diff_dict(), sort_keys=True, default=str), _Same(text))


class _Same:
    """An argument that a cache does not look at."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same)

    def __hash__(self) -> int:
        return 0


@functools.cache
def _counted(model_type: str, key: str, architecture: _Same) -> ForwardFlops:
    tokens = 16
    counter = FlopCounterMode(display=False, custom_mapping=_CUSTOM)
    with _on_meta(architecture.value) as (model, layers), torch.no_grad(), counter:
        model(**_inputs(tokens))
    return ForwardFlops(linear=counter.get_total_flops() / tokens, attention=tuple(layers))


@dataclass(frozen=True)
class AgainFlops:
    """What the backward computes a second time: operations a token of linear layers, and attention."""

    linear: float = 0.0
    attention: tuple[AttentionLayer, ...] = ()


def again_flops(architecture: PretrainedConfig, memory: MemoryConfig, positions: int) -> AgainFlops:
    """Counts what `memory` makes the backward compute again.

    Counted and not derived, for torch's non-reentrant checkpoints stop where nothing more is needed: before a layer's
    last product in most models, before the last tile of a tiled MLP; the reentrant ones do not.

    Args:
        positions: of a sequence on one rank, which decide on the number of tiles.
    """
    text = architecture.get_text_config()
    key = json.dumps(text.to_diff_dict(), sort_keys=True, default=str)

    def counted(tiles: int) -> AgainFlops:
        return _counted_again(
            architecture.model_type, key, _Same(text), memory.checkpointing, tiles, bool(memory.tiled_loss)
        )

    if not memory.tiled_mlp:
        return counted(0)
    # a checkpoint around n tiles saves the last, so the rest grows as a - b / n: hundreds of tiles are known from two
    one, two = counted(1), counted(2)
    n = tiles_of(memory.tiled_mlp, positions)
    return AgainFlops(2 * two.linear - one.linear - 2 * (two.linear - one.linear) / n, two.attention)


@functools.cache
def _counted_again(
    model_type: str, key: str, architecture: _Same, checkpointing: str, tiles: int, tiled_loss: bool
) -> AgainFlops:
    """A forward and backward on the meta device, less three forwards."""
    if checkpointing == "none" and not tiles and not tiled_loss:
        return AgainFlops()
    once = _counted(model_type, key, architecture)
    tokens = 16
    with _on_meta(architecture.value) as (model, layers):
        apply(model.train(), MemoryConfig("", checkpointing, tiled_mlp=tiles, tiled_loss=int(tiled_loss)))
        inputs = _inputs(tokens)
        with FlopCounterMode(display=False, custom_mapping=_CUSTOM) as counter:
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return AgainFlops(counter.get_total_flops() / tokens - 3 * once.linear, tuple(layers[len(once.attention) :]))


class _Attention(torch.autograd.Function):
    """Shapes without arithmetic: attention's share grows with the square of the length and is counted by formula."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return value.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


@contextlib.contextmanager
def _on_meta(architecture: PretrainedConfig) -> Iterator[tuple[PreTrainedModel, list[AttentionLayer]]]:
    """The model without memory, and the list to which every call of its attention adds a layer. Within, the meta device
    is the default."""
    layers: list[AttentionLayer] = []

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
        """[batch, heads, tokens, dim] each."""
        window = kwargs.get("sliding_window") or _window_of(module)
        layers.append(AttentionLayer(query.shape[1], query.shape[3], value.shape[3], window))
        return _Attention.apply(query, key, value), None

    name = "ulysses_exp_flops"
    ALL_ATTENTION_FUNCTIONS.register(name, attention)  # transformers makes no mask for a name that it does not know
    config = architecture.__class__.from_dict(architecture.to_dict())
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        yield AutoModelForCausalLM.from_config(config, attn_implementation=name, dtype=torch.bfloat16), layers


def _inputs(tokens: int) -> dict[str, Any]:
    return {"input_ids": torch.zeros(1, tokens, dtype=torch.long), "position_ids": torch.arange(tokens)[None],
            "attention_mask": None, "use_cache": False}  # fmt: skip


def _grouped_mm_flops(a_shape: Any, b_shape: Any, *args: Any, **kwargs: Any) -> int:
    """Rows of `a`, [rows, in], are sorted by expert; `b` is [experts, in, out]: each row meets one expert."""
    return 2 * a_shape[0] * b_shape[1] * b_shape[2]


_CUSTOM = {torch.ops.aten._grouped_mm: _grouped_mm_flops}


def _window_of(module: Any) -> int | None:
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    types = getattr(config, "layer_types", None)
    if types and index is not None and types[index] == "sliding_attention":
        return config.sliding_window  # type: ignore[union-attr]
    return None


def step_flops(
    architecture: PretrainedConfig, *, seq_len: int, sequences: int, memory: MemoryConfig, sp: int
) -> StepFlops:
    """FLOPs of an optimizer step over `sequences` sequences of `seq_len` tokens, each over `sp` ranks.

    A backward takes twice as many as its forward: for matrix products, one for the input's and one for the weight's
    gradient (Kaplan et al. 2020, arXiv 2001.08361, section 2.1). Norms, activation functions and the optimizer are not
    counted, nor is the recomputation inside a flash-attention backward.
    """

    def flops(linear: float, attention: tuple[AttentionLayer, ...]) -> float:
        return linear * seq_len + sum(layer.flops(seq_len) for layer in attention)

    once = forward_flops(architecture)
    again = again_flops(architecture, memory, seq_len // sp)
    model = 3 * flops(once.linear, once.attention) * sequences
    return StepFlops(model=model, hardware=model + flops(again.linear, again.attention) * sequences)
