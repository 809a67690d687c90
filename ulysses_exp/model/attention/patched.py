"""What takes the place of transformers' attention function, and the hooks that tell it of each forward of the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import ProcessGroup
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ulysses_exp.model.attention import llama4
from ulysses_exp.model.attention.agreement import agree, check_batch
from ulysses_exp.model.attention.core import Core, Plan, Way
from ulysses_exp.model.attention.documents import Documents, documents
from ulysses_exp.model.attention.handle import Announced, Ulysses
from ulysses_exp.model.attention.own_name import transformers_own
from ulysses_exp.model.mixers.repeats import Repeats

_CACHES = ("past_key_values", "cache_params")


class Patched:
    """The attention function of one registered model.

    A forward of the model runs in one of three ways: over slices, with collectives; over whole sequences by the core
    attention, at sp 1 and under bypass; or as transformers does it, with its own masks, where a cache or a mask of the
    caller's asks for more than documents can say.

    Args:
        implementation: transformers' name of the attention that the model was built with.
        core: the attention over whole sequences; None: attention is not asked of here.
        attentions: attention calls that a forward makes at least; None: one a layer.
        mixers: the modules that mix tokens otherwise and ask `mixer_way`.
    """

    def __init__(
        self,
        handle: Ulysses,
        model: PreTrainedModel,
        implementation: str,
        core: Core | None,
        attentions: int | None = None,
        mixers: Sequence[torch.nn.Module] = (),
    ):
        self.handle, self.model, self.implementation, self.core = handle, model, implementation, core
        self.attentions = model.config.get_text_config().num_hidden_layers if attentions is None else attentions
        self.mixers = len(mixers)
        self.mixed: set[int] = set()  # mixers that the forward under way has called
        self.repeats = Repeats(model)
        self.modules = {id(m) for m in model.modules()}
        self.exchanged: Callable[..., Any] | None = None
        self.micro_batch_size: int | None = None
        self.group: ProcessGroup | None = None
        self.rank = 0
        # who recomputes by other means than `repeats` follows calls the attention again in backward, after other
        # forwards: the position_ids that it passes on say which forward that is
        self.plans = WeakTensorKeyDictionary()
        self.latest: Way | None = None
        self.forward: Way | None = None  # of the forward under way
        self.generating = False
        self.calls_before = 0

    def share(self, exchanged: UlyssesSPAttentionHF, micro_batch_size: int | None) -> None:
        """From now on over slices.

        Args:
            exchanged: the attention over slices, upstream's or the fused one.
            micro_batch_size: the only batch size that `exchanged` takes; None: any.
        """
        self.exchanged, self.micro_batch_size = exchanged, micro_batch_size
        exchanged.disable_in_eval = False  # decided for the whole model, in the hook
        self.group = exchanged.process_group
        self.rank = torch.distributed.get_rank(self.group)

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
        way = self._way(module, kwargs.get("position_ids"))
        if way is None or attention_mask is not None or not self._causal(module, kwargs):
            if (way is not None and way.shared) or (kwargs.get("position_bias") is not None and not _plain(way)):
                self._refuse(module)
            original = transformers_own(self.implementation, module)
            return original(module, query, key, value, attention_mask, *args, **kwargs)
        self._check_call(query, key)
        if kwargs.get("sliding_window") is None:
            kwargs["sliding_window"] = _window_of(module)
        if kwargs.get("sinks") is not None:  # Inkling's name of them
            kwargs["s_aux"] = kwargs.pop("sinks")
        assert way.plan is not None
        if llama4.scales_queries(module) and (way.shared or not way.plan.documents.plain):
            query = llama4.rescaled(module, query, self._places(way, query.shape[2], query.device))
        plan = way.plan.chunked(llama4.chunk(module))
        if not way.shared:
            assert self.core is not None
            return self.core(module, query, key, value, None, *args, plan=plan, **kwargs)
        assert self.exchanged is not None
        groups = getattr(module, "num_key_value_groups", None)
        try:
            out, weights = self.exchanged(module, query, key, value, None, *args, plan=plan, **kwargs)
            return out.unflatten(2, (query.shape[1], -1)), weights  # GPT-2 for one counts dimensions
        finally:
            if groups is not None:
                module.num_key_value_groups = groups

    def _way(self, module: torch.nn.Module, position_ids: Tensor | None) -> Way | None:
        """Of the forward that this call belongs to; None: as transformers does it."""
        if id(module) not in self.modules:  # a model made from this one's configuration
            return None
        self.handle.attention_calls += 1
        way = self.forward
        if way is None:  # a backward recomputes a forward
            way = self.repeats.way
            way = self.plans.get(position_ids) if way is None and position_ids is not None else way
            way = self.latest if way is None else way
            if way is None and (self.exchanged is None or (self.handle.disable_in_eval and not module.training)):
                return None  # a part of the model, called by itself
            if way is None:
                raise RuntimeError(
                    "attention was called outside a forward of the registered model; call the model, not its parts"
                )
        elif position_ids is not None and position_ids not in self.plans:
            self.plans[position_ids] = way
        return way if way.plan is not None else None

    def mixer_way(self, mixer: torch.nn.Module) -> Way | None:
        """Of the forward that a call of `mixer` belongs to; None: as transformers does it."""
        self.mixed.add(id(mixer))
        way = self.repeats.way if self.forward is None else self.forward
        if way is None and torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(mixer).__name__} was called outside a forward of the registered model, or recomputed by other "
                "means than gradient_checkpointing_enable; call the model, not its parts"
            )
        return way

    def _places(self, way: Way, tokens: int, device: torch.device) -> Tensor:
        """[batch, tokens]: where in its document each token at hand is."""
        plan = way.plan
        assert plan is not None
        places: Tensor = plan.once(("places", device), lambda: plan.documents.positions(device))
        return places[:, self.rank * tokens : (self.rank + 1) * tokens] if way.shared else places

    def _causal(self, module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
        causal = kwargs.get("is_causal")
        return bool(getattr(module, "is_causal", True) if causal is None else causal) and (
            kwargs.get("position_bias") is None
        )

    def _refuse(self, module: torch.nn.Module) -> None:
        raise ValueError(
            f"{type(module).__name__} is not causal, or adds to its scores or mask what Ulysses does not shard; "
            "set sp.size=1"
        )

    def _check_call(self, query: Tensor, key: Tensor) -> None:
        if query.shape[2] != key.shape[2]:
            raise ValueError(
                "a KV cache under sequence parallelism; generate in eval mode with eval.mode=bypass (disable_in_eval)"
            )

    # -- the mask function

    def mask(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' masks have n^2 entries, over slices of the wrong n; none where documents say as much."""
        way = self.forward
        if way is None:  # a part of the model is called by itself, so no forward is left to be repeated
            self.latest = None
        more = kwargs.get("use_vmap") or kwargs.get("allow_is_bidirectional_skip")
        if way is not None and way.plan is not None:
            if not more:
                return None
            if way.shared:
                raise ValueError(
                    f"{type(self.model).__name__} adds to the causal mask, which Ulysses does not shard; set sp.size=1"
                )
        return ALL_MASK_ATTENTION_FUNCTIONS[self.implementation](*args, **kwargs)

    # -- around a forward

    @contextmanager
    def hooks(self) -> Iterator[None]:
        before = self.model.register_forward_pre_hook(self._before, with_kwargs=True)
        after = self.model.register_forward_hook(self._after, always_call=True)
        generate: Callable[..., Any] = self.model.generate  # type: ignore[assignment]

        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self.exchanged is not None and (self.model.training or not self.handle.disable_in_eval):
                raise RuntimeError(
                    "generate() under sequence parallelism: every rank holds the whole prompt, not a slice; "
                    "call model.eval() and set eval.mode=bypass (disable_in_eval)"
                )
            self.generating = True
            try:
                return generate(*args, **kwargs)
            finally:
                self.generating = False

        self.model.generate = guarded  # type: ignore[assignment]
        try:
            yield
        finally:
            del self.model.generate
            before.remove()
            after.remove()
            self.repeats.forget()

    def _before(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        announced, self.handle._announced = self.handle._announced, None
        self.calls_before, self.forward = self.handle.attention_calls, None
        kwargs = dict(kwargs)
        names = [
            p.name
            for p in inspect.signature(self.model.forward).parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        kwargs |= dict(zip(names, args, strict=False))
        args = args[len(names) :]
        if self.exchanged is not None and (model.training or not self.handle.disable_in_eval):
            self.forward, kwargs = self._slices(args, kwargs, announced)
        else:
            self.forward, kwargs = self._whole(kwargs, announced)
        self.latest = self.forward
        self.repeats.follow(self.forward)
        if self.mixers:
            self.mixed = set()
            if not self.forward.untouched:
                kwargs = _without_cache(kwargs)
        return args, kwargs

    def _whole(self, kwargs: dict[str, Any], announced: Announced | None) -> tuple[Way, dict[str, Any]]:
        """Every rank on its own: whole sequences, of any shape."""
        tokens = _tokens(kwargs)
        positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        cache = next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)
        said = [x for x in (positions, mask) if x is not None]
        if (
            self.generating
            or tokens is None
            or (cache is not None and (self.mixers or cache.get_seq_length() > 0))
            or any(not isinstance(x, Tensor) or x.dim() != 2 or x.shape[1] != tokens.shape[1] for x in said)
        ):
            return Way(None), kwargs
        batch, length = tokens.shape[:2]
        if announced is not None and (announced.documents.batch, announced.documents.seq_len) == (batch, length):
            whole = announced.documents
        elif not said or isinstance(tokens, FakeTensor):
            whole = Documents(batch, length)
        else:
            row = torch.arange(length) if positions is None else positions.cpu()
            whole = documents(row.expand(batch, -1), None if mask is None else mask.cpu())
        if positions is not None:
            kwargs["position_ids"] = positions.view_as(positions)  # a tensor of its own for every forward
        return Way(Plan(whole)), kwargs

    def _slices(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], announced: Announced | None
    ) -> tuple[Way, dict[str, Any]]:
        tokens = _tokens(kwargs)
        tokens = args[0] if tokens is None and args else tokens
        if tokens is None:
            raise ValueError("the model got neither input_ids nor inputs_embeds")
        shape = (tokens.shape[0], tokens.shape[1])
        positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        device = tokens.device
        if announced is not None:
            whole = announced.documents
            if whole.seq_len % self.handle.sp:
                raise ValueError(
                    f"{whole.seq_len} tokens do not divide over sp.size={self.handle.sp}; set train.seq_len to a "
                    "multiple"
                )
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
            assert self.group is not None
            whole = agree(self.group, shape, positions, mask, device, self.micro_batch_size)
        if positions is None:
            mine = slice(self.rank * shape[1], (self.rank + 1) * shape[1])
            if announced is not None:
                positions = announced.position_ids[:, mine].to(device)
            else:
                positions = torch.arange(mine.start, mine.stop, device=device).expand(shape)
        positions = positions.view_as(positions)  # a tensor of its own for every forward
        return Way(Plan(whole), self.group), kwargs | {"position_ids": positions, "attention_mask": None}

    def _after(self, model: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        way, self.forward = self.forward, None
        calls = self.handle.attention_calls - self.calls_before
        if way is None or way.plan is None or output is None:
            return
        for expected, found, what in (
            (self.attentions, calls, "called the patched attention"),
            (self.mixers, len(self.mixed), "of them called what mixes tokens"),
        ):
            if found < expected:
                raise RuntimeError(
                    f"{type(model).__name__} has {expected} layers and {what} {found} times: its tokens do not see "
                    "each other as they should; set sp.size=1 and sp.attention=transformers, or a model whose every "
                    "layer uses ALL_ATTENTION_FUNCTIONS"
                )


def _without_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError where a cache is asked for."""
    if kwargs.get("use_cache") or any(kwargs.get(name) is not None for name in _CACHES):
        raise ValueError("a KV cache in packed documents or under sequence parallelism; set use_cache=False")
    return kwargs | {"use_cache": False}


def _tokens(kwargs: dict[str, Any]) -> Tensor | None:
    """[batch, tokens] or [batch, tokens, hidden]: what the forward is given to read."""
    ids: Tensor | None = kwargs.get("input_ids")
    return kwargs.get("inputs_embeds") if ids is None else ids


def _plain(way: Way | None) -> bool:
    return way is None or way.plan is None or way.plan.documents.plain


def _window_of(module: torch.nn.Module) -> int | None:
    """The sliding window of a layer whose attention does not pass it on."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    types = getattr(config, "layer_types", None)
    if types and index is not None and types[index] == "sliding_attention":
        return config.sliding_window  # type: ignore[union-attr]
    return None
