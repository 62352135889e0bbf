"""What a training program does before anything else."""

import os
import subprocess
import sys

# Not the coercion and the UTF-8 mode by which Python 3.7 and later leave the POSIX locale.
ASCII = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PROGRAM = """
from megatron_ring.training.entry import read_files_as_utf8
def readable():
    try:
        return len(open("text").read())
    except UnicodeDecodeError:
        return None
print(readable(), end=" ")
read_files_as_utf8()
print(readable())
"""


def test_files_are_utf_8_in_an_ascii_locale_too(tmp_path):
    (tmp_path / "text").write_bytes("größe".encode())
    environment = {**os.environ, **ASCII, "PYTHONPATH": os.getcwd()}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["None", "5"]
