"""Sequence parallelism on a model, for as long as a context is open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ulysses_exp.config.model_rules import why_not_sharded
from ulysses_exp.model.attention import core, upstream
from ulysses_exp.model.attention.exchange import FusedUlyssesAttention
from ulysses_exp.model.attention.handle import Ulysses
from ulysses_exp.model.attention.patched import Patched


@contextmanager
def ulysses(
    model: PreTrainedModel,
    *,
    sp: int,
    attention: str = "sdpa",
    exchange: str = "deepspeed",
    micro_batch_size: int,
    disable_in_eval: bool = True,
) -> Iterator[Ulysses]:
    """Runs `model`'s attention sequence-parallel over groups of `sp` contiguous ranks while the context is open.

    Every rank gives the model its slice of each sequence, [batch, seq_len / sp], with global position_ids (without
    any, positions run through the sequence, as in the unpatched model) and, if padded, its slice of the 2D mask.
    Logits are those of the unpatched model on whole sequences, also for packed documents, padding and sliding windows.
    Other models of the process, and at `sp` 1 this one, are left alone. Everything is restored on exit, also after
    an error. Collective over all ranks at entry.

    Args:
        attention: `model.config._attn_implementation`: sdpa, flex_attention, flash_attention_2 or _3, or a kernel of
            the hub. The flash and hub paths have not been run: no GPU was at hand.
        exchange: `deepspeed` (upstream's all-to-alls) or `fused` (`exchange.FusedUlyssesAttention`).
        micro_batch_size: sequences in a batch; `fused` takes any.

    Raises:
        ValueError: this model or attention implementation cannot run sequence-parallel.
        RuntimeError: sequence parallelism is registered already.
    """
    if sp == 1:
        yield Ulysses(disable_in_eval=disable_in_eval)
        return
    if exchange not in ("deepspeed", "fused"):
        raise ValueError(f"sp.exchange={exchange!r} is not a choice; set deepspeed or fused")
    _check_model(model, attention)
    heads = model.config.get_text_config().num_attention_heads
    if heads % sp:  # upstream says so only when some ranks are connected and others are still connecting
        raise ValueError(f"{heads} query heads do not divide over sp.size={sp}")
    with ExitStack() as stack:
        stack.enter_context(upstream.sequence_parallel_state())
        stack.enter_context(upstream.kv_groups(model))
        stack.enter_context(upstream.entry(ALL_ATTENTION_FUNCTIONS, attention))
        original = ALL_ATTENTION_FUNCTIONS[attention]
        ALL_ATTENTION_FUNCTIONS[attention] = core.around(attention, original)  # what upstream finds and wraps
        mpu = UlyssesSPAttentionHF.register_with_transformers(
            model, attention, sp, micro_batch_size, disable_in_eval=disable_in_eval
        )
        # new_group returns while other ranks still connect to this one; who leaves the context early would fail them
        torch.distributed.barrier()
        handle = Ulysses(mpu, sp, disable_in_eval)
        exchanged = upstream.attention_module(ALL_ATTENTION_FUNCTIONS[attention])
        if exchange == "fused":
            exchanged = _fused(exchanged)
        patched = Patched(handle, model, original, exchanged, micro_batch_size if exchange == "deepspeed" else None)
        ALL_ATTENTION_FUNCTIONS[attention] = patched.attention
        if attention in ALL_MASK_ATTENTION_FUNCTIONS:
            stack.enter_context(upstream.entry(ALL_MASK_ATTENTION_FUNCTIONS, attention))
            ALL_MASK_ATTENTION_FUNCTIONS[attention] = patched.mask(ALL_MASK_ATTENTION_FUNCTIONS[attention])
        stack.enter_context(patched.hooks())
        yield handle


def _check_model(model: PreTrainedModel, attention: str) -> None:
    """Raises ValueError for what can be known before a forward."""
    if attention in ("eager", "paged|eager"):
        raise ValueError("sp.attention=eager needs an n^2 mask, which Ulysses cannot shard; set sp.attention=sdpa")
    if attention not in ("sdpa", "flex_attention") and "flash" not in attention and "/" not in attention:
        raise ValueError(
            f"sp.attention={attention} is not known to be causal on whole sequences; set sp.attention=sdpa"
        )
    have = model.config._attn_implementation
    if have != attention:
        raise ValueError(f"the model was built with attention {have}, not {attention}; set sp.attention={have}")
    text = model.config.get_text_config()
    why = why_not_sharded(
        type(model).__name__, getattr(text, "layer_types", None), getattr(text, "num_key_value_heads", None)
    )
    if why is not None:
        raise ValueError(f"{why}; set sp.size=1")


def _fused(base: UlyssesSPAttentionHF) -> FusedUlyssesAttention:
    fused = FusedUlyssesAttention(
        attn=base.attn,
        batch_size=base.batch_size,
        attn_head_count=base.attn_head_count,
        attn_head_size=base.attn_head_size,
        kv_head_count=base.global_kv_head_count,
        num_hidden_layers=base.num_hidden_layers,
        process_group=base.process_group,
        seq_length_is_variable=True,
        disable_in_eval=base.disable_in_eval,
    )
    fused.gather_position_ids = False  # the documents of the forward are known
    return fused
