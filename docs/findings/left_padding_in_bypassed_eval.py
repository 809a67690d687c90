"""In bypassed eval (`disable_in_eval=True`) a left-padded sequence attends to its padding.

deepspeed 0.19.8 (ulysses_sp.py, `uattn_wrapper`: `attention_mask = None`, before `disable_in_eval` is looked at),
transformers 5.23.0, sdpa. Logits of the real tokens, padded and not, with and without the patch.
"""

import os
import signal
import sys
import tempfile

os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}

import deepspeed
import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from transformers import LlamaConfig, LlamaForCausalLM

SP, LENGTH, PADDING = 2, 32, 12
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


@torch.no_grad()
def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled here, about half a minute
    deepspeed.init_distributed("gloo", False, init_method=f"file://{folder}/store", rank=rank, world_size=SP)
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(CONFIG, attn_implementation="sdpa").eval()
    for parameter in model.parameters():
        parameter.mul_(5)  # attention that looks at some tokens more than at others, as in a trained model
    tokens = torch.randint(64, (1, LENGTH))
    padded = torch.nn.functional.pad(tokens, (PADDING, 0))
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (PADDING, 0))
    right = model(tokens).logits
    unpatched = model(padded, attention_mask=mask).logits[:, PADDING:]

    UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", SP, micro_batch_size=1, disable_in_eval=True)
    bypassed = model(padded, attention_mask=mask).logits[:, PADDING:]
    if rank == 0:
        torch.save({"unpatched": unpatched - right, "bypassed": bypassed - right}, f"{folder}/error")


if __name__ == "__main__":
    signal.alarm(60)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(on_rank, (folder,), nprocs=SP, start_method="fork")
        error = {name: part.abs().max().item() for name, part in torch.load(f"{folder}/error").items()}
    print(f"left padding, max |logit difference|: unpatched {error['unpatched']:.1e}, bypassed {error['bypassed']:.2f}")
    sys.exit(0 if error["bypassed"] > 1e-3 else 1)
