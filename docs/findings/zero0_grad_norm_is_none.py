"""`engine.get_global_grad_norm()` is None at ZeRO 0 in fp32, also when gradients are clipped by that very norm.

deepspeed 0.19.8. One process, one SGD step at each stage.
"""

import os
import signal
import sys
import tempfile

os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "LOCAL_RANK": "0"}

import deepspeed
import torch


def grad_norm(stage: int) -> float | None:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 1.0,
        },
    )
    engine.backward(engine(torch.randn(1, 8)).square().mean())
    engine.step()
    norm = engine.get_global_grad_norm()
    engine.destroy()
    return None if norm is None else float(norm)


def main() -> list[float | None]:
    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled here, about half a minute
    with tempfile.TemporaryDirectory() as folder:
        deepspeed.init_distributed("gloo", False, init_method=f"file://{folder}/store", rank=0, world_size=1)
        norms = [grad_norm(stage) for stage in range(4)]
        torch.distributed.destroy_process_group()
    return norms


if __name__ == "__main__":
    signal.alarm(60)
    norms = main()
    print("get_global_grad_norm():", ", ".join(f"z{stage} {norm}" for stage, norm in enumerate(norms)))
    sys.exit(0 if norms[0] is None else 1)
