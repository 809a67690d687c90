"""Sequence parallelism on a model, for as long as a context is open."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ulysses_exp.attention import core, upstream
from ulysses_exp.attention.agreement import agree, check_batch
from ulysses_exp.attention.documents import Documents, documents
from ulysses_exp.attention.exchange import FusedUlyssesAttention


@dataclass(frozen=True)
class _Announced:
    """What `begin` was told of the next forward."""

    documents: Documents
    position_ids: Tensor  # [batch, seq_len], on the host
    masked: bool


class Ulysses:
    """The handle of a registration.

    Attributes:
        mpu: what `deepspeed.initialize(mpu=...)` takes; None at sp 1.
        disable_in_eval: a model in eval mode runs the original attention on whole sequences, without any collective.
            May be switched between forwards.
        attention_calls: calls of the patched attention function by this model so far.
    """

    def __init__(self, mpu: Any = None, sp: int = 1, disable_in_eval: bool = True):
        self.mpu = mpu
        self.sp = sp
        self.disable_in_eval = disable_in_eval
        self.attention_calls = 0
        self._announced: _Announced | None = None

    def begin(self, position_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Tells what the ranks would otherwise gather: the whole sequences of the next forward. No collective, no
        device sync. Optional; every rank of a sequence-parallel group has to make the call, with the same values.

        Args:
            position_ids: [batch, seq_len] int64 on the host, global positions. A fake tensor counts as plain causal.
            attention_mask: [batch, seq_len], zero at padding; None where nothing is padded.

        Raises:
            ValueError: seq_len is no multiple of sp, shapes do not fit, or padding lies inside a document.
        """
        if self.sp == 1:
            return
        whole = documents(position_ids, attention_mask)
        if whole.seq_len % self.sp:
            raise ValueError(
                f"{whole.seq_len} tokens do not divide over sp.size={self.sp}; set train.seq_len to a multiple"
            )
        self._announced = _Announced(whole, position_ids, attention_mask is not None)


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
    with ExitStack() as stack:
        stack.enter_context(upstream.sequence_parallel_state())
        stack.enter_context(upstream.kv_groups(model))
        stack.enter_context(upstream.entry(ALL_ATTENTION_FUNCTIONS, attention))
        original = ALL_ATTENTION_FUNCTIONS[attention]
        ALL_ATTENTION_FUNCTIONS[attention] = _core(attention, original)  # what upstream finds and wraps
        mpu = UlyssesSPAttentionHF.register_with_transformers(
            model, attention, sp, micro_batch_size, disable_in_eval=disable_in_eval
        )
        # new_group returns while other ranks still connect to this one; who leaves the context early would fail them
        torch.distributed.barrier()
        handle = Ulysses(mpu, sp, disable_in_eval)
        exchanged = upstream.attention_module(ALL_ATTENTION_FUNCTIONS[attention])
        if exchange == "fused":
            exchanged = _fused(exchanged)
        patched = _Patched(handle, model, original, exchanged, micro_batch_size if exchange == "deepspeed" else None)
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
    strange = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if strange:
        raise ValueError(
            f"{type(model).__name__} has layers of type {', '.join(sorted(strange))}, which Ulysses does not shard; "
            "set sp.size=1"
        )
    if getattr(text, "num_key_value_heads", None) is None:
        raise ValueError(
            f"{type(model).__name__} is configured without num_key_value_heads, which DeepSpeed reads; set sp.size=1"
        )


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


class _Plan:
    """The documents of one forward, and what is made of them once and used in every layer."""

    def __init__(self, whole: Documents):
        self.documents = whole
        self._made: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _core(attention: str, original: Callable[..., Any]) -> core.Core:
    """What runs between the two exchanges: `original`'s attention, with the documents of the forward respected."""

    def run(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *,
        plan: _Plan,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        whole, device = plan.documents, query.device
        window = None if sliding_window is None or sliding_window >= whole.seq_len else sliding_window
        if attention == "sdpa":
            unsupported = [k for k in ("softcap", "s_aux", "position_bias") if kwargs.get(k) is not None]
            if unsupported:
                raise ValueError(
                    f"sp.attention=sdpa has no {', '.join(unsupported)}; set sp.attention=flex_attention (on a GPU)"
                )
            out = core.sdpa(query, key, value, whole, window=window, scaling=scaling, dropout=dropout)
            return out, None
        if attention == "flex_attention":
            if device.type == "cpu" and torch.is_grad_enabled() and query.requires_grad:
                raise ValueError("sp.attention=flex_attention has no backward on CPU; set sp.attention=sdpa")
            if kwargs.get("s_aux") is not None:
                raise ValueError("attention sinks (s_aux) are not split over ranks; set sp.size=1")
            mask = plan.once(("flex", window, device), lambda: core.flex_mask(whole, window, device))
            return original(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
        # flash attention finds documents in the position_ids of a batch of one row; padding is a document of its own
        if kwargs.get("s_aux") is not None:
            raise ValueError("attention sinks (s_aux) are not split over ranks; set sp.size=1")
        kwargs["position_ids"] = plan.once(("flash", device), lambda: whole.positions(device).flatten()[None])
        batch = query.shape[0]
        if batch > 1:
            query, key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))
        out, weights = original(
            module, query, key, value, None, scaling=scaling, dropout=dropout, sliding_window=sliding_window, **kwargs
        )
        return out.unflatten(1, (batch, -1))[0] if batch > 1 else out, weights

    return run


class _Patched:
    """What takes the place of the attention function, and the hooks that tell it of each forward of the model."""

    def __init__(
        self,
        handle: Ulysses,
        model: PreTrainedModel,
        original: Callable[..., Any],
        exchanged: UlyssesSPAttentionHF,
        micro_batch_size: int | None,
    ):
        self.handle, self.model, self.original, self.exchanged = handle, model, original, exchanged
        self.micro_batch_size = micro_batch_size
        self.group = exchanged.process_group
        self.rank = torch.distributed.get_rank(self.group)
        self.layers = model.config.get_text_config().num_hidden_layers
        self.modules = {id(m) for m in model.modules()}
        # activation checkpointing calls the attention again in backward, after other forwards: the position_ids that
        # it passes on say which forward it repeats
        self.plans = WeakTensorKeyDictionary()
        self.latest: _Plan | None = None
        self.forward: _Plan | None = None  # of the forward under way; None under bypass
        self.inside = False  # a forward of the model is under way
        self.calls_before = 0

    # -- the attention function

    def attention(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        if id(module) not in self.modules:  # another model of this process
            return self.original(module, query, key, value, attention_mask, *args, **kwargs)
        self.handle.attention_calls += 1
        plan = self._plan(module, kwargs.get("position_ids"))
        if plan is None:
            return self.original(module, query, key, value, attention_mask, *args, **kwargs)
        self._check_call(module, query, key, kwargs)
        if kwargs.get("sliding_window") is None:
            kwargs["sliding_window"] = _window_of(module)
        groups = getattr(module, "num_key_value_groups", None)
        self.exchanged.disable_in_eval = False  # decided for the whole model, in the hook
        try:
            return self.exchanged(module, query, key, value, None, *args, plan=plan, **kwargs)
        finally:
            if groups is not None:
                module.num_key_value_groups = groups

    def _plan(self, module: torch.nn.Module, position_ids: Tensor | None) -> _Plan | None:
        """Of the forward that this call belongs to; None: bypass."""
        if self.inside:
            return self.forward
        if not module.training and self.handle.disable_in_eval:
            return None
        plan = self.plans.get(position_ids) if position_ids is not None else None
        plan = self.latest if plan is None else plan
        if plan is None:
            raise RuntimeError(
                "attention was called outside a forward of the registered model; call the model, not its parts"
            )
        return plan

    def _check_call(self, module: torch.nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> None:
        if query.shape[2] != key.shape[2]:
            raise ValueError(
                "a KV cache under sequence parallelism; generate in eval mode with eval.mode=bypass (disable_in_eval)"
            )
        causal = kwargs.get("is_causal")
        if not (getattr(module, "is_causal", True) if causal is None else causal):
            raise ValueError(f"{type(module).__name__} is not causal; set sp.size=1")

    # -- the mask function

    def mask(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """transformers' masks are of the slice, n^2, and never used here."""

        def make(*args: Any, **kwargs: Any) -> Any:
            if not self.inside or self.forward is None:
                return original(*args, **kwargs)
            if kwargs.get("use_vmap") or kwargs.get("allow_is_bidirectional_skip"):
                raise ValueError(
                    f"{type(self.model).__name__} adds to the causal mask, which Ulysses does not shard; set sp.size=1"
                )
            return None

        return make

    # -- around a forward

    @contextmanager
    def hooks(self) -> Iterator[None]:
        before = self.model.register_forward_pre_hook(self._before, with_kwargs=True)
        after = self.model.register_forward_hook(self._after, always_call=True)
        generate: Callable[..., Any] = self.model.generate  # type: ignore[assignment]

        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self.model.training or not self.handle.disable_in_eval:
                raise RuntimeError(
                    "generate() under sequence parallelism: every rank holds the whole prompt, not a slice; "
                    "call model.eval() and set eval.mode=bypass (disable_in_eval)"
                )
            return generate(*args, **kwargs)

        self.model.generate = guarded  # type: ignore[assignment]
        try:
            yield
        finally:
            del self.model.generate
            before.remove()
            after.remove()

    def _before(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        announced, self.handle._announced = self.handle._announced, None
        self.inside, self.calls_before, self.forward = True, self.handle.attention_calls, None
        if not model.training and self.handle.disable_in_eval:
            return args, kwargs
        try:
            args, kwargs = self._prepare(args, dict(kwargs), announced)
        except BaseException:
            self.inside = False  # torch calls no forward hook after an error in a pre-hook
            raise
        return args, kwargs

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any], announced: _Announced | None) -> tuple[Any, Any]:
        names = [
            p.name
            for p in inspect.signature(self.model.forward).parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        kwargs |= dict(zip(names, args, strict=False))
        args = args[len(names) :]
        tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        tokens = args[0] if tokens is None and args else tokens
        if tokens is None:
            raise ValueError("the model got neither input_ids nor inputs_embeds")
        shape = (tokens.shape[0], tokens.shape[1])
        positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        device = tokens.device
        if announced is not None:
            whole = announced.documents
            if (whole.batch, whole.seq_len) != (shape[0], shape[1] * self.handle.sp):
                raise ValueError(
                    f"begin() told of {whole.batch} x {whole.seq_len} tokens, this rank got {shape[0]} x {shape[1]}; "
                    f"expected {whole.batch} x {whole.seq_len // self.handle.sp} at sp.size={self.handle.sp}"
                )
            if mask is not None and not announced.masked:
                raise ValueError(
                    "begin() got no attention_mask, the forward did; give begin() the whole sequences' mask"
                )
            check_batch(shape[0], self.micro_batch_size)
        elif isinstance(tokens, torch._subclasses.FakeTensor):
            whole = Documents(shape[0], shape[1] * self.handle.sp)  # planning: shapes without values
        else:
            whole = agree(self.group, shape, positions, mask, device, self.micro_batch_size)
        if positions is None:
            mine = slice(self.rank * shape[1], (self.rank + 1) * shape[1])
            if announced is not None:
                positions = announced.position_ids[:, mine].to(device)
            else:
                positions = torch.arange(mine.start, mine.stop, device=device).expand(shape)
        self.forward = self.latest = _Plan(whole)
        positions = positions.view_as(positions)  # a tensor of its own for every forward
        self.plans[positions] = self.forward
        return args, kwargs | {"position_ids": positions, "attention_mask": None}

    def _after(self, model: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        active, self.inside, self.forward = self.forward is not None, False, None
        calls = self.handle.attention_calls - self.calls_before
        if active and output is not None and calls < self.layers:
            raise RuntimeError(
                f"{type(model).__name__} has {self.layers} layers and called the patched attention {calls} times: its "
                "slices do not see each other; set sp.size=1, or a model whose every layer uses ALL_ATTENTION_FUNCTIONS"
            )


def _window_of(module: torch.nn.Module) -> int | None:
    """The sliding window of a layer whose attention does not pass it on."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    types = getattr(config, "layer_types", None)
    if types and index is not None and types[index] == "sliding_attention":
        return config.sliding_window  # type: ignore[union-attr]
    return None
