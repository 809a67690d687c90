"""Wheels of what a machine without a network lacks that has torch and transformers: the rest of the dependencies.

    python benchmarks/gpu_wheels.py [FOLDER] [--python 3.12]

`make wheels` does this, from the versions in .venv. FOLDER (default: wheels) also gets requirements.txt, by which pip
installs what is missing there and leaves what is there already:

    pip install --no-index --find-links wheels -r wheels/requirements.txt
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
THERE = {"torch", "transformers"}  # with all that they need
OF_TESTS = {"pytest", "pytest-timeout", "pytest-xdist"}  # for make test-gpu
BUILT = {"deepspeed", "antlr4-python3-runtime"}  # there are no wheels of these; they hold no compiled code


def wanted() -> list[Requirement]:
    """What pyproject.toml asks for, without what is there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    of_tests = [r for r in map(Requirement, project["optional-dependencies"]["dev"]) if r.name in OF_TESTS]
    return [r for r in map(Requirement, project["dependencies"]) if r.name not in THERE] + of_tests


def closure(requirements: list[Requirement]) -> dict[str, str]:
    """Versions by name of all that is needed for `requirements`, as installed here."""
    found: dict[str, str] = {}
    names = [r.name for r in requirements]
    while names:
        name = canonicalize_name(names.pop())
        if name in found or name in THERE:
            continue
        there = distribution(name)
        found[name] = there.version
        needed = map(Requirement, there.requires or ())
        names += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "wheels")
    parser.add_argument("--python", help="the version there, where it is another than here")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    needed = closure(wanted())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    exact = {name: f"{name}=={version}" for name, version in needed.items()}
    download = [*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", str(options.folder)]
    download += ["--python-version", options.python] if options.python else []
    subprocess.run([*download, *(exact[name] for name in sorted(needed.keys() - BUILT))], check=True)
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(options.folder)]
    subprocess.run([*build, *(exact[name] for name in sorted(needed.keys() & BUILT))], check=True)
    (options.folder / "requirements.txt").write_text("".join(f"{r}\n" for r in wanted()))
    size = sum(path.stat().st_size for path in options.folder.glob("*.whl"))
    print(f"{len(list(options.folder.glob('*.whl')))} wheels, {size / 1e6:.0f} MB, in {options.folder}")


if __name__ == "__main__":
    main()
