"""`activation_checkpointing_enable(offload=True)` fails in the first forward on a machine without accelerator.

transformers 5.23.0 (modeling_utils.py, `_activation_checkpointing_enable`: `save_on_cpu(pin_memory=True,
device_type="cpu")`; torch.cpu calls itself available), torch 2.13.0. The comment there expects that nothing is copied.
"""

import os
import signal
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


def error_of_forward(offload: bool) -> str:
    model = LlamaForCausalLM(CONFIG).train()
    model.activation_checkpointing_enable({"use_reentrant": False}, offload=offload)
    try:
        model(torch.zeros(1, 8, dtype=torch.long), use_cache=False)
        return "none"
    except RuntimeError as failure:
        return str(failure)


if __name__ == "__main__":
    signal.alarm(60)
    kept, offloaded = error_of_forward(False), error_of_forward(True)
    print(f"error of a forward on CPU: offload=False: {kept}; offload=True: {offloaded}")
    sys.exit(1 if offloaded == "none" else 0)
