"""The shell commands that README and docs show, with the output that they show below them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
_BLOCK = re.compile(r"^```(?:sh|bash|shell|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# In the text, and in tables.
_SPAN = re.compile(r"`((?:python tools/|torchrun )[^`\n]+)`")


@dataclass
class Command:
    """One command, its continued lines joined and its comment left out."""

    text: str
    shown: list[str] = field(default_factory=list)


def commands_of(document: Path) -> list[Command]:
    """Those of the blocks, in the order of the page, and then those within the text.

    Blocks with prompts ("$ ") show output, others have none.
    """
    page = document.read_text()
    in_blocks = [
        command
        for block in _BLOCK.findall(page)
        for command in _commands(block.replace("\\\n", " ").splitlines())
    ]
    return in_blocks + [Command(text) for text in _SPAN.findall(page)]


def _commands(lines: list[str]) -> Iterator[Command]:
    prompts = any(line.startswith("$ ") for line in lines)
    command = None
    for line in lines:
        if prompts and not line.startswith("$ "):
            command.shown.append(line)
            continue
        text = re.sub(r"(^|\s)#.*", "", line.removeprefix("$ "))
        if text.strip():
            command = Command(" ".join(text.split()))
            yield command
