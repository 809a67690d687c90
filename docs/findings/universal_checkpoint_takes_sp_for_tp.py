"""A ZeRO 1 or 2 checkpoint that was saved with sp > 1 cannot be made universal: sp is recorded as tensor parallelism.

deepspeed 0.19.8 (parallel_state_sp.py: `get_model_parallel_world_size = get_sequence_parallel_world_size`). Two ranks
save, at sp 1 and at sp 2; `ds_to_universal` converts both.
"""

import contextlib
import os
import signal
import sys
import tempfile
from argparse import Namespace

os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.sequence_parallel import parallel_state_sp

WORLD = 2


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel("ERROR")
    os.environ["LOCAL_RANK"] = str(rank)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled here, about half a minute
    deepspeed.init_distributed("gloo", False, init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    for sp in 1, 2:
        if sp > 1:
            parallel_state_sp.initialize_sequence_parallel(sp)
        model = torch.nn.Linear(8, 8)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters()),
            config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}},
            mpu=parallel_state_sp if sp > 1 else None,
        )
        engine.backward(engine(torch.ones(1, 8)).sum())
        engine.step()
        engine.save_checkpoint(f"{folder}/sp{sp}", tag="step")
        engine.destroy()


def error_of_conversion(folder: str) -> str:
    arguments = Namespace(
        input_folder=f"{folder}/step", output_folder=f"{folder}/universal", num_extract_workers=1,
        num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    try:
        ds_to_universal.main(arguments)
        return "none"
    except RuntimeError as failure:
        return str(failure)


if __name__ == "__main__":
    signal.alarm(60)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(on_rank, (folder,), nprocs=WORLD, start_method="fork")
        with contextlib.redirect_stdout(sys.stderr):
            errors = [error_of_conversion(f"{folder}/sp{sp}") for sp in (1, 2)]
    print(f"ds_to_universal of a ZeRO 2 checkpoint: sp 1: error {errors[0]}; sp 2: {errors[1]}")
    sys.exit(1 if errors[1] == "none" else 0)
