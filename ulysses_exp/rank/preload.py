"""What every rank imports, imported once: the server loads this module and each rank is a fork of it.

Only imports: a torch operation here would start threads that a fork does not inherit.
"""

import gc

import deepspeed
import deepspeed.module_inject.auto_ep_layer  # each engine imports it
import deepspeed.runtime.sequence_parallel.parallel_state_sp
import deepspeed.runtime.sequence_parallel.ulysses_sp
import torch
import transformers
import transformers.models.llama.modeling_llama

import ulysses_exp.rank.checkpoints.fingerprints
import ulysses_exp.rank.metrics.collectives
import ulysses_exp.rank.worker
from ulysses_exp.config import stages
from ulysses_exp.launch.environment import remove_empty_cache
from ulysses_exp.rank.upstream import without_operators_of_its_own

for name in stages.OWN:  # what other packages bring is imported by ranks: it may do more than it says
    for work in stages.stage(name).work.values():
        stages.resolve(work.function)

# The first ZeRO engine imports Muon, whose decorators import torch._inductor (DeepSpeed 0.19.8: 1.4 s of start-up for
# an optimizer that is not offered here). Undecorated it is the same function, not compiled.
compiled = torch.compile
torch.compile = lambda model=None, **_: (lambda f: f) if model is None else model  # type: ignore[assignment]
try:
    import deepspeed.runtime.zero.muon.original_muon
finally:
    torch.compile = compiled

without_operators_of_its_own()

remove_empty_cache()

# What was imported stays for good, so no rank's garbage collector needs to walk it: ZeRO 3 alone asks for a full
# collection of 0.8 s when it is built.
gc.collect()
gc.freeze()

__all__ = ["deepspeed", "transformers", "ulysses_exp"]
