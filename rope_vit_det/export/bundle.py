"""What lies beside an exported file in a folder to hand over."""

import json
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from ..config.run_config import shipped

_EXAMPLES = shipped("examples")
_NEEDS = {
    ".ts": "pillow torch torchvision",
    ".pt2": "torch",
    ".onnx": "pillow onnxruntime",
    ".xml": "pillow openvino",
}
_MADE_WITH = ("rope-vit-det", "detectron2", "torch", "onnx", "onnxruntime", "openvino", "nncf")
_README = """\
# {name}

{what}. To run it:

```sh
pip install numpy {needs}
python {runner} {name}{arguments}
```

`info.json` names its classes, and says which images it takes, how good it is, what it was trained
from and under which licence.
"""


def write_bundle(
    file: Path, part: str, what: str, info: Mapping[str, Any], ap: Mapping[str, float] | None
) -> None:
    """Puts a README, the script that runs the file, and info.json beside it.

    Args:
        file: exported.
        part: "detector" or "backbone".
        what: the file is, in words.
        info: what the file says about itself.
        ap: of it, by task, of 100; None: not measured.
    """
    versions: dict[str, str] = {}
    for each in metadata.distributions():
        if each.name in _MADE_WITH:
            versions.setdefault(each.name, each.version)  # the first is what is imported
    date = datetime.now(UTC).isoformat(timespec="seconds")
    more = {"AP": ap, "date": date, "versions": versions}
    text = json.dumps({**info, **more}, indent=2, ensure_ascii=False)
    (file.parent / "info.json").write_text(text + "\n", "utf-8")
    runner = f"run_{part}.py"
    shutil.copy(_EXAMPLES / runner, file.parent)
    text = _README.format(
        name=file.name,
        what=what[0].upper() + what[1:],
        needs=_NEEDS[file.suffix],
        runner=runner,
        arguments=" photo.jpg drawn.png" if part == "detector" else "",
    )
    (file.parent / "README.md").write_text(text, "utf-8")
