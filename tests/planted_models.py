"""Models with a fault that only shows in slices of sequences, and what is found of them.

python tests/planted_models.py       a line of JSON: the result of `benchmarks/models_trial.py` for each
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ulysses_exp.model.tiny import built, shrunk

ROOT = Path(__file__).resolve().parents[1]
LAYERS = 2


class Shifted(LlamaForCausalLM):
    """Every token gets something of the one before it, in the MLP of its last layer: the attention is untouched."""

    def __init__(self, config: Any):
        super().__init__(config)
        last = self.model.layers[-1].mlp

        def shifted(x: Tensor, own: Any = last.forward) -> Tensor:
            return own(x + torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1] / 8)

        last.forward = shifted


class Counting(LlamaForCausalLM):
    """It has positions of its own in its embeddings, counted from the first token that it gets."""

    def __init__(self, config: Any):
        super().__init__(config)
        embedding = self.model.embed_tokens

        def counted(ids: Tensor, own: Any = embedding.forward) -> Tensor:
            return own(ids) + torch.arange(ids.shape[1])[None, :, None] / 100

        embedding.forward = counted


def model(kind: type[LlamaForCausalLM], attention: str | None = None) -> LlamaForCausalLM:
    return built(shrunk(LlamaConfig()), attention, kind=kind)  # type: ignore[return-value]


if __name__ == "__main__":
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    import models_trial

    from ulysses_exp.rank.upstream import without_operators_of_its_own

    torch.set_num_threads(1)
    without_operators_of_its_own()
    kinds = (LlamaForCausalLM, Shifted, Counting)
    print(json.dumps({kind.__name__: models_trial.tried_model(model(kind), 60, sizes=(2,)) for kind in kinds}))
