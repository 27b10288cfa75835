"""--help of every tool: quick, and nothing else on the screen."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

TOOLS = sorted(path.stem for path in (Path(__file__).parents[2] / "tools").glob("*.py"))
NO_HELP = {"check_opencv"}  # a script of make, without arguments


def show_help(tool):
    command = [sys.executable, Path("tools", f"{tool}.py"), "--help"]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True
    )


def seconds(call):
    """The least of three, which is what the work takes; the rest is the machine's."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool not in NO_HELP])
def test_help_and_nothing_else(tool):
    answer = show_help(tool)
    assert answer.stderr == ""
    assert answer.stdout.startswith("usage: ") and "--help" in answer.stdout


@pytest.mark.slow
@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool not in NO_HELP])
def test_help_takes_little_more_than_torch(tool):
    importing = [sys.executable, "-c", "import torch"]
    torch = seconds(lambda: subprocess.run(importing, check=True))
    assert seconds(lambda: show_help(tool)) <= 1.5 * torch + 0.3
