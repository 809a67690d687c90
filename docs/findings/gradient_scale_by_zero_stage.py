"""The same loss has a gradient that is sp times larger under ZeRO 0-2 than under ZeRO 3.

deepspeed 0.19.8, torch 2.13.0, transformers 5.23.0. One SGD step of one sequence at sp 2, compared with the
same step of an unsharded model in plain torch: the factor between the two weight updates.
"""

import json
import os
import signal
import sys
import tempfile

os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}

import deepspeed
import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

SP, LENGTH = 2, 32
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


def new_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(CONFIG, attn_implementation="sdpa")


def tutorial_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """deepspeed.ai/tutorials/ulysses-alst-sequence-parallelism: weighted mean of the ranks' mean losses."""
    losses = dist.nn.functional.all_gather(cross_entropy(logits, labels))
    tokens = dist.nn.functional.all_gather((labels != -100).sum())
    return sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)


def local_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The rank's own share of the same mean."""
    return cross_entropy(logits, labels, reduction="sum") / LENGTH


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel("ERROR")
    os.environ["LOCAL_RANK"] = str(rank)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled here, about half a minute
    deepspeed.init_distributed("gloo", False, init_method=f"file://{folder}/store", rank=rank, world_size=SP)
    tokens = torch.randint(64, (1, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(LENGTH)[None]

    reference = new_model()
    before = reference.lm_head.weight.detach().clone()
    cross_entropy(reference(inputs).logits[0], labels[0]).backward()
    step = -reference.lm_head.weight.grad

    mpu = UlyssesSPAttentionHF.register_with_transformers(reference, "sdpa", SP, micro_batch_size=1)
    part = slice(rank * LENGTH // SP, (rank + 1) * LENGTH // SP)
    factors = {}
    for loss_function in tutorial_loss, local_loss:
        for stage in range(4):
            model = new_model()
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
                config={
                    "train_micro_batch_size_per_gpu": 1,
                    "zero_optimization": {"stage": stage},
                    "zero_allow_untested_optimizer": True,
                    "gradient_clipping": 0.0,
                },
                mpu=mpu,
            )
            logits = engine(inputs[:, part], position_ids=positions[:, part], use_cache=False).logits
            engine.backward(loss_function(logits[0], labels[0, part]))
            engine.step()
            with deepspeed.zero.GatheredParameters(model.lm_head.weight, enabled=stage == 3):
                moved = model.lm_head.weight.detach() - before
            factors[f"{loss_function.__name__} z{stage}"] = float((moved * step).sum() / step.square().sum())
            engine.destroy()
            deepspeed.utils.groups.mpu = mpu
    if rank == 0:
        with open(f"{folder}/factors", "w") as file:
            json.dump(factors, file)


if __name__ == "__main__":
    signal.alarm(120)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(on_rank, (folder,), nprocs=SP, start_method="fork")
        with open(f"{folder}/factors") as file:
            factors = json.load(file)
    print("gradient / true gradient:", ", ".join(f"{name} {factor:.4f}" for name, factor in factors.items()))
    same = max(factors.values()) - min(factors.values()) < 0.01
    sys.exit(1 if same else 0)
