"""`from_pretrained` does not open what `save_checkpoint` writes, not even with config.json beside it.

deepspeed 0.19.8, transformers 5.23.0. One process; ZeRO 0, whose checkpoint holds every weight by its name. What
`save_16bit_model` writes is opened.
"""

import contextlib
import os
import signal
import sys
import tempfile

os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "LOCAL_RANK": "0"}

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


def opened(folder: str) -> str:
    CONFIG.save_pretrained(folder)
    try:
        LlamaForCausalLM.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        return f"{type(error).__name__} ({str(error).split(', found')[0]})"
    return "ok"


def main() -> dict[str, str]:
    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled here, about half a minute
    with tempfile.TemporaryDirectory() as folder:
        deepspeed.init_distributed("gloo", False, init_method=f"file://{folder}/store", rank=0, world_size=1)
        model = LlamaForCausalLM(CONFIG)
        config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        engine.save_checkpoint(f"{folder}/checkpoint", tag="step")
        engine.save_16bit_model(f"{folder}/16bit")
        results = {
            "save_checkpoint": opened(f"{folder}/checkpoint/step"), "save_16bit_model": opened(f"{folder}/16bit"),
        }  # fmt: skip
        torch.distributed.destroy_process_group()
    return results


if __name__ == "__main__":
    signal.alarm(60)
    with contextlib.redirect_stdout(sys.stderr):
        results = main()
    print("from_pretrained of", "; ".join(f"{way}: {result}" for way, result in results.items()))
    sys.exit(1 if results["save_checkpoint"] == "ok" else 0)
