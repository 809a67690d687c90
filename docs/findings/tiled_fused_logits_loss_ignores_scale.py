"""`TiledFusedLogitsLoss` gives lm_head its gradient before the loss is scaled: what is done to the loss is lost on it.

deepspeed 0.19.8 (ulysses_sp.py: `backward` is run inside `forward`, with an incoming gradient of 1). The loss is
divided by 10, as gradient accumulation or a mean over tokens does; the factor by which each gradient shrinks.
"""

import os
import signal
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss
from torch.nn.functional import cross_entropy


def gradients(divisor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of hidden states and lm_head's weight."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 16, bias=False)
    hidden = torch.randn(1, 32, 8, requires_grad=True)
    labels = torch.randint(16, (1, 32))

    def loss_of_tile(head, x, y):
        return cross_entropy(head(x), y, reduction="sum")

    loss = TiledFusedLogitsLoss.apply(loss_of_tile, head, hidden, labels, None, 4, [head.weight], "sum")
    (loss / divisor).backward()
    return hidden.grad, head.weight.grad


if __name__ == "__main__":
    signal.alarm(60)
    factors = [(one.norm() / ten.norm()).item() for one, ten in zip(gradients(1), gradients(10), strict=True)]
    print(f"loss / 10 divides the hidden states' gradient by {factors[0]:.1f}, lm_head.weight's by {factors[1]:.1f}")
    sys.exit(0 if abs(factors[1] - 10) > 0.1 else 1)
