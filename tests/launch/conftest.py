import contextlib
import os
from pathlib import Path

import pytest

from ulysses_exp.launch.server import Server


@contextlib.contextmanager
def serving(module):
    """A server that has imported `module`; its forks find the tests' modules."""
    before = os.environ.get("PYTHONPATH")
    here = Path(__file__).resolve()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here.parents[2]), str(here.parent)])
    made = Server(module)
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    yield made
    made.kill()


@pytest.fixture(scope="module")
def server():
    """One that has imported next to nothing."""
    with serving("ulysses_exp.launch.supervision") as made:
        yield made


@pytest.fixture
def importing_server():
    """One whose imports do not end."""
    with serving("made_up_preload") as made:
        yield made
