"""After an engine with sequence parallelism the process cannot make another engine: two globals outlive `destroy()`.

deepspeed 0.19.8 (utils/groups.py: `mpu`; parallel_state_sp.py: the groups), transformers 5.23.0. First the next engine,
without sequence parallelism; then the next registration. (The wrapped attention function stays registered, too.)
"""

import os
import signal
import sys
import tempfile

os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}

import deepspeed
import torch
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from transformers import LlamaConfig, LlamaForCausalLM

SP = 2
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


def new_engine(model: LlamaForCausalLM, mpu: object) -> deepspeed.DeepSpeedEngine:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters())
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)[0]


def error_of(function: object, *arguments: object) -> str:
    try:
        function(*arguments)
        return "none"
    except AssertionError as failure:
        return str(failure)


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel("ERROR")
    os.environ["LOCAL_RANK"] = str(rank)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled here, about half a minute
    deepspeed.init_distributed("gloo", False, init_method=f"file://{folder}/store", rank=rank, world_size=SP)
    model = LlamaForCausalLM._from_config(CONFIG, attn_implementation="sdpa")
    mpu = UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", SP, micro_batch_size=1)
    new_engine(model, mpu).destroy()
    again = error_of(UlyssesSPAttentionHF.register_with_transformers, model, "sdpa", SP, 1)
    parallel_state_sp._release_sequence_parallel_groups()  # the one clean-up that upstream has, private
    engine = error_of(new_engine, model, None)
    if rank == 0:
        torch.save((again, engine), f"{folder}/errors")


if __name__ == "__main__":
    signal.alarm(60)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(on_rank, (folder,), nprocs=SP, start_method="fork")
        again, engine = torch.load(f"{folder}/errors")
    print(f"after engine.destroy(): registering again: {again}; groups released, initialize without mpu: {engine}")
    sys.exit(1 if again == engine == "none" else 0)
