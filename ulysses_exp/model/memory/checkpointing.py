"""Activation checkpointing: a decoder layer keeps its input alone and runs again in the backward pass."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def checkpoint_layers(model: PreTrainedModel, *, reentrant: bool, offload: bool) -> None:
    """Recomputes every decoder layer of `model` in the backward pass.

    Args:
        reentrant: torch's older variant of `torch.utils.checkpoint`, which runs a backward within the backward.
        offload: keep the layers' inputs in pinned host memory: layers x tokens x hidden numbers a rank. The copies run
            on the compute stream. On CPU they are in host memory already and nothing changes (transformers 5.23.0
            would ask for pinned memory that a machine without accelerator does not have: docs/findings.md).
    """
    how = {"use_reentrant": reentrant, "preserve_rng_state": False}  # nothing draws: dropout is refused
    model.activation_checkpointing_enable(how, offload=offload and torch.accelerator.is_available())
