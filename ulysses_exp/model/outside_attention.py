"""Whether a model can be right with its sequences cut into slices, tried on a tiny copy of it.

Ulysses gives each rank a slice, and lets the tokens of different slices see each other in the attention function, and
in the convolutions and scans of `model.mixers`, alone. So attention is replaced by a function that gives each token its
own value, mixers take each token for a document, and the model is run on a whole sequence and on slices of it: a model
whose tokens meet nowhere else, and which takes positions from `position_ids`, gives the same. Whoever takes the name of
an attention function and never calls it, mixes tokens in a convolution or a scan that is not known, counts positions
itself, or looks for the longest position of a batch, does not.

    python -m ulysses_exp.model.outside_attention

answers `experiment.model_check`, as `model.reader` does, but with torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ulysses_exp.config import tried
from ulysses_exp.model import reader
from ulysses_exp.model.attention.core import Plan, Way
from ulysses_exp.model.attention.documents import Documents, Segment
from ulysses_exp.model.mixers import binding
from ulysses_exp.model.tiny import built, shrunk

_NAME = "each_token_alone"  # no other name in it, such as sdpa: transformers looks for these
_TOKENS, _SLICES, _CHANGED, _FIRST = (
    48,
    4,
    20,
    5,
)  # the token that is changed; the smallest id that means nothing special
_SEEN_TO = ("llama4_text",)  # types that count positions themselves, which `model.attention` puts right
_TOLERANCE = 1e-4  # of the largest logit; what fp32 rounds is some 1e-7, what a token adds to others above 1e-3


@dataclass
class Calls:
    """What reached the attention function.

    Attributes:
        name: of the function, for a model to be built with.
        modules: the attention modules that called it.
        arguments: names of what they passed besides q, k, v and a mask, where it was not None.
        widths: pairs of q's and v's width.
    """

    name: str = _NAME
    modules: set[int] = field(default_factory=set)
    arguments: set[str] = field(default_factory=set)
    widths: set[tuple[int, int]] = field(default_factory=set)


class _OtherKeys(Exception):
    """A layer attends to something else than the tokens that it computes."""


def mixes_outside_attention(model: PretrainedConfig | PreTrainedModel) -> str | None:
    """Why slices of a sequence would not give what the whole gives; None where nothing was found.

    What no tiny copy can be made of is not judged. Layers that `model.mixers` serves are quiet as attention is: each
    token is a document of its own to them. Answers are kept in this
    process, by configuration and class; what else they depend on, the library's version, stays the same in it.

    Args:
        model: a configuration of transformers; or a model, whose class may be of anybody's.
    """
    given = isinstance(model, PretrainedConfig)
    return _judged(_Key(model) if given else _Key(model.config, type(model)))  # type: ignore[arg-type]


def why_not_in_slices(model: PreTrainedModel) -> str | None:
    """As `mixes_outside_attention`, of a model that was not tried with this transformers (`config.tried`), or whose
    code is not transformers' own. A planned one, whose tensors have no numbers, is not judged."""
    of_transformers = type(model).__module__.startswith("transformers.")
    if of_transformers and tried.right(model.config.model_type, model.config.get_text_config().to_dict()):
        return None
    if any(isinstance(p, FakeTensor) or p.is_meta for p in model.parameters()):
        return None
    return mixes_outside_attention(model)


class _Key:
    """A configuration and the class of its model, equal to another with the same settings."""

    def __init__(self, config: PretrainedConfig, kind: type[PreTrainedModel] | None = None):
        self.config, self.kind = config, kind
        self._key = (type(config), config.to_json_string(), kind)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._key == other._key


@functools.cache
def _judged(of: _Key) -> str | None:
    random = torch.get_rng_state()
    try:
        with each_token_alone() as calls:
            try:
                model = built(shrunk(of.config), _NAME, kind=of.kind)
            except KeyError as error:  # a table of its own attention classes by name
                return _own_code(of.config) if _NAME in str(error) else None
            except Exception:
                return None
            return _why_slices_differ(model, calls)
    finally:
        torch.set_rng_state(random)


def _why_slices_differ(model: PreTrainedModel, calls: Calls) -> str | None:
    kind = model.config.model_type
    ids = torch.randint(_FIRST, 90, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, _CHANGED] = _FIRST + (changed[0, _CHANGED] - _FIRST + 7) % 80
    width = _TOKENS // _SLICES
    try:
        whole, other = logits(model, ids, 0), logits(model, changed, 0)
        slices = [logits(model, ids[:, start : start + width], start) for start in range(0, _TOKENS, width)]
    except _OtherKeys:
        return f"{kind} attends to other keys than its tokens"
    except Exception:
        return _why_not_run(model.config, type(model), ids)
    moved = _differ(whole, other)
    moved[_CHANGED] = False
    if moved.any():
        return f"{kind} mixes tokens outside of attention" if calls.modules else _own_code(model.config)
    if kind not in _SEEN_TO and _differ(whole, torch.cat(slices)).any():
        return f"{kind} takes positions from the place in a slice, or from the longest in it, not from position_ids"
    return None


def _own_code(config: PretrainedConfig) -> str:
    return f"{config.model_type} keeps its own attention code and never calls the attention function that it is given"


def _why_not_run(config: PretrainedConfig, kind: type[PreTrainedModel], ids: Tensor) -> str | None:
    """Of a tiny model that fails without masks: that it does, if it runs with them; else it is not judged."""
    try:
        logits(built(config, kind=kind), ids, 0)
    except Exception:
        return None
    return f"{config.model_type} reads attention masks outside of the attention function"


def logits(model: PreTrainedModel, ids: Tensor, first: int) -> Tensor:
    """[tokens, vocabulary] of a slice that begins at position `first`, each token a document to `model.mixers`."""
    positions = torch.arange(first, first + ids.shape[1])[None]
    documents = tuple(Segment(place, place + 1) for place in range(ids.shape[1]))
    way = Way(Plan(Documents(1, ids.shape[1], (documents,))))
    with torch.no_grad(), binding.bound(model, lambda _: way):
        try:
            found: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        except (TypeError, ValueError) as error:
            if "position_ids" not in str(error):
                raise
            found = model(input_ids=ids, use_cache=False).logits[0]
    return found


def _differ(one: Tensor, other: Tensor) -> Tensor:
    """Of each token, whether its logits do."""
    return (one - other).abs().amax(-1) > _TOLERANCE * one.abs().max()


@contextmanager
def each_token_alone() -> Iterator[Calls]:
    """Registers an attention function that gives each token a function of its own q, k and v, and no mask."""
    calls = Calls()

    def alone(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        calls.modules.add(id(module))
        calls.arguments.update(name for name, given in kwargs.items() if given is not None)
        calls.widths.add((query.shape[-1], value.shape[-1]))
        if query.shape[2] != key.shape[2]:
            raise _OtherKeys
        heads = query.shape[1] // key.shape[1]
        # rotated queries and keys, each by itself: their product would not show by how much
        own = torch.tanh(query[..., ::2].sum(-1)) + torch.tanh(key[..., ::2].sum(-1)).repeat_interleave(heads, 1)
        out = value.repeat_interleave(heads, 1) * (1 + own[..., None] / 4)
        return out.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS[_NAME] = alone
    ALL_MASK_ATTENTION_FUNCTIONS[_NAME] = lambda *args, **kwargs: None
    try:
        yield calls
    finally:
        del ALL_ATTENTION_FUNCTIONS[_NAME], ALL_MASK_ATTENTION_FUNCTIONS[_NAME]


def read(path: str | None, given: dict[str, Any]) -> dict[str, str | None]:
    """`why` of the model that `reader.read_model` reads."""
    return {"why": mixes_outside_attention(reader.configuration(path, given))}


if __name__ == "__main__":
    reader.answer({"slices": read})
