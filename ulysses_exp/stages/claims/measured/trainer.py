"""transformers' Trainer evaluating, with the data distributed as it sees fit."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.utils.data import Dataset

from ulysses_exp.stages.claims.measured.reference import Reference
from ulysses_exp.stages.claims.measured.subject import Subject


def trainers_logits(subject: Subject, reference: Reference) -> dict[str, Any]:
    """`Trainer.predict` over padded and unpadded sequences that no number of ranks divides.

    Returns:
        `samples`, of which `seen` came back, and the largest differences of `trainer`'s logits at real tokens, of the
        largest logit, by padding.
    """
    samples, expected = reference.samples, reference.sample_logits
    subject.engine.eval()
    with tempfile.TemporaryDirectory() as folder, _trainers() as trainers:
        arguments = trainers.TrainingArguments(
            output_dir=folder, per_device_eval_batch_size=2, report_to=[], disable_tqdm=True,
            remove_unused_columns=False, label_names=["nothing"], use_cpu=subject.device.type == "cpu",
        )  # fmt: skip
        trainer = trainers.Trainer(model=subject.model, args=arguments)
        with torch.no_grad():
            predicted = np.asarray(trainer.predict(_Samples(samples)).predictions)
    found: dict[str, float] = {}
    for index, (batch, right) in enumerate(zip(samples, expected, strict=True)):
        got = torch.from_numpy(predicted[index])[None].float()
        off = float((batch.real(got) - batch.real(right)).abs().max() / right.abs().max())
        found[batch.name] = max(found.get(batch.name, 0.0), off if off == off else float("inf"))
    return {"samples": len(samples), "seen": len(predicted), "trainer": found}


@contextmanager
def _trainers() -> Iterator[Any]:
    """The module of Trainer, as it is where `datasets` is not installed: that would bring pandas, for isinstance alone,
    a second and a half on each rank."""
    with (
        patch("transformers.utils.is_datasets_available", lambda: False),
        patch("accelerate.data_loader.is_datasets_available", lambda: False),
    ):
        yield import_module("transformers.trainer")


class _Samples(Dataset):  # type: ignore[type-arg]
    """One row each, without position_ids, as collators make them."""

    def __init__(self, samples: Any):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.samples[index]
        return {"input_ids": sample.input_ids[0], "attention_mask": sample.mask[0]}
