"""What happens between the call of the attention function and the original one: collectives, tensors that move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ulysses_exp.model.attention.upstream import entry


class Collectives(TorchDispatchMode):
    """Counts every collective of this process while the context is open, where torch hands it to the backend.

    Attributes:
        calls: by (name of the operation, ranks in its group, whether an attention function had been called).
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, int, bool]] = Counter()
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1].strip("_").removesuffix("_base")
            self.calls[name, _ranks(args), self.inside] += 1
        elif func.namespace not in (
            "aten",
            "prims",
        ):  # an operator made in Python, as DeepSpeed's exchange: look inside
            key = torch._C.DispatchKey.CUDA if torch.cuda.is_initialized() else torch._C.DispatchKey.CPU
            with self:
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def count(self, inside: bool | None = None, all_to_all: bool | None = None) -> int:
        """Calls, of those inside or outside of attention functions, of all-to-alls or others, where that is asked."""
        return sum(
            calls
            for (name, _, within), calls in self.calls.items()
            if inside in (None, within) and all_to_all in (None, "alltoall" in name)
        )

    def by_name(self) -> dict[str, int]:
        """Calls by operation and ranks, e.g. `allreduce of 2`."""
        found: Counter[str] = Counter()
        for (name, ranks, _), calls in self.calls.items():
            found[f"{name} of {ranks}"] += calls
        return dict(sorted(found.items()))


def _ranks(args: Any) -> int:
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return int(dist.ProcessGroup.unbox(argument).size())
    return dist.get_world_size()


Seen = list[tuple[tuple[tuple[int, int], ...], tuple[int, ...], bool]]


class AttentionCalls:
    """The calls of attention as the model makes them, and as they arrive where whole sequences are attended to.

    Of each call they note address and offset of query, key and value, the query's shape, and whether there was a mask.
    """

    def __init__(self) -> None:
        self.came: Seen = []  # from the model
        self.arrived: Seen = []  # at the attention over whole sequences
        self.collectives: Collectives | None = None
        self._inside: set[int] = set()  # lists whose function is under way: it may call another that is noted there
        self._held: list[torch.Tensor] = []  # an address that is free again could be given twice

    @contextmanager
    def behind(self, name: str) -> Iterator[None]:
        """What is registered from now on finds a function of this name that notes what arrives."""
        with entry(ALL_ATTENTION_FUNCTIONS, name):
            ALL_ATTENTION_FUNCTIONS[name] = self.arriving(ALL_ATTENTION_FUNCTIONS[name])
            yield

    @contextmanager
    def before(self, name: str) -> Iterator[None]:
        """What is registered under this name now is called through one that notes what comes."""
        with entry(ALL_ATTENTION_FUNCTIONS, name):
            ALL_ATTENTION_FUNCTIONS[name] = self._noting(ALL_ATTENTION_FUNCTIONS[name], self.came)
            yield

    def arriving(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, an attention over whole sequences, noting its calls."""
        return self._noting(function, self.arrived)

    @contextmanager
    def counted(self) -> Iterator[Collectives]:
        """Forgets the calls so far and counts collectives."""
        self.came.clear()
        self.arrived.clear()
        with Collectives() as collectives:
            self.collectives = collectives
            try:
                yield collectives
            finally:
                self.collectives = None
                self._held.clear()

    def moved(self) -> int:
        """Calls whose query, key or value are not the ones that the model gave, or that never arrived."""
        arrived = [tensors for tensors, _, _ in self.arrived]
        return sum(tensors not in arrived for tensors, _, _ in self.came)

    def _noting(self, function: Callable[..., Any], seen: Seen) -> Callable[..., Any]:
        def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
            if self.collectives is None or id(seen) in self._inside:
                return function(module, query, key, value, mask, *args, **kwargs)
            tensors = (query, key, value)
            self._held += tensors
            places = tuple((t.data_ptr(), t.storage_offset()) for t in tensors)
            seen.append((places, tuple(query.shape), mask is not None))
            was, self.collectives.inside = self.collectives.inside, True
            self._inside.add(id(seen))
            try:
                return function(module, query, key, value, mask, *args, **kwargs)
            finally:
                self.collectives.inside = was
                self._inside.discard(id(seen))

        return attention
