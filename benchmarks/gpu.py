"""The first hour on a GPU: what cannot be known without one, the most important first.

    python benchmarks/gpu.py                    # at most 25 minutes, on one GPU or eight
    python benchmarks/gpu.py --only start,kernels
    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --pretend          # all steps in tiny, on the CPU: is the script itself right?

Each part of a step is a process of its own with a limit on its time, so one that crashes, hangs or runs out of memory
ends alone. Writes benchmarks/results/gpu_<device>.{json,md} after every row; steps that were made before on the same
machine, with the same versions, stay. Pretended ones go to outputs/gpu_pretended.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_steps.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
