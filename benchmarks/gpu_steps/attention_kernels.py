"""The attention kernels that there are, each as a function of whole sequences: as a job would call it where it does."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ulysses_exp.model.attention import core
from ulysses_exp.model.attention.documents import Documents

#: [batch, heads, tokens, dim] each, the documents, a window -> [batch, tokens, heads, dim]
Attend = Callable[[Tensor, Tensor, Tensor, Documents, int | None], Tensor]

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
NAMES = ("sdpa", *(f"sdpa, {name}" for name in BACKENDS), "flash_attention_2", "flash_attention_3", "varlen", "flex")


class Missing(Exception):
    """The kernel is not installed; `str()` says what is."""


def kernel(name: str) -> Attend:
    """Raises Missing."""
    if name == "sdpa":
        return core_sdpa
    if name.startswith("sdpa, "):
        return _by(BACKENDS[name.removeprefix("sdpa, ")])
    if name == "varlen":
        return _varlen()
    return _of_transformers("flex_attention" if name == "flex" else name)


def core_sdpa(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> Tensor:
    """What `sp.attention=sdpa` runs."""
    return core.torchs(q, k, v, core.Plan(documents), core.Scores(window=window))


def _by(backend: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> Tensor:
        with sdpa_kernel(backend):
            return core_sdpa(q, k, v, documents, window)

    return attend


def _of_transformers(name: str) -> Attend:
    """What `sp.attention=<name>` runs between the exchanges."""
    from transformers import utils
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name.startswith("flash_attention"):
        there = getattr(utils, f"is_flash_attn_{name[-1]}_available", lambda: False)
        if not there():
            raise Missing("not installed")
        from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

        lazy_import_flash_attention(name)
    module = torch.nn.Module()
    module.is_causal, module.training = True, True  # type: ignore[assignment]
    module.config = SimpleNamespace(_attn_implementation=name)  # type: ignore[assignment]
    run = core.around(name, ALL_ATTENTION_FUNCTIONS[name])
    plans: dict[tuple[Documents, str], core.Plan] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> Tensor:
        plan = plans.setdefault((documents, str(q.device)), core.Plan(documents))
        out, _ = run(module, q, k, v, None, plan=plan, sliding_window=window)
        return out

    return attend


def _varlen() -> Attend:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise Missing(f"not in torch {torch.__version__}") from None
    parameters = inspect.signature(varlen_attn).parameters
    if "window_size" not in parameters:
        raise Missing(f"without windows in torch {torch.__version__}")

    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> Tensor:
        batch, _, tokens, _ = q.shape
        rows = documents.rows or ((SimpleNamespace(stop=tokens),),) * batch
        ends = [0, *(b * tokens + segment.stop for b, row in enumerate(rows) for segment in row)]
        longest = max(stop - start for start, stop in itertools.pairwise(ends))
        starts = torch.tensor(ends, dtype=torch.int32, device=q.device)
        more: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0)}
        if "enable_gqa" in parameters and k.shape[1] != q.shape[1]:
            more["enable_gqa"] = True
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
        return varlen_attn(*flat, starts, starts, longest, longest, **more).unflatten(0, (batch, tokens))

    return attend


@contextmanager
def no_compiler_limit() -> Iterator[None]:
    """flex_attention is compiled anew for each shape; torch gives up on a function after eight."""
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=64):
        yield
