"""What every rank imports, imported once: the forkserver loads this module and each rank is a fork of it.

Only imports: a torch operation here would start threads that a fork does not inherit.
"""

import os

from ulysses_exp.launch.orphans import OWNER, die_with_parent

if OWNER in os.environ:
    die_with_parent(int(os.environ[OWNER]))  # the forkserver with its job, also while it still imports

import deepspeed
import deepspeed.runtime.sequence_parallel.parallel_state_sp
import deepspeed.runtime.sequence_parallel.ulysses_sp
import deepspeed.runtime.zero.muon.original_muon  # the first ZeRO engine imports it, and with it torch._inductor
import transformers
import transformers.models.llama.modeling_llama

import ulysses_exp.worker

__all__ = ["deepspeed", "transformers", "ulysses_exp"]
