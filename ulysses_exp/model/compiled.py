"""torch.compile of what a decoder layer does around its attention."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_layers(model: PreTrainedModel, cache: Path) -> None:
    """Compiles the forward of every decoder layer of `model` in place, on its first call and for its first shape.

    The exchange stays outside: `torch.compiler.disable` on the patched attention splits a layer's graph in two, what
    comes before attention (norm, projections, rotary embedding) and what comes after (projection, norm, MLP).
    All layers share the two graphs, for their weights are inputs. Numbers change by rounding only.

    Args:
        cache: folder for the generated code, which torch would put into the machine's temporary folder. Where the
            environment names one (TORCHINDUCTOR_CACHE_DIR), that: what it holds already is not compiled again.
    """
    import torch._inductor.config  # not with the module: it takes a second, which other jobs need not pay
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) == default_cache_dir():  # set by imports of torch
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    turn = FileLock(Path(cache_dir()) / "turn.lock")
    torch._inductor.config.cpp_cache_precompile_headers = False  # they would go to the temporary folder all the same
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool of compilers a rank would outnumber the cores
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(backend=_in_turn(turn), dynamic=False)


def _in_turn(turn: FileLock) -> Callable[[torch.fx.GraphModule, list[Any]], Any]:
    """Inductor, on one rank at a time: the ranks' graphs are the same, and those after the first find them compiled."""
    import torch._functorch.config
    from torch._inductor.compile_fx import compile_fx

    torch._functorch.config.force_non_lazy_backward_lowering = True  # in the same turn

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        with turn:
            return compile_fx(graph, inputs)

    return compile_graph
