"""The corpus as a Markdown file.

`PYTHONPATH=tests:tests/support python -m corpus.table` writes it.
"""

from pathlib import Path

from .annotations import BOXES, ENTRIES, FILES, MASKS, VALIDATION
from .case import FUNCTION, OWN, REGISTERED, Case
from .configs import COMBINATIONS, KEYS, YAML
from .functions import CASES as FUNCTIONS
from .images import CASES as IMAGES
from .resumes import CASES as RESUMES
from .weights import CASES as WEIGHTS

DOC = Path(__file__).parents[2] / "docs" / "faulty_inputs.md"
GROUPS: dict[str, list[Case]] = {
    "Annotation files": FILES,
    "Entries of annotation files": ENTRIES,
    "Boxes": BOXES,
    "Masks": MASKS,
    "Validation sets": VALIDATION,
    "Dicts of functions": FUNCTIONS,
    "Images": IMAGES,
    "Config files": YAML,
    "Values of keys": KEYS,
    "Combinations": COMBINATIONS,
    "Weights": WEIGHTS,
    "Resumed runs": RESUMES,
}
CASES = [case for cases in GROUPS.values() for case in cases]
_WAYS = {
    (OWN,): "options",
    (REGISTERED,): "registered",
    (OWN, REGISTERED): "both",
    (FUNCTION,): "function",
}
_HEAD = """\
# Faulty inputs, and what comes of them

Written by `PYTHONPATH=tests:tests/support python -m corpus.table` from the cases in
`tests/corpus/`: {count} faulty inputs, each made from a good run of `tools/train_net.py` (four
training images, two for validation) and started through it. `pytest -m slow tests/corpus` runs
them all.

*Refused* means: one line on stderr with the parts given here, exit status 2, before the training
starts, no traceback. *Handled* means: the run trains and evaluates to its end; where a part is
given here, it is printed. What a dataset's faults are is listed one by one in
`OUTPUT_DIR/dataset_faults.txt`. *Options* are `--train-json` and its like, *registered* are names
in `DATASETS`, of COCO's files; a *function* is one that a user registers under such a name, which
returns Detectron2's dicts.

Every image file of every dataset is looked at before a run: a JPEG's header and end, other formats
whole. What only decoding a JPEG can tell ends the run at that image, with its name. With
`DATALOADER.SKIP_UNREADABLE True`, images that are missing or cannot be read are skipped instead,
counted in the log and listed in `OUTPUT_DIR/skipped_images_DATASET.txt`; for that, all images are
decoded once before they are used. In evaluation, the objects of a skipped image count as missed.
"""


def table() -> str:
    """The whole text of the file."""
    parts = [_HEAD.format(count=len(CASES))]
    for title, cases in GROUPS.items():
        lines = [f"## {title}", "", "| case | how it is made | dataset | outcome | says |"]
        lines += ["|---|---|---|---|---|", *map(_row, cases), ""]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def _row(case: Case) -> str:
    says = " … ".join(f"`{part}`" for part in case.says)
    cells = (case.name, case.how, _WAYS[case.ways], case.outcome, says)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    DOC.write_text(table(), "utf-8")
    print(f"{DOC}: {len(CASES)} cases")
