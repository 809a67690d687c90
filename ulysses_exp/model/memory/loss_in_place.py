"""Cross entropy whose gradient takes the place of the logits.

transformers 5.23.0's `ForCausalLMLoss` makes an fp32 copy of the logits and torch's cross entropy keeps their log
softmax; in the backward its gradient and the logits' come on top. Of [positions, vocabulary] numbers that are three in
fp32 at once, in bf16 one more. Here the forward keeps one number a position, and the backward writes the gradient over
the logits: one [positions, vocabulary] tensor, in the type of the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ulysses_exp.model.memory.tiled_loss import IGNORED

#: Logits that are in fp32 at once: 32 MiB of them, or where that would make more parts a part in MOST_PARTS.
AT_ONCE, MOST_PARTS = 1 << 23, 256


def take_loss_in_place(model: PreTrainedModel) -> None:
    """Replaces the loss function of `model` where that is transformers' for causal LMs; another one stays as it is.

    The logits that a forward with labels returns are the gradient's memory: they are overwritten by the backward.
    """
    if model.loss_function is ForCausalLMLoss:
        model.loss_function = causal_lm_loss


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORED,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """`transformers.loss.loss_utils.ForCausalLMLoss`, to rounding.

    Args:
        logits: [batch, positions, vocab_size].
        labels, shift_labels: [batch, positions], the latter already shifted by one.
        num_items_in_batch: what the sum of the targets' losses is divided by; None: the number of targets.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    items = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    if isinstance(items, Tensor):
        items = items.to(logits.device)
    return _Summed.apply(logits.view(-1, vocab_size), targets, ignore_index) / items


class _Summed(torch.autograd.Function):
    """The sum of the targets' losses, in fp32."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        counts = targets != ignore_index
        targets = targets.masked_fill(~counts, 0)
        normalizer = torch.cat([rows.float().logsumexp(-1) for rows in _in_parts(logits)])
        losses = normalizer - logits.gather(1, targets[:, None])[:, 0].float()
        ctx.save_for_backward(logits, targets, counts, normalizer)
        return losses.masked_fill(~counts, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # torch refuses a second time: the logits have changed
        logits, targets, counts, normalizer = ctx.saved_tensors
        scale = grads[0] * counts
        parts = zip(*(_in_parts(x, logits.shape[1]) for x in (logits, targets, normalizer, scale)), strict=True)
        for rows, target, norm, factor in parts:
            softmax = rows if rows.dtype == torch.float32 else rows.float()
            softmax.sub_(norm[:, None]).exp_()
            softmax.scatter_add_(1, target[:, None], softmax.new_full((len(target), 1), -1.0))
            torch.mul(softmax, factor[:, None], out=softmax)
            if softmax is not rows:
                rows.copy_(softmax)
        return logits, None, None


def _in_parts(tensor: Tensor, vocab_size: int | None = None) -> tuple[Tensor, ...]:
    """Views of rows along dimension 0."""
    return tensor.split(max(1, AT_ONCE // (vocab_size or tensor.shape[1]), -(-tensor.shape[0] // MOST_PARTS)))
