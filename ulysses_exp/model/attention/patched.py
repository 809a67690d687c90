"""What takes the place of transformers' attention function, and the hooks that tell it of each forward of the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from ulysses_exp.model.attention.agreement import agree, check_batch
from ulysses_exp.model.attention.core import Plan
from ulysses_exp.model.attention.documents import Documents
from ulysses_exp.model.attention.handle import Announced, Ulysses


class Patched:
    """The attention function of one registered model.

    Args:
        original: the function it replaces, called untouched under bypass and for other models of the process.
        exchanged: the attention over slices, upstream's or the fused one.
        micro_batch_size: the only batch size that `exchanged` takes; None: any.
    """

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
        self.latest: Plan | None = None
        self.forward: Plan | None = None  # of the forward under way; None under bypass
        self.inside = False  # a forward of the model is under way
        self.calls_before = 0

    # -- the attention function

    @torch.compiler.disable  # collectives and the bookkeeping of forwards stay outside a compiled layer
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

    def _plan(self, module: torch.nn.Module, position_ids: Tensor | None) -> Plan | None:
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

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any], announced: Announced | None) -> tuple[Any, Any]:
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
        elif isinstance(tokens, FakeTensor):
            whole = Documents(shape[0], shape[1] * self.handle.sp)  # planning: shapes without values
        else:
            whole = agree(self.group, shape, positions, mask, device, self.micro_batch_size)
        if positions is None:
            mine = slice(self.rank * shape[1], (self.rank + 1) * shape[1])
            if announced is not None:
                positions = announced.position_ids[:, mine].to(device)
            else:
                positions = torch.arange(mine.start, mine.stop, device=device).expand(shape)
        self.forward = self.latest = Plan(whole)
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
