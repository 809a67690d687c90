"""The installed package holds what the checkout does, and runs from any folder."""

import os
import subprocess
import sys
import venv
from pathlib import Path

from checkout import ROOT


def test_the_installed_command_works_without_the_checkout(tmp_path: Path):
    """In an environment of its own that sees this one's dependencies, but not this checkout."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    built = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(ROOT)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert (site / "ulysses_exp" / "conf" / "model" / "tiny_llama.yaml").exists()
    assert (site / "ulysses_exp" / "py.typed").exists()
    tops = ROOT / "ulysses_exp", site / "ulysses_exp"
    ours, its = ({str(path.relative_to(top)) for path in top.rglob("*.py")} for top in tops)
    assert ours == {name for name in its if not name.startswith("conf/")}
    here = next(Path(p) for p in sys.path if p.endswith("site-packages"))
    (site / "dependencies.pth").write_text(f"import sys; sys.path.append({str(here)!r})\n")
    elsewhere = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # a launch in this process sets it
    done = subprocess.run(
        [str(python), "-c", "from ulysses_exp.cli import main; main()", "sp.size=3"],
        capture_output=True, text=True, cwd=tmp_path, env=elsewhere,
    )  # fmt: skip
    assert done.returncode == 2 and "do not divide over sp 3" in done.stderr, done.stderr
    asked = subprocess.run(
        [str(python), "-c", "from ulysses_exp.config.paths import CONF; print(CONF)"],
        capture_output=True, text=True, cwd=tmp_path, env=elsewhere,
    )  # fmt: skip
    assert asked.stdout.strip() == str(site / "ulysses_exp" / "conf")
