"""What the unpatched model computes in one process: what both sides are held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ulysses_exp.config import Config
from ulysses_exp.model import build as models
from ulysses_exp.rank.data import Corpus, load_corpus
from ulysses_exp.rank.data.sequences import IGNORED, Sequence, draw
from ulysses_exp.stages.claims.measured.batches import Batch, batches, common, samples


@dataclass
class Reference:
    """Logits in fp32 and the gradient, of the model as it is before any training."""

    corpus: Corpus
    own: list[Batch]  # this rank's
    logits: list[Tensor]  # of `own`, [rows, tokens, vocabulary]
    common: Batch
    common_logits: Tensor
    samples: list[Batch]  # for Trainer
    sample_logits: list[Tensor]
    gradient: dict[str, Tensor]  # of the mean loss over the first optimizer step's sequences, by parameter


def reference(config: Config, rank: int, gradient: bool) -> Reference:
    """Computed before anything is registered in this process.

    Args:
        gradient: whether it is wanted; it takes a backward over the whole step.
    """
    model = models.build(config)
    vocabulary = model.config.get_text_config().vocab_size
    corpus = load_corpus(config, vocabulary)
    train = config.train
    own = batches(vocabulary, rank, train.seq_len, train.micro_batch_size)
    shared = common(vocabulary, train.seq_len, train.micro_batch_size)
    rows = samples(vocabulary, train.seq_len)
    model.eval()
    with torch.no_grad():
        logits, row_logits = ([_logits(model, batch) for batch in asked] for asked in (own, rows))
        common_logits = _logits(model, shared)
    step = [draw(config, corpus, "train", i) for i in range(train.global_batch_size)]
    found = _gradient(model, step) if gradient else {}
    return Reference(corpus, own, logits, shared, common_logits, rows, row_logits, found)


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """In fp32. Documents that share a row each by itself: transformers' eager attention lets them see each other."""
    if batch.documents:
        parts = batch.input_ids.split(batch.documents, dim=1)
        return torch.cat([model(input_ids=part, use_cache=False).logits.float() for part in parts], dim=1)
    return model(**batch.inputs(), use_cache=False).logits.float()


def _gradient(model: PreTrainedModel, sequences: list[Sequence]) -> dict[str, Tensor]:
    """Of the mean loss over all targets, a sequence after the other."""
    model.train()
    targets = sum(int((s.labels != IGNORED).sum()) for s in sequences)
    for sequence in sequences:
        mask = None if sequence.mask is None else torch.from_numpy(sequence.mask)[None]
        logits = model(
            torch.from_numpy(sequence.input_ids)[None],
            position_ids=torch.from_numpy(sequence.position_ids)[None],
            attention_mask=mask,
            use_cache=False,
        ).logits
        labels = torch.from_numpy(sequence.labels)
        loss = torch.nn.functional.cross_entropy(logits[0].float(), labels, ignore_index=IGNORED, reduction="sum")
        (loss / targets).backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
