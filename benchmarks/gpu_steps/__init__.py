"""The steps of `benchmarks/gpu.py`, the most important first."""

from gpu_steps.step import Step

STEPS = (
    Step("start", "do ranks start, as forks and spawned?", 150),
    Step("kernels", "which attention kernels are right, how fast are they, and which does sdpa take?", 360),
    Step("two_ranks", "sp 2 on one GPU, from training to reload", 240),
    Step("parity", "the numbers of sp 2 beside one process", 300),
    Step("plan", "planned bytes beside the allocator's", 240),
    Step("speed", "step time and MFU of layers as in Llama 8B, up to the longest sequence", 360),
    Step("many", "one rank a GPU, over NCCL", 420, gpus=2),
    Step("ladder", "what each memory saver costs and saves", 300),
    Step("checkpoints", "rates of saving and loading", 180),
    Step("out_of_memory", "what a run says that runs out of memory, and how soon", 240),
    Step("loss", "torch's linear_cross_entropy beside this project's losses", 180),
)
