"""A stage of one's own: counts the parameters on every rank."""

from dataclasses import dataclass

from ulysses_exp.stages import Stage, Work


@dataclass
class Settings:
    """Its section of the configuration: probe.trainable=true."""

    trainable: bool = False  # count those alone that are trained


def count(session):
    """On every rank: `session` is an `ulysses_exp.rank.session.Session`."""
    import torch.distributed as dist  # here: the command that reads this file has no torch

    parameters = session.engine.module.parameters()
    counted = [p for p in parameters if p.requires_grad or not session.config.probe.trainable]
    mine = sum(getattr(p, "ds_numel", p.numel()) for p in counted)
    everybodys = [0] * session.layout.world
    dist.all_gather_object(everybodys, mine)
    return {"status": "ok", "parameters": everybodys}


def facts(result, arrow):
    """Its row in the summary, also of a job in which it failed."""
    if result["status"] != "ok":
        return [("probe", f"{result['status']}: {result.get('reason')}")]
    return [("probe", " and ".join(f"{n:,}" for n in result["parameters"]) + " parameters on the ranks")]


stage = Stage(
    name="probe",
    about="parameters on every rank",
    work={"probe": Work("probe_stage:count", "counting")},
    view="probe_stage",
    settings=Settings,
    results=("parameters",),
)
