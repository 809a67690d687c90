"""DeepSpeed's own recipe: https://www.deepspeed.ai/tutorials/ulysses-alst-sequence-parallelism/

torchrun --nproc-per-node N benchmarks/peers/deepspeed_recipe.py job.json result.json
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF, UlyssesSPDataLoaderAdapter
from job import Job, Record, Samples


def batches(job: Job, samples: Samples, mpu: object | None) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's part of each micro batch, with `shift_labels`."""
    if mpu is None:
        for index, batch in enumerate(samples.loader(0, 1)):
            shift_labels = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1))
            shift_labels[:, -1] = samples.last_target(index)
            yield {**batch, "shift_labels": shift_labels}
        return
    rank = mpu.get_sequence_parallel_rank()
    adapter = UlyssesSPDataLoaderAdapter(
        samples.loader(rank, job.sp),
        sp_rank=rank,
        sp_group=mpu.get_sequence_parallel_group(),
        sp_world_size=job.sp,
        device=torch.device("cpu"),
    )
    for index, batch in zip(range(len(samples)), adapter, strict=False):  # the sampler fills up its last round
        if rank == job.sp - 1:
            batch["shift_labels"][:, -1] = samples.last_target(index)
        yield batch


def loss_of(model: torch.nn.Module, batch: dict[str, torch.Tensor], sp_group: dist.ProcessGroup | None) -> torch.Tensor:
    """As the tutorial has it: weighted mean of the ranks' mean losses, gathered differentiably."""
    outputs = model(**batch)
    shift_labels = batch["shift_labels"]
    unwrapped = model.module
    loss = unwrapped.loss_function(
        logits=outputs.logits, labels=None, shift_labels=shift_labels, vocab_size=unwrapped.config.vocab_size
    )
    if sp_group is None:
        return loss
    losses_per_rank = dist.nn.functional.all_gather(loss, group=sp_group)
    good_tokens = (shift_labels != -100).view(-1).sum()
    good_tokens_per_rank = dist.nn.functional.all_gather(good_tokens, group=sp_group)
    total_loss = sum(
        rank_loss * tokens
        for rank_loss, tokens in zip(losses_per_rank, good_tokens_per_rank, strict=True)
        if tokens > 0
    )
    return total_loss / max(sum(good_tokens_per_rank), 1)


def train(job: Job) -> tuple[deepspeed.DeepSpeedEngine, Record]:
    """All of the job's steps. The process group is initialized."""
    record = Record(job)
    model = job.model()
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation="sdpa",
        sequence_parallel_size=job.sp,
        micro_batch_size=1,
    )
    engine, *_ = deepspeed.initialize(
        config=job.deepspeed_config(), model=model, optimizer=job.new_optimizer(model), mpu=mpu
    )
    sp_group = mpu.get_sequence_parallel_group() if mpu else None
    samples = Samples(job, group=dist.get_rank() // job.sp)
    accumulation = job.accumulation()
    step_loss = torch.zeros(())
    for index, batch in enumerate(batches(job, samples, mpu)):
        loss = loss_of(engine, batch, sp_group)
        engine.backward(loss)
        engine.step()
        step_loss += loss.detach() / accumulation
        if (index + 1) % accumulation == 0:
            record.step(step_loss, engine.get_global_grad_norm())
            step_loss = torch.zeros(())
    return engine, record


if __name__ == "__main__":
    os.environ.pop("LOCAL_SIZE", None)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled at its first use
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    _, record = train(Job.load(sys.argv[1]))
    record.write(sys.argv[2])
    dist.destroy_process_group()
