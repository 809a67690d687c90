"""What a rank's memory is taken by, in closed formulas: in no time, and within a quarter of what a plan says.

`plan/` traces the real engine, for seconds to a minute; this is for what fits by far and what does not by far.
The terms are those that traces have (tests/plan/test_footprint.py holds them against each other).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ulysses_exp.config.architecture import text_architecture
from ulysses_exp.config.schema import Config
from ulysses_exp.config.tiles import tiles_of

#: Families whose parameters are counted here: gated MLP, attention without or with few biases
_FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text")

#: Elements. DeepSpeed 0.19.8, runtime/zero/config.py: reduce_bucket_size, stage3_max_live_parameters with
#: stage3_prefetch_bucket_size on top, sub_group_size
_BUCKET, _LIVE, _SUB_GROUP = 500_000_000, 1_050_000_000, 1_000_000_000

_LOGITS = 2**30  # of each mode that `eval.mode=both` compares (stages/eval/rank.py, LOGITS_BYTES)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, in elements."""

    parameters: int  # tied ones once
    layers: int
    hidden: int
    intermediate: int
    attention: int  # of q, k and v of a token
    vocabulary: int


@dataclass(frozen=True)
class Need:
    """Bytes that a rank's device has to hold."""

    held: float  # weights, gradients and optimizer states, and logits where they are whole: no way round them
    estimated: float  # with activations, buffers and the optimizer's temporaries


def shape(config: Config) -> Shape | None:
    """Of the configured model; None where its architecture is not at hand, or of a family not counted here."""
    known = text_architecture(config)
    kind = known.get("model_type")
    if kind not in _FAMILIES:
        return None
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    sizes = [known.get(name) for name in names]
    if not all(type(size) is int for size in sizes):
        return None
    hidden, inner, layers, heads, vocabulary = (int(size) for size in sizes if size is not None)
    kv = known.get("num_key_value_heads") or heads
    wide = known.get("head_dim") or hidden // heads
    if type(kv) is not int or type(wide) is not int:
        return None
    experts, routed = _experts(known)
    inner_of_experts = (known.get("moe_intermediate_size") or inner) if experts > 1 else inner
    attention = (heads + 2 * kv) * wide
    layer = hidden * (attention + heads * wide) + 3 * hidden * inner_of_experts * experts + 2 * hidden
    tied = known.get("tie_word_embeddings", str(kind).startswith("gemma"))
    return Shape(
        parameters=layers * layer + vocabulary * hidden * (1 if tied else 2),
        layers=layers,
        hidden=hidden,
        intermediate=inner_of_experts * routed,
        attention=attention,
        vocabulary=vocabulary,
    )


def _experts(known: dict[str, Any]) -> tuple[int, int]:
    """(experts of a layer, those that a token goes to)."""
    number = next((known[name] for name in ("num_local_experts", "num_experts") if known.get(name)), 1)
    return int(number), int(known.get("num_experts_per_tok") or 1) if number > 1 else 1


def training(config: Config, of: Shape) -> Need:
    """Of the fullest moment of an optimizer step at the layout of `config`."""
    held, itemsize, p = _held(config, of), _itemsize(config), of.parameters
    stage, world = config.zero.stage, config.layout.world
    alone = stage == 0 or world == 1
    bucket = 4 * min(p, _BUCKET) * (2 if itemsize == 2 and 0 < stage < 3 and not alone else 1)
    buffers: float = bucket if stage else (5 * p if itemsize == 2 and world > 1 else 0)
    if stage == 3 and (world > 1 or config.zero.offload_parameters):
        buffers += itemsize * min(p, _LIVE)
    activations = 0.0 if config.longest.search else _activations(config, of)
    return Need(
        held, max(held + buffers + activations, held + _temporaries(config, of) + (bucket if stage == 3 else 0))
    )


def bypassed_evaluation(config: Config, of: Shape) -> Need:
    """Of evaluating whole sequences, one a rank, by the engine that trains."""
    tokens, itemsize, memory = config.train.seq_len, _itemsize(config), config.memory
    logits = tokens * of.vocabulary * itemsize / (tiles_of(memory.tiled_loss, tokens) if memory.tiled_loss else 1)
    inner = 3 * of.intermediate / (tiles_of(memory.tiled_mlp, tokens) if memory.tiled_mlp else 1)
    layer = tokens * itemsize * (12 * of.hidden + of.attention + inner)
    states = 2 * tokens * itemsize * of.hidden
    compared = 3 * min(_LOGITS, 4 * tokens * of.vocabulary) if config.eval.mode == "both" else 0
    gathered = itemsize * min(of.parameters, _LIVE) if config.zero.stage == 3 else 0
    held = _held(config, of, gradients=False)
    buffers = 4 * min(of.parameters, _BUCKET) if config.zero.stage == 3 else 0
    return Need(held + logits, held + buffers + gathered + max(logits, compared, layer - states) + states)


def _itemsize(config: Config) -> int:
    return 2 if config.train.precision == "bf16" else 4


def _held(config: Config, of: Shape, gradients: bool = True) -> float:
    """Weights, optimizer states, and gradients as the backward ends."""
    zero, world, itemsize = config.zero, config.layout.world, _itemsize(config)
    own = of.parameters / (world if zero.stage else 1)
    weights = 0.0 if zero.offload_parameters else itemsize * (own if zero.stage == 3 else of.parameters)
    masters = 4 if zero.stage or itemsize == 2 else 0
    states = 0.0 if zero.offload_optimizer else (masters + _moments(config)) * own
    if not gradients or (zero.offload_optimizer and zero.stage > 1):
        return weights + states
    return weights + states + 4 * (own if zero.stage > 1 else of.parameters)  # in fp32 in bf16 too


def _moments(config: Config) -> int:
    """Bytes of a parameter's moments, which are in fp32."""
    return 8 if config.optim.name == "adamw" else 4 if config.optim.momentum else 0


def _temporaries(config: Config, of: Shape) -> float:
    """What the optimizer takes while it steps: a flat copy of its part of the gradients. A fused one makes no other."""
    if config.zero.offload_optimizer or config.zero.stage == 0:
        return 0
    own = of.parameters / config.layout.world
    return 4 * (min(own, _SUB_GROUP) if config.zero.stage == 3 else own)


def _activations(config: Config, of: Shape) -> float:
    """Of a micro step. Per layer and token: norms, rotated q, k and v, four of the MLP's, residuals.

    Where layers are recomputed, one is in memory at a time, with its gradients, and the loss before the first of them.
    """
    memory, itemsize = config.memory, _itemsize(config)
    tokens = config.train.micro_batch_size * config.train.seq_len // config.sp.size
    inner = 4 * of.intermediate / (tiles_of(memory.tiled_mlp, tokens) if memory.tiled_mlp else 1)
    in_place = memory.loss_in_place or memory.tiled_loss
    logits = of.vocabulary * (1.2 if in_place else 1 + 10 / itemsize)
    if memory.tiled_loss:
        logits /= tiles_of(memory.tiled_loss, tokens)
    layer = 8 * of.hidden + 3 * of.attention + inner
    if memory.checkpointing == "none":
        return tokens * itemsize * (of.layers * layer + logits)
    layer += 4 * of.hidden + 3 * of.attention
    kept = (1 if memory.offload_activations else of.layers) * of.hidden
    return tokens * itemsize * (kept + max(layer, logits))
