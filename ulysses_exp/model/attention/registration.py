"""Sequence parallelism on a model, for as long as a context is open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from ulysses_exp.config.head_shares import HeadShares
from ulysses_exp.config.model_rules import why_not_sharded
from ulysses_exp.model import outside_attention  # the module: it imports this package itself
from ulysses_exp.model.attention import core, upstream
from ulysses_exp.model.attention.exchange import FusedUlyssesAttention
from ulysses_exp.model.attention.groups import groups
from ulysses_exp.model.attention.handle import Ulysses
from ulysses_exp.model.attention.own_name import interchangeable, own_name
from ulysses_exp.model.attention.patched import Patched
from ulysses_exp.model.mixers import binding


@contextmanager
def ulysses(
    model: PreTrainedModel,
    *,
    sp: int,
    attention: str = "auto",
    exchange: str = "fused",
    micro_batch_size: int,
    disable_in_eval: bool = True,
) -> Iterator[Ulysses]:
    """Runs `model` sequence-parallel over groups of `sp` contiguous ranks while the context is open.

    Every rank gives the model its slice of each sequence, [batch, seq_len / sp], with global position_ids (without
    any, positions run through the sequence, as in the unpatched model) and, if padded, its slice of the 2D mask.
    Logits are those of the unpatched model on whole sequences, also for packed documents, padding, sliding windows,
    chunks, sinks and soft caps. At `sp` 1, and in eval mode with `disable_in_eval`, the same attention runs on whole
    sequences without any collective, and no mask of n x n is made; a KV cache, `generate` and masks of the caller's own
    are left to transformers. Other models of the process are left alone. Everything is restored on exit, also after an
    error. Collective over all ranks at entry.

    Args:
        model: built with any attn_implementation.
        attention: sdpa (torch's own kernels), flex_attention, flash_attention_2, _3 or _4, or the kernel of a hub that
            the model was built with; `auto`: the best of these that is installed for this model and device;
            `transformers`, at sp 1: attention is left as it is, and of what mixes tokens otherwise (`model.mixers`) is
            changed alone that documents stay apart. What needs a GPU has not been run: none was at hand.
        exchange: `deepspeed` (upstream's all-to-alls, for heads that divide) or `fused`
            (`exchange.FusedUlyssesAttention`).
        micro_batch_size: sequences in a batch; `fused` takes any.

    Raises:
        ValueError: this model or attention implementation cannot run sequence-parallel.
        RuntimeError: upstream's exchange is registered already.
    """
    if exchange not in ("deepspeed", "fused"):
        raise ValueError(f"sp.exchange={exchange!r} is not a choice; set deepspeed or fused")
    mixers = binding.mixers(model)
    why = _why_not(model, sp, bool(mixers))
    if sp == 1 and (why is not None or attention == "transformers"):
        if why is None and mixers:
            with _mixers_alone(model, mixers, disable_in_eval) as handle:
                yield handle
        else:
            yield Ulysses(disable_in_eval=disable_in_eval)
        return
    if why is not None:
        raise ValueError(f"{why}; set sp.size=1")
    if exchange == "deepspeed" and sp > 1 and (why := _why_not_upstream(model, sp)) is not None:
        raise ValueError(f"{why}; set sp.exchange=fused")
    name = _resolved(model, attention)
    run = core.around(name, ALL_ATTENTION_FUNCTIONS[name])
    handle = Ulysses(sp=sp, disable_in_eval=disable_in_eval, attention=name, mixers=len(mixers))
    attentions = len(binding.attentions(model)) if mixers else None
    patched = Patched(handle, model, model.config._attn_implementation, run, attentions, mixers)
    with ExitStack() as stack:
        stack.enter_context(binding.bound(model, patched.mixer_way))
        own = stack.enter_context(own_name(model, patched.attention, patched.mask))
        if sp > 1 and exchange == "fused":
            made = stack.enter_context(groups(sp))
            handle.mpu = made
            shared = FusedUlyssesAttention(run, process_group=made.get_sequence_parallel_group())
            shared.gather_position_ids = False  # the documents of the forward are known
            patched.share(shared, None)
        elif sp > 1:
            stack.enter_context(upstream.sequence_parallel_state())
            stack.enter_context(upstream.kv_groups(model))
            with upstream.entry(ALL_ATTENTION_FUNCTIONS, own):
                ALL_ATTENTION_FUNCTIONS[own] = _own_sinks(run, sp)  # what upstream finds and wraps
                handle.mpu = UlyssesSPAttentionHF.register_with_transformers(model, own, sp, micro_batch_size)
                wrapped = upstream.attention_module(ALL_ATTENTION_FUNCTIONS[own])
            # new_group returns while other ranks still connect to this one; who leaves the context early fails them
            torch.distributed.barrier()
            patched.share(wrapped, micro_batch_size)
        stack.enter_context(patched.hooks())
        yield handle


@contextmanager
def _mixers_alone(model: PreTrainedModel, mixers: list[torch.nn.Module], disable_in_eval: bool) -> Iterator[Ulysses]:
    """Attention as transformers has it, on whole sequences; what mixes tokens otherwise sees its own document."""
    handle = Ulysses(disable_in_eval=disable_in_eval, mixers=len(mixers))
    patched = Patched(handle, model, model.config._attn_implementation, None, 0, mixers)
    with binding.bound(model, patched.mixer_way), patched.hooks():
        yield handle


def _why_not(model: PreTrainedModel, sp: int, mixers: bool) -> str | None:
    """Why this model cannot be served; None where nothing is known against it."""
    kind, text = type(model).__name__, model.config.get_text_config()
    why = binding.why_not_served(model) if mixers else why_not_sharded(kind, getattr(text, "layer_types", None))
    if why is not None:
        return why
    if not mixers and not interchangeable(model):
        return f"{kind} brings its own attention code, which Ulysses does not reach"
    if getattr(text, "num_attention_heads", None) is None and not mixers:
        return f"{kind} is configured without num_attention_heads"
    if any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules()):
        return f"{kind} numbers its tokens by the padding before them (RoBERTa), and not by position_ids from 0 on"
    if sp > 1 and not mixers and (why := outside_attention.why_not_in_slices(model)) is not None:
        return why
    return None


def _why_not_upstream(model: PreTrainedModel, sp: int) -> str | None:
    """Why upstream's exchange, whose shapes come from the configuration, cannot serve a model that ours can."""
    kind, text = type(model).__name__, model.config.get_text_config()
    heads, kv_heads = getattr(text, "num_attention_heads", None), getattr(text, "num_key_value_heads", None)
    if heads is None or kv_heads is None:
        return f"{kind} is configured without num_key_value_heads, which sp.exchange=deepspeed reads"
    names = ("head_dim", "qk_head_dim", "v_head_dim")  # as the layers have them: some differ from layer to layer
    sizes = (getattr(module, name, None) for module in model.modules() for name in names)
    widths = {size for size in sizes if isinstance(size, int)}
    if len(widths) > 1:
        return f"{kind} has heads of {len(widths)} widths, for which sp.exchange=deepspeed has no shapes"
    if not HeadShares(sp, heads).even(kv_heads):
        return f"{heads} query heads and {kv_heads} KV heads do not divide over sp.size={sp} in sp.exchange=deepspeed"
    return None


def _own_sinks(run: core.Core, sp: int) -> core.Core:
    """`run` with the sinks of this rank's heads, of which upstream's exchange knows nothing."""

    def cut(*args: Any, s_aux: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Any]:
        return run(*args, s_aux=None if s_aux is None else s_aux.chunk(sp)[torch.distributed.get_rank() % sp], **kwargs)

    return cut


def _resolved(model: PreTrainedModel, attention: str) -> str:
    """The name of transformers' attention function whose part the core takes.

    Raises:
        ValueError: there is none that is known to be causal on whole sequences.
    """
    if attention == "auto":
        gpu = any(p.device.type == "cuda" for p in model.parameters()) or torch.cuda.is_initialized()
        if not gpu or next(model.parameters()).dtype not in (torch.bfloat16, torch.float16):
            return "sdpa"
        if is_flash_attn_3_available():
            return "flash_attention_3"
        return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
    if attention == "transformers":
        raise ValueError("sp.attention=transformers makes masks of n x n, which Ulysses cannot shard; set sp.size=1")
    if attention in ("eager", "paged|eager"):
        raise ValueError("sp.attention=eager needs an n^2 mask, which Ulysses cannot shard; set sp.attention=sdpa")
    known = attention in ("sdpa", "flex_attention") or "flash" in attention or "/" in attention
    if not known or attention not in ALL_ATTENTION_FUNCTIONS:
        raise ValueError(
            f"sp.attention={attention} is not known to be causal on whole sequences; set sp.attention=sdpa"
        )
    return attention
