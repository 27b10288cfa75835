"""What a command line prints."""

import os
import subprocess
import sys
from importlib import metadata

import pytest

from rope_vit_det.errors import InputError, check_packages


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


def test_a_package_that_is_missing_or_too_old_is_named(monkeypatch):
    wanted = ['supervision>=0.31.2; extra == "convert"', "tqdm>=4.66"]
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    check_packages("supervision", extra="convert")
    monkeypatch.setattr(metadata, "version", {"supervision": "0.30.9"}.__getitem__)
    with pytest.raises(InputError, match=r"supervision>=0.31.2 \(here: 0\.30\.9\).*\[convert"):
        check_packages("supervision", extra="convert")
    with pytest.raises(InputError, match="this needs no_such_package: pip install"):
        check_packages("no_such_package", extra="convert")
