"""Under sequence parallelism, and in bypassed eval, sliding-window layers see the whole sequence.

deepspeed 0.19.8 (ulysses_sp.py, `uattn_wrapper`: `attention_mask = None`, before `disable_in_eval` is looked at),
transformers 5.23.0, sdpa. Logits of positions beyond the window against the unpatched model's.
"""

import os
import signal
import sys
import tempfile

os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}

import deepspeed
import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from transformers import MistralConfig, MistralForCausalLM

SP, LENGTH, WINDOW = 2, 64, 16
CONFIG = MistralConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, sliding_window=WINDOW,
)  # fmt: skip


@torch.no_grad()
def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled here, about half a minute
    deepspeed.init_distributed("gloo", False, init_method=f"file://{folder}/store", rank=rank, world_size=SP)
    torch.manual_seed(0)
    model = MistralForCausalLM._from_config(CONFIG, attn_implementation="sdpa")
    for parameter in model.parameters():
        parameter.mul_(5)  # attention that looks at some tokens more than at others, as in a trained model
    tokens = torch.randint(64, (1, LENGTH))
    positions = torch.arange(LENGTH)[None]
    right = model(tokens, position_ids=positions, use_cache=False).logits

    UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", SP, micro_batch_size=1, disable_in_eval=True)
    part = slice(rank * LENGTH // SP, (rank + 1) * LENGTH // SP)
    sharded = model.train()(tokens[:, part], position_ids=positions[:, part], use_cache=False).logits
    bypassed = model.eval()(tokens, position_ids=positions, use_cache=False).logits
    if rank == 1:  # the second half: all of it lies beyond the window
        torch.save({"sharded": sharded - right[:, part], "bypassed": (bypassed - right)[:, part]}, f"{folder}/error")


if __name__ == "__main__":
    signal.alarm(60)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(on_rank, (folder,), nprocs=SP, start_method="fork")
        error = {name: part.abs().max().item() for name, part in torch.load(f"{folder}/error").items()}
    print(f"max |logit difference| beyond the window: sharded {error['sharded']:.2f}, bypassed {error['bypassed']:.2f}")
    sys.exit(0 if max(error.values()) > 1e-3 else 1)
