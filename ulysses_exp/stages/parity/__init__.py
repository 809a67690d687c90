"""Stage `parity`: the same optimizer steps in the configured layout and in a single process, compared."""

from ulysses_exp.config.stages import Stage, Work

STAGE = Stage(
    name="parity",
    about="the first steps of this layout, held against one process",
    rules="ulysses_exp.stages.parity.rules:check",
    parent="ulysses_exp.stages.parity.parent:run",
    work={"trajectory": Work("ulysses_exp.stages.parity.rank:trajectory", "training for parity")},
    view="ulysses_exp.stages.parity.view",
    results=("reference", "max_rel_loss_diff", "max_rel_grad_norm_diff", "max_rel_weight_diff"),
    trains=True,
)
