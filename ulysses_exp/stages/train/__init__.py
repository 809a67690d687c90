"""Stage `train`: optimizer steps, their metrics, and a checkpoint at the end."""

from ulysses_exp.config.stages import Stage, Work

STAGE = Stage(
    name="train",
    about="optimizer steps, their metrics, and a checkpoint",
    rules="ulysses_exp.stages.train.rules:check",
    parent="ulysses_exp.stages.train.parent:run",
    work={
        "train": Work("ulysses_exp.stages.train.rank:train", "training", needed=True),
        "try_length": Work("ulysses_exp.stages.train.length:try_length", "trying a length"),
    },
    view="ulysses_exp.stages.train.view",
    results=(
        "steps",
        "loss",
        "grad_norm",
        "tokens_per_second",
        "step_time_s",
        "model_flops_per_step",
        "hardware_flops_per_step",
        "mfu",
        "hfu",
        "peak_memory_bytes",
        "communication",
        "checkpoint",
        "weights_identical_across_ranks",
    ),
    trains=True,
    from_checkpoint=True,
)
