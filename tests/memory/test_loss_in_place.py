"""The loss whose gradient takes the place of the logits, against transformers' own."""

from __future__ import annotations

import pytest
import torch
from memory_ranks import new_model
from transformers.loss.loss_utils import ForCausalLMLoss

from ulysses_exp.model.memory import loss_in_place
from ulysses_exp.model.memory.loss_in_place import causal_lm_loss, take_loss_in_place

ROWS, VOCABULARY = 50, 300


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, ROWS // 2, VOCABULARY)).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (2, ROWS // 2))
    targets[0, :7] = -100
    return logits, targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 7 * VOCABULARY, 1 << 24])  # a row at a time, parts that do not divide, all
@pytest.mark.parametrize("items", [None, 64, torch.tensor(64.0)])
def test_loss_and_gradient_are_transformers(monkeypatch, dtype, at_once, items) -> None:
    monkeypatch.setattr(loss_in_place, "AT_ONCE", at_once)
    found = []
    for loss in (ForCausalLMLoss, causal_lm_loss):
        logits, targets = inputs(dtype)
        value = loss(2 * logits, None, VOCABULARY, items, shift_labels=targets)
        (gradient,) = torch.autograd.grad(3 * value, logits)
        found.append((value, gradient))
    (expected, right), (value, gradient) = found
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert (gradient - right).norm() <= 4 * torch.finfo(dtype).eps * right.norm()
    assert not gradient[0, :7].any()


def test_a_sequence_without_targets_has_no_loss() -> None:
    logits, targets = inputs(torch.float32)
    loss = causal_lm_loss(logits * 1, None, VOCABULARY, 10, shift_labels=torch.full_like(targets, -100))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_a_second_backward_is_an_error_and_not_another_gradient() -> None:
    logits, targets = inputs(torch.float32)
    loss = causal_lm_loss(logits * 1, None, VOCABULARY, shift_labels=targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_who_else_needs_the_logits_is_told() -> None:
    """A layer that keeps its output for its own backward: torch notices that it was written over."""
    logits, targets = inputs(torch.float32)
    loss = causal_lm_loss(logits.exp(), None, VOCABULARY, shift_labels=targets)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_another_loss_function_stays() -> None:
    model = new_model("tiny_llama", "none")

    def own(**kwargs):
        return kwargs["logits"].sum()

    model.loss_function = own
    take_loss_in_place(model)
    assert model.loss_function is own
