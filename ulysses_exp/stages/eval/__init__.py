"""Stage `eval`: held-out loss with sequence parallelism bypassed, with it on, or both and compared."""

from ulysses_exp.config.stages import Stage, Work

STAGE = Stage(
    name="eval",
    about="held-out loss, bypassed, with sequence parallelism, or both and compared (eval.mode)",
    rules="ulysses_exp.stages.eval.rules:check",
    parent="ulysses_exp.stages.eval.parent:run",
    after_training="ulysses_exp.stages.eval.parent:after_training",
    work={"eval": Work("ulysses_exp.stages.eval.rank:evaluate", "evaluating")},
    view="ulysses_exp.stages.eval.view",
    results=("mode",),
    from_checkpoint=True,
)
