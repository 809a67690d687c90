"""What a job can be asked to do: a folder a stage, and a line in `config/stages.py`.

A folder has what of these it needs: `rules.py` (what must hold before a rank starts), `parent.py` (which tasks the
ranks get), `rank.py` (the work), `view.py` (how its result is shown). The first two import neither torch nor the third.

For packages that bring a stage of their own: `Stage` and `Work` describe it, `ConfigError` is for its rules.
"""

from ulysses_exp.config.errors import ConfigError
from ulysses_exp.config.stages import Stage, Work

__all__ = ["ConfigError", "Stage", "Work"]
