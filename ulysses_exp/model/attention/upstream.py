"""DeepSpeed 0.19.8's registration, and how to undo it. Everything here works around upstream; tests/attention/
test_upstream.py fails where upstream mends one of the symptoms.

- `register_with_transformers` has no counterpart: the patched function, the two process groups and `groups.mpu` stay,
  a second registration fails ("sequence parallel group is already initialized") or wraps the wrapper.
- With fewer KV heads than ranks a forward changes `module.num_key_value_groups` for good.
- The wrapper drops the mask before it asks for `disable_in_eval`: padded batches are wrong in bypassed eval.
- Process groups are made without a timeout: torch's default of 30 minutes (10 with NCCL) whatever the world's is.
- A direct construction of `UlyssesSPAttentionHF` is what `register_with_transformers` hides in a closure.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import deepspeed.runtime.sequence_parallel.parallel_state_sp as parallel_state
import deepspeed.utils.groups as groups
import torch.distributed
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from deepspeed.sequence import layer
from transformers import PreTrainedModel


@contextmanager
def entry(table: MutableMapping[str, Any], name: str) -> Iterator[None]:
    """Puts `table[name]` back as it was, for transformers' attention and mask tables (a local entry over a global)."""
    before = table[name]
    try:
        yield
    finally:
        if table[name] is not before:
            del table[name]
        if table[name] is not before:
            table[name] = before


@contextmanager
def sequence_parallel_state() -> Iterator[None]:
    """Destroys on exit the process groups that a registration made, and forgets them everywhere.

    Raises:
        RuntimeError: this process has registered sequence parallelism already.
    """
    if parallel_state._SEQUENCE_PARALLEL_GROUP is not None:
        raise RuntimeError(
            "sequence parallelism is already registered in this process; leave the first ulysses() context before "
            "entering another"
        )
    mpu = groups.mpu
    try:
        yield
    finally:
        made = {parallel_state._SEQUENCE_PARALLEL_GROUP, parallel_state._SEQUENCE_DATA_PARALLEL_GROUP} - {None}
        parallel_state._release_sequence_parallel_groups()
        groups.mpu = mpu
        for group in made:
            layer._all_to_all_groups.pop(group.group_name, None)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group(group)


@contextmanager
def group_timeout(timeout: timedelta) -> Iterator[None]:
    """Gives process groups that are made without a timeout this one, where torch and DeepSpeed take a default."""
    original = torch.distributed.new_group

    @functools.wraps(original)
    def new_group(ranks: Any = None, given: timedelta | None = None, *args: Any, **kwargs: Any) -> Any:
        return original(ranks, kwargs.pop("timeout", None) or given or timeout, *args, **kwargs)

    torch.distributed.new_group = new_group  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.distributed.new_group = original


@contextmanager
def kv_groups(model: PreTrainedModel) -> Iterator[None]:
    """Restores `num_key_value_groups` of every module on exit."""
    before = [(m, m.num_key_value_groups) for m in model.modules() if hasattr(m, "num_key_value_groups")]
    try:
        yield
    finally:
        for module, number in before:
            module.num_key_value_groups = number


def attention_module(wrapper: Callable[..., Any]) -> UlyssesSPAttentionHF:
    """The module behind the function that `register_with_transformers` leaves in ALL_ATTENTION_FUNCTIONS."""
    return inspect.getclosurevars(wrapper).nonlocals["uattn"]
