"""A forward without gradient: through the sequence-parallel attention, or past it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ulysses_exp.rank.checkpoints import function
from ulysses_exp.rank.data import MicroBatch
from ulysses_exp.rank.session import Session


def _forward(session: Session, batch: MicroBatch, bypass: bool, **labels: Any) -> Any:
    session.attention.disable_in_eval = bypass
    mask = batch.global_mask
    session.attention.begin(batch.global_position_ids, mask)
    whole = bypass or session.layout.sp == 1
    move = session.to_device
    return session.engine(
        input_ids=move(batch.input_ids),
        position_ids=move(batch.position_ids),
        attention_mask=move(mask) if whole and mask is not None else None,
        use_cache=False,
        **labels,
    )


def summed_loss(session: Session, batch: MicroBatch, bypass: bool) -> torch.Tensor:
    """Of the targets in `batch`, computed as in training: in tiles where the loss is tiled, else from the logits."""
    labels = session.to_device(batch.labels)
    return _forward(session, batch, bypass, labels=labels, shift_labels=labels, num_items_in_batch=1).loss


def logits(session: Session, batch: MicroBatch, bypass: bool, places: torch.Tensor | None = None) -> torch.Tensor:
    """[batch, tokens of `batch`, vocabulary] in fp32; at `places` alone, of which no others are then computed."""
    wanted = {} if places is None else {"logits_to_keep": session.to_device(places)}
    return _forward(session, batch, bypass, **wanted).logits.float()


def fixed_logits(session: Session) -> dict[str, torch.Tensor]:
    """What checkpoints keep of the logits of a fixed batch, computed without sequence parallelism. Collective."""
    model = session.engine.module.config.get_text_config()
    ids = function.token_ids(model.vocab_size, min(function.TOKENS, session.config.train.seq_len))
    places = torch.arange(ids.shape[1])[None]
    batch = MicroBatch(ids, ids, places, places, None, 0)
    session.engine.eval()
    # another length would be compiled anew
    eager = torch.compiler.set_stance("force_eager") if session.config.train.compile else contextlib.nullcontext()
    with torch.no_grad(), eager:
        found = logits(session, batch, bypass=True)[0]
    session.attention.disable_in_eval = True
    session.engine.train()
    return function.record(found)
