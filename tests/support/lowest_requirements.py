"""The lowest versions that pyproject.toml allows, one a line, to hand to pip as constraints."""

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def lowest_requirements() -> list[str]:
    project = tomllib.loads(PYPROJECT.read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = set(project["dependencies"])
    lines.update(*(extras[name] for name in ("convert", "export", "openvino", "predict", "test")))
    return sorted(line.replace(">=", "==") for line in lines if re.fullmatch(r"[\w-]+>=.+", line))


if __name__ == "__main__":
    print(*lowest_requirements(), sep="\n")
