"""A tiny model, its engine in any layout, and optimizer steps that every layout makes alike."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from transformers import LlamaConfig, LlamaForCausalLM

from ulysses_exp.layout import Layout
from ulysses_exp.rank import mixed_precision, upstream

TOKENS, BATCH = 16, 4


@dataclass(frozen=True)
class Recipe:
    """What is trained, whatever the layout."""

    optimizer: str = "adamw"  # adamw, sgd, momentum
    bf16: bool = False
    tied: bool = False
    offload: bool = False
    fused: bool = False  # AdamW
    hidden: int = 32
    layers: int = 2
    vocabulary: int = 64


@contextlib.contextmanager
def engine(layout: Layout, recipe: Recipe = Recipe(), seed: int = 0) -> Iterator[deepspeed.DeepSpeedEngine]:
    """A DeepSpeed engine around a Llama drawn from `seed`; taken down again so that another layout can follow."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocabulary, hidden_size=recipe.hidden, intermediate_size=3 * recipe.hidden,
            num_hidden_layers=recipe.layers, num_attention_heads=4, num_key_value_heads=2,
            tie_word_embeddings=recipe.tied, max_position_embeddings=TOKENS,
        )
    )  # fmt: skip
    if recipe.bf16:
        model.to(torch.bfloat16)
    if recipe.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-2, weight_decay=0.1, fused=recipe.fused
        )
    else:
        momentum = 0.9 if recipe.optimizer == "momentum" else 0.0
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-1, momentum=momentum, weight_decay=0.1)
    zero: dict[str, Any] = {"stage": layout.zero}
    if recipe.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if layout.zero == 3:
            zero["offload_param"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": BATCH // layout.dp,
        "bf16": {"enabled": recipe.bf16},
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
    }
    if recipe.bf16:
        config |= mixed_precision.entries(layout.zero)
    if layout.sp > 1:
        parallel_state_sp.initialize_sequence_parallel(layout.sp)
    with upstream.stage_1_like_the_others():
        made, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
            config=config,
            mpu=parallel_state_sp if layout.sp > 1 else None,
        )
    if recipe.bf16 and not layout.zero:
        mixed_precision.accumulate(made)
    try:
        yield made
    finally:
        made.destroy()
        for group in (parallel_state_sp._SEQUENCE_PARALLEL_GROUP, parallel_state_sp._SEQUENCE_DATA_PARALLEL_GROUP):
            if group is not None:
                dist.destroy_process_group(group)
        parallel_state_sp._release_sequence_parallel_groups()
        deepspeed.utils.groups.mpu = None


def steps(made: deepspeed.DeepSpeedEngine, layout: Layout, first: int, count: int) -> list[float]:
    """Optimizer steps `first` .. `first + count - 1` on the same tokens in every layout; returns their losses.

    Ranks of an SP group compute the same here: checkpoints do not depend on how the forward pass is shared.
    """
    losses = []
    vocabulary = made.module.config.vocab_size
    for step in range(first, first + count):
        tokens = torch.randint(vocabulary, (BATCH, TOKENS), generator=torch.Generator().manual_seed(step))
        total = torch.zeros((), dtype=torch.float64)
        for sample in range(layout.dp_rank(dist.get_rank()), BATCH, layout.dp):
            ids = tokens[sample : sample + 1]
            # stages 0 to 2 divide by world / sp, stage 3 by world; the ranks of an SP group add up
            scale = (layout.world if layout.zero == 3 else layout.dp) / layout.sp / BATCH
            loss = made(input_ids=ids, labels=ids, use_cache=False).loss
            made.backward(loss * scale, scale_wrt_gas=False)
            total += loss.detach().double() / BATCH / layout.sp
            made.step()
        dist.all_reduce(total)
        losses.append(float(total))
    return losses
