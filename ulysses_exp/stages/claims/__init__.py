"""Stage `claims`: what is said of DeepSpeed Ulysses, sentence by sentence, measured in upstream alone and here."""

from ulysses_exp.config.stages import Stage, Work

STAGE = Stage(
    name="claims",
    about="what is said of Ulysses evaluation and checkpoints, sentence by sentence: upstream alone, and here",
    rules="ulysses_exp.stages.claims.rules:check",
    parent="ulysses_exp.stages.claims.parent:run",
    work={
        "claims_model": Work("ulysses_exp.stages.claims.rank:model", "looking at the model", session=False),
        "claims": Work("ulysses_exp.stages.claims.rank:measure", "measuring claims", session=False),
        "claims_open": Work("ulysses_exp.stages.claims.rank:open_checkpoints", "opening checkpoints", session=False),
    },
    view="ulysses_exp.stages.claims.view",
    results=tuple(f"C{number}" for number in range(1, 11)),
    trains=True,
)
