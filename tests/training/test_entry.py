"""The settings that a training program makes before anything else runs."""

import os
import subprocess
import sys

# Without locale coercion and UTF-8 mode, by which Python 3.7 and later avoid the POSIX locale.
ASCII = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PROGRAM = """
from megatron_ring.parallel.entry_point import read_files_as_utf8
def readable():
    try:
        return len(open("text").read())
    except UnicodeDecodeError:
        return None
print(readable(), end=" ")
read_files_as_utf8()
print(readable())
"""


def test_files_are_read_as_utf_8_even_in_an_ascii_locale(tmp_path):
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
