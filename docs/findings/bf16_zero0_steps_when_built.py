"""DeepSpeed 0.19.8: at ZeRO 0 in bf16 deepspeed.initialize takes an optimizer step with gradients of zero."""

import os
import sys
import tempfile

os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}

import deepspeed
import torch


def after_one_step(stage: int) -> tuple[float, float]:
    """AdamW's count of steps after the first one, and a weight that was 1 and has a gradient of 1."""
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    torch.nn.init.ones_(model.weight)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        },
    )
    engine.backward(engine(torch.ones(1, 1, dtype=torch.bfloat16)).sum())
    engine.step()
    optimizer = engine.basic_optimizer
    (count,) = (float(state["step"]) for state in optimizer.state.values())
    return count, optimizer.param_groups[0]["params"][0].detach().flatten()[0].item()


def main() -> int:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        stage0, stage1 = after_one_step(0), after_one_step(1)
        torch.distributed.destroy_process_group()
    shown = ", ".join(f"stage {n}: count {c:.0f}, weight {w:.4f}" for n, (c, w) in enumerate((stage0, stage1)))
    print(f"after one AdamW step: {shown}")
    return 0 if stage0[0] == 2 and stage1[0] == 1 and stage0[1] != stage1[1] else 1


if __name__ == "__main__":
    sys.exit(main())
