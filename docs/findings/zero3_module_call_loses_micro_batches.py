"""ZeRO 3 keeps the gradient of one micro batch only when `engine.module(...)` is called in place of `engine(...)`.

deepspeed 0.19.8. Two micro batches, one process, SGD with learning rate 1: the update against the true gradient.
"""

import os
import signal
import sys
import tempfile

os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "LOCAL_RANK": "0"}

import deepspeed
import torch

MICRO_BATCHES = 2


def error_of_update(stage: int, call_module: bool) -> float:
    """Norm of (update + gradient) relative to the gradient's: 0 is right."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    batches = torch.randn(MICRO_BATCHES, 1, 8)
    before = model.weight.detach().clone()
    loss = torch.stack([model(batch).square().mean() for batch in batches]).mean()
    (gradient,) = torch.autograd.grad(loss, model.weight)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
        },
    )
    for batch in batches:
        engine.backward((engine.module if call_module else engine)(batch).square().mean())
        engine.step()
    with deepspeed.zero.GatheredParameters(model.weight, enabled=stage == 3):
        update = model.weight.detach() - before
    engine.destroy()
    return ((update + gradient).norm() / gradient.norm()).item()


def main() -> dict[str, float]:
    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled here, about half a minute
    with tempfile.TemporaryDirectory() as folder:
        deepspeed.init_distributed("gloo", False, init_method=f"file://{folder}/store", rank=0, world_size=1)
        errors = {
            f"z{stage} {name}": error_of_update(stage, name == "engine.module")
            for stage in (2, 3)
            for name in ("engine", "engine.module")
        }
        torch.distributed.destroy_process_group()
    return errors


if __name__ == "__main__":
    signal.alarm(60)
    errors = main()
    print("relative error of the update:", ", ".join(f"{name}(...) {error:.1e}" for name, error in errors.items()))
    sys.exit(0 if errors["z3 engine.module"] > 1e-3 else 1)
