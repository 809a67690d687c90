"""Hidden states to loss and back, by each way that there is: what tells whether this project's losses are needed."""

from __future__ import annotations

from collections.abc import Iterator

from gpu_steps.step import Row, Setting


def parts(setting: Setting) -> list[str]:
    from losses import WAYS

    return setting.pick(list(WAYS), [";".join(WAYS)])


def run(setting: Setting, part: str) -> Iterator[Row]:
    """Args: part: names in losses.WAYS."""
    import torch
    from losses import Missing, measure

    small = {"tokens": 2048, "hidden": 4096, "vocabulary": 128_256}  # of Llama 8B
    sizes = setting.pick([small, small | {"tokens": 32_768}], [{"tokens": 64, "hidden": 32, "vocabulary": 128}])
    for way in part.split(";"):
        for size in sizes:
            for dtype in ("bfloat16", "float32"):
                row: Row = {"way": way, **size, "type": dtype}
                try:
                    found = measure(way, **size, dtype=dtype, device=setting.device, rounds=3)
                    found["took_s"] = found.pop("seconds")
                except torch.OutOfMemoryError:
                    found = {"became": "out of memory"}
                except Missing as missing:
                    yield {"way": way, "became": str(missing)}
                    return
                yield row | found
