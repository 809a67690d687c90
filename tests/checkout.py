"""Where this checkout lies, and what a job leaves in a folder."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def only_run(folder: Path) -> Path:
    """The one run folder below `folder`."""
    (results,) = folder.glob("outputs/**/results.json")
    return results.parent
