"""Versions: of what the project needs, whether they are in its ranges, and whether they want each other."""

from __future__ import annotations

import importlib.util
import platform
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ulysses_exp.config import accelerators
from ulysses_exp.doctor.finding import Asked, Finding, ok, warning, wrong

PROJECT = "ulysses-exp"
#: What the extras bring. Those that serve developers of this project are not looked at.
_FOR_USERS = ("hub", "dashboard", "slurm", "optuna")
#: Kernels that are used where they are installed: module, package
_KERNELS = {"flash_attn": "flash-attn", "liger_kernel": "liger-kernel"}


def check(asked: Asked) -> Iterator[Finding]:
    """A finding a package, then one for the packages that they need in turn, then the optional ones."""
    python, needed = declared()
    yield _python(python)
    plain = [r for r in needed if r.marker is None]
    for requirement in plain:
        yield _installed(requirement)
    unmet = sorted(set(_unmet([r.name for r in plain])))
    if unmet:
        yield wrong("together", "; ".join(unmet), f"pip install --upgrade {PROJECT}, or make setup in a checkout")
    else:
        yield ok("together", "each has the versions of others that it asks for")
    wanted = {"hub"} if asked.config.data.name == "hub" else set()
    wanted |= {"slurm"} if asked.config.launch.name == "slurm" else set()
    for extra in _FOR_USERS:
        yield _extra(extra, [r for r in needed if r.marker and r.marker.evaluate({"extra": extra})], extra in wanted)
    if accelerators():
        for module, package in _KERNELS.items():
            there = importlib.util.find_spec(module) is not None
            yield ok(package, version(package) if there else f"not installed (optional): pip install {package}")


def declared() -> tuple[str, list[Requirement]]:
    """(Python versions, requirements) of this project: of its checkout, else of the installed package."""
    checkout = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if checkout.is_file() and (project := tomllib.loads(checkout.read_text())["project"])["name"] == PROJECT:
        lines = list(project["dependencies"])
        for extra, more in project["optional-dependencies"].items():
            lines += [f'{line}; extra == "{extra}"' for line in more]
        return project["requires-python"], [Requirement(line) for line in lines]
    return metadata(PROJECT)["Requires-Python"], [Requirement(line) for line in requires(PROJECT) or ()]


def _python(needed: str) -> Finding:
    from packaging.specifiers import SpecifierSet

    here = platform.python_version()
    if not SpecifierSet(needed).contains(here, prereleases=True):
        return wrong("python", f"{here}, {needed} is needed", "make a new environment: make PYTHON=... setup")
    return ok("python", f"{here} ({needed})")


def _installed(requirement: Requirement) -> Finding:
    name, needed = requirement.name, str(requirement.specifier)
    install = f"pip install '{name}{needed}'"
    try:
        here = version(name)
    except PackageNotFoundError:
        return wrong(name, f"not installed, {needed} is needed", install)
    if not requirement.specifier.contains(here, prereleases=True):
        return wrong(name, f"{here}, {needed} is needed", install)
    # The lower bound of DeepSpeed is the version that the workarounds (attention/upstream.py and others) were written
    # against; a later one may have mended, or moved, what they work around.
    least = next((s.version for s in requirement.specifier if s.operator == ">="), here)
    if name == "deepspeed" and here != least:
        return warning(
            name,
            f"{here}, the workarounds were written against {least}",
            f"pip install deepspeed=={least}, or prove your layout: stages=[parity]",
        )
    return ok(name, f"{here} ({needed})")


def _unmet(names: list[str]) -> Iterator[str]:
    """What the packages `names`, and those that they need, ask of each other and do not get."""
    seen: set[str] = set()
    while names:
        name = canonicalize_name(names.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            lines = distribution(name).requires or ()
        except PackageNotFoundError:
            continue  # told by whoever asks for it
        for line in lines:
            requirement = Requirement(line)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            names.append(requirement.name)
            try:
                here = version(requirement.name)
            except PackageNotFoundError:
                yield f"{name} needs {requirement.name}, which is not installed"
                continue
            if not requirement.specifier.contains(here, prereleases=True):
                yield f"{name} needs {requirement.name} {requirement.specifier}, {here} is installed"


def _extra(extra: str, needed: list[Requirement], wanted: bool) -> Finding:
    found: list[str] = []
    missing: list[str] = []
    for requirement in needed:
        try:
            here = version(requirement.name)
        except PackageNotFoundError:
            missing.append(requirement.name)
            continue
        good = requirement.specifier.contains(here, prereleases=True)
        (found if good else missing).append(f"{requirement.name} {here}" + ("" if good else " (too old or new)"))
    install = f"pip install '{PROJECT}[{extra}]'"
    if not missing:
        return ok(extra, f"{', '.join(found)} (optional)")
    if wanted:
        return wrong(extra, f"{', '.join(missing)} not installed, which these settings need", install)
    return ok(extra, f"{', '.join(missing)} not installed (optional): {install}")
