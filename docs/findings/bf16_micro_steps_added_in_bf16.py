"""DeepSpeed 0.19.8: in bf16 the gradients of micro steps are added in bf16; fp32 is refused at stage 0."""

import os
import sys
import tempfile

os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}

import deepspeed
import torch

MICRO_STEPS = 64


def trained(stage: int, **entries) -> tuple[float, str]:
    """The relative error of the gradient that SGD is given, and the name of DeepSpeed's optimizer."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64, bias=False).bfloat16()
    torch.nn.init.zeros_(model.weight)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": MICRO_STEPS,
            "gradient_clipping": 0.0,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            **entries,
        },
    )
    exact = torch.zeros(64, 64, dtype=torch.float64)

    def add(gradient: torch.Tensor) -> None:
        exact.add_(gradient.double())

    model.weight.register_hook(add)
    for _ in range(MICRO_STEPS):
        engine.backward((engine(torch.randn(1, 64).bfloat16()) * torch.rand(64).bfloat16()).sum())
        engine.step()
    master = engine.basic_optimizer.param_groups[0]["params"][0].detach().double()  # was 0, the rate is 1
    return float((-master.view(64, 64) - exact).norm() / exact.norm()), type(engine.optimizer).__name__


def main() -> int:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    in_fp32 = {"data_types": {"grad_accum_dtype": "fp32"}}
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        errors = [trained(stage)[0] for stage in (0, 1, 2)]
        full = [trained(stage, **in_fp32) for stage in (1, 2)]
        try:
            trained(0, **in_fp32)
            refused = False
        except NotImplementedError:
            refused = True
        torch.distributed.destroy_process_group()
    shown = ", ".join(f"stage {stage}: {error:.0e}" for stage, error in enumerate(errors))
    then = ", ".join(f"stage {stage}: {error:.0e} by {name}" for stage, (error, name) in enumerate(full, 1))
    print(f"error of {MICRO_STEPS} micro steps: {shown}; in fp32: stage 0 {'refused' if refused else 'taken'}, {then}")
    return 0 if min(errors) > 1e-3 and refused and full[0][1] == "BF16_Optimizer" else 1


if __name__ == "__main__":
    sys.exit(main())
