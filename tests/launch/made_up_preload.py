"""What a server imports that never ends: it waits for a compiler, or for a file system that is gone."""

import subprocess

subprocess.run(["sleep", "61.5"])
