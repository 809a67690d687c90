"""What a caller may not tell a mixer beside what the forward is known to be."""

from __future__ import annotations

from typing import Any

#: Documents as the kernels take them, and states of a cache
_OTHERWISE = ("cu_seqlens", "seq_idx", "initial_state", "initial_states")


def check(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a token-mixing function without those of `_OTHERWISE`.

    Raises:
        ValueError: one of them says something.
    """
    for name in _OTHERWISE:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name} in a forward of packed documents or under sequence parallelism; give position_ids, which "
                "start at 0 in every document, and no cache"
            )
    return {name: value for name, value in kwargs.items() if name not in _OTHERWISE}
