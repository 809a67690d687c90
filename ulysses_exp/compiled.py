"""torch.compile of what a decoder layer does around its attention."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_layers(model: PreTrainedModel, cache: Path) -> None:
    """Compiles the forward of every decoder layer of `model` in place, on its first call and for its first shape.

    The exchange stays outside: `torch.compiler.disable` on the patched attention splits a layer's graph in two, what
    comes before attention (norm, projections, rotary embedding) and what comes after (projection, norm, MLP).
    All layers share the two graphs, for their weights are inputs. Numbers change by rounding only.

    Args:
        cache: folder for the generated code, which torch would put into the machine's temporary folder.
    """
    import torch._inductor.config  # not with the module: it takes a second, which other jobs need not pay

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    torch._inductor.config.cpp_cache_precompile_headers = False  # they would go to the temporary folder all the same
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool of compilers a rank would outnumber the cores
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=False)
