"""`load_checkpoint` opens a checkpoint at the ZeRO stage that wrote it, and 1 and 2 each other's; else it breaks.

deepspeed 0.19.8. One process: saved at each stage, opened at each stage.
"""

import contextlib
import os
import signal
import sys
import tempfile

os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "LOCAL_RANK": "0"}

import deepspeed
import torch


def new_engine(stage: int, seed: int) -> deepspeed.DeepSpeedEngine:
    torch.manual_seed(seed)
    model = torch.nn.Linear(8, 8)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)[0]
    engine.backward(engine(torch.ones(1, 8)).sum())
    engine.step()
    return engine


def main() -> dict[tuple[int, int], str]:
    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled here, about half a minute
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        deepspeed.init_distributed("gloo", False, init_method=f"file://{folder}/store", rank=0, world_size=1)
        for stage in range(4):
            engine = new_engine(stage, seed=0)
            engine.save_checkpoint(f"{folder}/z{stage}", tag="step")
            engine.destroy()
        for saved in range(4):
            for now in range(4):
                engine = new_engine(now, seed=1)
                try:
                    engine.load_checkpoint(f"{folder}/z{saved}", tag="step")
                    found[saved, now] = "ok"
                except Exception as error:
                    found[saved, now] = type(error).__name__
                engine.destroy()
        torch.distributed.destroy_process_group()
    return found


if __name__ == "__main__":
    signal.alarm(60)
    with contextlib.redirect_stdout(sys.stderr):
        found = main()
    by_error: dict[str, list[str]] = {}
    for (saved, now), result in found.items():
        by_error.setdefault(result, []).append(f"{saved}->{now}")
    print("saved->opened:", "; ".join(f"{result} {', '.join(pairs)}" for result, pairs in by_error.items()))
    sys.exit(1 if set(by_error) == {"ok"} else 0)
