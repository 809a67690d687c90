"""A ZeRO 3 checkpoint holds no weight whole, in no file and under no name; ZeRO 0 to 2 write all of them.

deepspeed 0.19.8. One process, where each parameter is whole on the only rank: save, look into the files.
"""

import contextlib
import glob
import os
import signal
import sys
import tempfile

os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "LOCAL_RANK": "0"}

import deepspeed
import torch


def tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def whole(stage: int, folder: str) -> int:
    """How many of two weights a file of the checkpoint holds as they are."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
    weights = [parameter.detach().clone().flatten() for parameter in model.parameters()]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=config)[0]
    engine.save_checkpoint(folder)
    engine.destroy()
    saved = [t for file in glob.glob(f"{folder}/*/*.pt") for t in tensors(torch.load(file, weights_only=False))]
    return sum(any(t.numel() == w.numel() and torch.equal(t.detach().flatten(), w) for t in saved) for w in weights)


def main() -> dict[int, int]:
    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled here, about half a minute
    with tempfile.TemporaryDirectory() as folder:
        deepspeed.init_distributed("gloo", False, init_method=f"file://{folder}/store", rank=0, world_size=1)
        results = {stage: whole(stage, f"{folder}/z{stage}") for stage in range(4)}
        torch.distributed.destroy_process_group()
    return results


if __name__ == "__main__":
    signal.alarm(60)
    with contextlib.redirect_stdout(sys.stderr):
        results = main()
    print("weights whole in a file, of 2:", ", ".join(f"z{stage} {count}" for stage, count in results.items()))
    sys.exit(0 if results[3] < 2 else 1)
