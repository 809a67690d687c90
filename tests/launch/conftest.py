import os
from pathlib import Path

import pytest

from ulysses_exp.launch.server import Server


@pytest.fixture(scope="module")
def server():
    """A server that has imported next to nothing; its forks find the tests' modules."""
    before = os.environ.get("PYTHONPATH")
    here = Path(__file__).resolve()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here.parents[2]), str(here.parent)])
    made = Server("ulysses_exp.launch.supervision")
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    yield made
    made.kill()
