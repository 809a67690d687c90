"""Upstream alone: DeepSpeed and transformers as their documentation puts them together, nothing of this project's.

https://www.deepspeed.ai/tutorials/ulysses-alst-sequence-parallelism/, but that each rank cuts its slice out of the
batch itself: what the tutorial's data adapter would hand it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ulysses_exp.config import Config
from ulysses_exp.model import build as models
from ulysses_exp.rank.data import load_corpus
from ulysses_exp.rank.data.batches import Batches, MicroBatch
from ulysses_exp.rank.engine import optimizer
from ulysses_exp.stages.claims.measured.attention_calls import AttentionCalls
from ulysses_exp.stages.claims.measured.checkpoints import said
from ulysses_exp.stages.claims.measured.subject import Subject, head_size


class UpstreamAlone:
    """Makes subjects in a process that registers sequence parallelism once, which is as often as upstream can."""

    side = "upstream"

    def __init__(self, rank: int):
        self.rank = rank
        self.registered: tuple[AttentionCalls, Any, UlyssesSPAttentionHF, Any] | None = None
        self.stack = ExitStack()  # never left: upstream has no way to undo a registration

    @contextmanager
    def subject(self, config: Config, seed: int | None = None) -> Iterator[Subject]:
        """An engine at `config.layout`; `seed` draws other weights. Collective over the world."""
        model = models.build(config, seed)
        calls, mpu, direct, original = self.registered or self._register(config, model)
        batches = Batches(config, load_corpus(config, model.config.get_text_config().vocab_size), self.rank)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer(config, model), config=_config(config), mpu=mpu
        )
        group = mpu.get_sequence_parallel_group() if mpu is not None else None

        def step(number: int) -> None:
            engine.train()
            for batch in batches.step(number):
                engine.backward(_loss(engine, batch, group))
                engine.step()

        def save(folder: Path) -> None:
            engine.save_checkpoint(str(folder), tag="step")

        def load(folder: Path) -> None:
            path, _ = engine.load_checkpoint(str(folder), tag="step")
            if path is None:
                raise RuntimeError("load_checkpoint() returned None")

        def exports(checkpoint: Path, room: Path) -> dict[str, Path | str]:
            return _exports(engine, checkpoint, room)

        try:
            yield Subject(self.side, config, self.rank, engine, calls, original, direct, step, save, load, exports)
        finally:
            engine.destroy()

    def _register(self, config: Config, model: Any) -> Any:
        name, sp = model.config._attn_implementation, config.sp.size
        calls = AttentionCalls()
        original = ALL_ATTENTION_FUNCTIONS.get(name)
        if original is not None:  # else upstream refuses it
            self.stack.enter_context(calls.behind(name))
        mpu = UlyssesSPAttentionHF.register_with_transformers(
            model_name_or_path=model,
            core_attn_implementation=name,
            sequence_parallel_size=sp,
            micro_batch_size=config.train.micro_batch_size,
            disable_in_eval=True,
        )
        if original is not None:
            self.stack.enter_context(calls.before(name))
        group = mpu.get_sequence_parallel_group() if mpu is not None else dist.new_subgroups(1)[0]
        whole = original or ALL_ATTENTION_FUNCTIONS["sdpa"]
        direct = constructed(UlyssesSPAttentionHF, calls.arriving(whole), config, model.config, group)
        self.registered = calls, mpu, direct, whole
        return self.registered


def constructed(
    kind: type[UlyssesSPAttentionHF], core: Any, config: Config, architecture: Any, group: dist.ProcessGroup
) -> UlyssesSPAttentionHF:
    """`kind` around `core`, by its constructor alone."""
    text = architecture.get_text_config()
    return kind(
        attn=core,
        batch_size=config.train.micro_batch_size,
        attn_head_count=text.num_attention_heads,
        attn_head_size=head_size(text),
        kv_head_count=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        num_hidden_layers=text.num_hidden_layers,
        process_group=group,
        seq_length_is_variable=True,
        disable_in_eval=True,
    )


def _config(config: Config) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero.stage}
    if config.zero.stage == 3:
        zero["stage3_param_persistence_threshold"] = config.zero.param_persistence_threshold
        zero["stage3_gather_16bit_weights_on_model_save"] = True  # what save_16bit_model() asks for
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.optim.grad_clip,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "sequence_parallel_size": config.sp.size,
        "steps_per_print": 1 << 30,
    }


def _loss(engine: deepspeed.DeepSpeedEngine, batch: MicroBatch, group: dist.ProcessGroup | None) -> Tensor:
    """The tutorial's: weighted mean of the ranks' mean losses, gathered differentiably."""
    device = engine.device
    labels = batch.labels.to(device)
    mask = batch.global_mask if group is None else None
    logits = engine(
        input_ids=batch.input_ids.to(device),
        position_ids=batch.position_ids.to(device),
        attention_mask=None if mask is None else mask.to(device),
        use_cache=False,
    ).logits
    model = engine.module
    loss = model.loss_function(
        logits=logits, labels=None, shift_labels=labels, vocab_size=model.config.get_text_config().vocab_size
    )
    if group is None:
        return loss
    losses = torch.distributed.nn.functional.all_gather(loss, group=group)
    counts = torch.distributed.nn.functional.all_gather((labels != -100).sum(), group=group)
    total = sum(one * count for one, count in zip(losses, counts, strict=True) if count > 0)
    return total / max(sum(counts), 1)


def _exports(engine: deepspeed.DeepSpeedEngine, checkpoint: Path, room: Path) -> dict[str, Path | str]:
    """Collective: ZeRO 3 gathers for save_16bit_model()."""
    rank = dist.get_rank()
    found: dict[str, Path | str] = {"save_checkpoint()": checkpoint / "step"}
    if engine.save_16bit_model(str(room / "16bit")):
        found["save_16bit_model()"] = room / "16bit"
    else:
        found["save_16bit_model()"] = "wrote nothing"
    if rank == 0:
        for folder in found.values():
            if isinstance(folder, Path):  # neither writes the model's configuration: it is put beside
                engine.module.config.save_pretrained(folder)
        try:
            from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

            convert_zero_checkpoint_to_fp32_state_dict(str(checkpoint), str(room / "fp32"), tag="step")
            engine.module.config.save_pretrained(room / "fp32")
            found["zero_to_fp32"] = room / "fp32"
        except Exception as error:
            found["zero_to_fp32"] = said(error)
    return found
