"""DeepSpeed 0.19.8: at ZeRO 0 engine.backward(loss, scale_wrt_gas=False) divides by them all the same."""

import os
import sys
import tempfile

os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}

import deepspeed
import torch

STEPS = 4


def gradient(stage: int, product: bool) -> float:
    """The gradient of 1.0 * w summed over STEPS micro batches; STEPS if nothing is divided."""

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(1))

        def forward(self):
            return self.w.sum()

    model = Loss()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": STEPS,
            "gradient_clipping": 0,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        },
    )
    for _ in range(STEPS):
        loss = engine()
        engine.backward(loss * 1.0 if product else loss, scale_wrt_gas=False)
        engine.step()
    return 1.0 - float(model.w.detach()[0])  # SGD at rate 1 moves by the gradient


def main() -> int:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        direct, product, stage1 = gradient(0, False), gradient(0, True), gradient(1, False)
        torch.distributed.destroy_process_group()
    print(f"gradient, {STEPS} is right: stage 0 {direct}, of a product {product}; stage 1 {stage1}")
    return 0 if direct == 1.0 and product == stage1 == STEPS else 1


if __name__ == "__main__":
    sys.exit(main())
