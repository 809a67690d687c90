"""Under ZeRO 3 `load_checkpoint(load_module_only=True)` returns the path, raises nothing and loads nothing.

deepspeed 0.19.8. One process: save, load into a model with other weights.
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
    return deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=config)[0]


def weight(engine: deepspeed.DeepSpeedEngine) -> torch.Tensor:
    return deepspeed.utils.safe_get_full_fp32_param(engine.module.weight).clone()


def loaded(stage: int, folder: str, **how: bool) -> str:
    """`yes` where a new model has the saved weight after `load_checkpoint`."""
    engine = new_engine(stage, seed=0)
    saved = weight(engine)
    engine.save_checkpoint(folder)
    engine.destroy()
    engine = new_engine(stage, seed=1)
    path, _ = engine.load_checkpoint(folder, **how)
    now = weight(engine)
    engine.destroy()
    return "yes" if torch.equal(now, saved) else f"no, and it returned {os.path.basename(path)!r}"


def main() -> dict[str, str]:
    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled here, about half a minute
    with tempfile.TemporaryDirectory() as folder:
        deepspeed.init_distributed("gloo", False, init_method=f"file://{folder}/store", rank=0, world_size=1)
        results = {
            "z2 load_module_only": loaded(2, f"{folder}/z2", load_module_only=True),
            "z3 load_module_only": loaded(3, f"{folder}/z3", load_module_only=True),
            "z3 without optimizer and scheduler": loaded(
                3, f"{folder}/z3", load_optimizer_states=False, load_lr_scheduler_states=False
            ),
        }
        torch.distributed.destroy_process_group()
    return results


if __name__ == "__main__":
    signal.alarm(60)
    with contextlib.redirect_stdout(sys.stderr):
        results = main()
    print("weight loaded?", "; ".join(f"{how}: {result}" for how, result in results.items()))
    sys.exit(1 if results["z3 load_module_only"] == "yes" else 0)
