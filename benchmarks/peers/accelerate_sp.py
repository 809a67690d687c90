"""Hugging Face accelerate with its DeepSpeed sequence-parallel backend:
https://huggingface.co/docs/accelerate/concept_guides/sequence_parallelism

    torchrun --nproc-per-node N benchmarks/peers/accelerate_sp.py job.json result.json

The data loader is handed to the adapter after `prepare`, as transformers' Trainer does: `prepare` itself reads the same
samples on every rank of a sequence-parallel group, and the adapter then yields each of them sp times.
"""

from __future__ import annotations

import os
import sys

os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"

import deepspeed.ops
import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DeepSpeedSequenceParallelConfig, ParallelismConfig
from deepspeed.utils import groups
from job import Job, Record, Samples


def train(job: Job) -> Record:
    """All of the job's steps. Accelerate initializes the process group."""
    if job.sp == 1:
        raise ValueError("sp: accelerate's sequence-parallel backend needs 2 or more")
    record = Record(job, packages=("accelerate",))
    accelerator = Accelerator(
        mixed_precision="bf16" if job.precision == "bf16" else "no",
        gradient_accumulation_steps=job.accumulation(),
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=job.deepspeed_config()),
        parallelism_config=ParallelismConfig(
            sp_backend="deepspeed",
            sp_size=job.sp,
            dp_shard_size=job.dp,
            sp_handler=DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa"),
        ),
    )
    model = job.model()
    model, optimizer = accelerator.prepare(model, job.new_optimizer(model))
    samples = Samples(job, group=dist.get_rank() // job.sp)
    rank = dist.get_rank() % job.sp
    loader = accelerator.deepspeed_ulysses_dl_adapter(samples.loader(rank, job.sp), model)
    sp_group = groups._get_sequence_parallel_group()  # as accelerate's guide does
    unwrapped = accelerator.unwrap_model(model)
    step_loss = torch.zeros(())
    for index, batch in zip(range(len(samples)), loader, strict=False):  # the sampler fills up its last round
        if rank == job.sp - 1:
            batch["shift_labels"][:, -1] = samples.last_target(index)
        with accelerator.accumulate(model):
            outputs = model(**batch)
            shift_labels = batch["shift_labels"]
            loss = unwrapped.loss_function(
                logits=outputs.logits, labels=None, shift_labels=shift_labels, vocab_size=unwrapped.config.vocab_size
            )
            losses_per_rank = dist.nn.functional.all_gather(loss, group=sp_group)
            good_tokens = (shift_labels != -100).view(-1).sum()
            good_tokens_per_rank = dist.nn.functional.all_gather(good_tokens, group=sp_group)
            pairs = zip(losses_per_rank, good_tokens_per_rank, strict=True)
            total_loss = sum(rank_loss * tokens for rank_loss, tokens in pairs if tokens > 0)
            loss = total_loss / max(sum(good_tokens_per_rank), 1)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        step_loss += loss.detach() / job.accumulation()
        if accelerator.sync_gradients:
            record.step(step_loss, model.get_global_grad_norm())
            step_loss = torch.zeros(())
    return record


if __name__ == "__main__":
    os.environ.pop("LOCAL_SIZE", None)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled at its first use
    torch.set_num_threads(1)
    train(Job.load(sys.argv[1])).write(sys.argv[2])
    dist.destroy_process_group()
