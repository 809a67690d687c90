"""Stage `reload`: the checkpoint opened in other layouts, compared bit for bit, and trained on from."""

from ulysses_exp.config.stages import Stage, Work

STAGE = Stage(
    name="reload",
    about="the checkpoint at other layouts and in transformers alone, bit for bit",
    rules="ulysses_exp.stages.reload.rules:check",
    parent="ulysses_exp.stages.reload.parent:run",
    after_training="ulysses_exp.stages.reload.parent:after_training",
    work={
        "reload": Work("ulysses_exp.stages.reload.rank:reload", "reloading"),
        "continuation": Work("ulysses_exp.stages.reload.rank:continuation", "continuing"),
    },
    view="ulysses_exp.stages.reload.view",
    results=("cells",),
    trains=True,
    from_checkpoint=True,
)
