"""How many tiles a sequence is cut into."""

from __future__ import annotations

#: Positions of a tile where the number of tiles follows the length (`AUTO`). ALST takes tiles of as many tokens as the
#: model is wide, 4,096 for Llama 8B (deepspeed/runtime/sequence_parallel/ulysses_sp.py, `tiled_mlp_forward`).
TILE = 4096
AUTO = -1


def tiles_of(tiles: int, positions: int) -> int:
    """`tiles`, or where it is AUTO as many tiles of TILE as `positions` on this rank need, four at least."""
    return max(4, -(-positions // TILE)) if tiles == AUTO else tiles
