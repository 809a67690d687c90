"""Stage `plan`: what a layout needs and takes on a machine that is not here. Starts no ranks."""

from ulysses_exp.config.stages import Stage

STAGE = Stage(
    name="plan",
    about="memory, traffic and time of the layout on GPUs that are not here (plan.hardware)",
    rules="ulysses_exp.stages.plan.rules:check",
    parent="ulysses_exp.stages.plan.parent:run",
    view="ulysses_exp.stages.plan.view",
    results=("peak_memory_bytes_per_rank", "all_to_all_bytes_per_step", "fits"),
    ranks=False,
)
