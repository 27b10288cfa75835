"""What a run was started with, so that it can be told, and repeated, later."""

import json
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
RECORD_FILE = "runs.json"


def record_run(output: str, seed: int) -> None:
    """Adds a line to OUTPUT_DIR/runs.json; earlier lines, of a run that is resumed, stay.

    Args:
        output: the folder, in which Detectron2's `default_setup` has just written config.yaml.
        seed: of the run, also where it was drawn.
    """
    config = Path(output, "config.yaml")
    row = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "seed": seed,
        "git_revision": git_revision(),
        "python": sys.version.split()[0],
        "versions": {
            each.metadata["Name"]: each.version
            for each in sorted(metadata.distributions(), key=lambda d: d.metadata["Name"] or "")
        },
        "config": config.read_text("utf-8") if config.is_file() else None,
    }
    with Path(output, RECORD_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def git_revision() -> str | None:
    """The commit of this package's repository, "-dirty" behind it where files were changed.

    None where the package lies in no repository of its own, as when it is installed from a wheel.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PACKAGE), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != PACKAGE.parent:
            return None  # another project's, in which we lie in a virtual environment
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
