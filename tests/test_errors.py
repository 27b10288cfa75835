"""What a command line prints."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [("ascii", "\\u732b \\u2026"), ("latin-1", "\\u732b \\u2026"), ("utf-8", "猫 …")],
)
def test_what_stdout_cannot_encode_is_escaped(encoding, printed):
    code = """
from rope_vit_det.errors import InputError, input_errors_as_one_line
with input_errors_as_one_line():
    print("猫 …")
    raise InputError("猫")
"""
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.getcwd(), "PYTHONIOENCODING": encoding},
    )
    assert answer.stdout.decode(encoding).strip() == printed
    assert answer.returncode == 2 and answer.stderr.decode(encoding).startswith("error: ")
