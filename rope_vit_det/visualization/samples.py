"""What tools/visualize_data.py does: drawing what the training loader feeds."""

import argparse
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.utils.visualizer import Visualizer
from tqdm import tqdm

from ..config.keys import check_input_config, with_settings
from ..config.rules import check_rules
from ..data.classes import dataset_classes
from ..data.loader import build_train_loader
from ..data.validation.check import check_datasets
from ..engine.run_folder import settle_seed
from ..engine.setup import load_config
from ..errors import InputError
from .colours import class_metadata
from .sheets import check_no_other_run, fit_scale, make_sheet, write_picture

_PANEL = (440, 400)  # pixels, of the sheet
_COLUMNS = 4
SHEET = "sheet.jpg"


def run(args: argparse.Namespace) -> None:
    """Draws the first samples of a training, each in a PNG of its own, and all on one sheet.

    Args:
        args: of a command line with --config-file, --output-dir, --number, KEY VALUE pairs, and the
            options of :func:`~rope_vit_det.engine.command_line.add_own_data_options`.

    Raises:
        InputError: for a wrong config or data; nothing was written.
    """
    if args.number < 1:
        raise InputError(f"--number is {args.number}; allowed: 1 or more")
    args.eval_only = False
    cfg = load_config(args)
    settings = {"DATASETS.TEST": (), "DATALOADER.NUM_WORKERS": 0, "SEED": settle_seed(cfg.SEED)}
    cfg = with_settings(cfg, settings)
    check_rules(cfg)
    check_input_config(cfg)
    check_datasets(cfg)
    pictures: dict[str, np.ndarray] = {}
    panels = []
    loader = chain.from_iterable(build_train_loader(cfg))
    samples = tqdm(islice(loader, args.number), "drawing", args.number, disable=None)
    classes = dataset_classes(cfg.DATASETS.TRAIN[0])
    if classes is None:
        raise InputError(
            f"dataset {cfg.DATASETS.TRAIN[0]!r} has no objects to draw, or none whose classes have "
            "names; those are thing_classes in its MetadataCatalog entry"
        )
    metadata = class_metadata(classes["names"])
    for sample in samples:
        name = Path(sample["file_name"]).stem
        pictures[f"{len(pictures):03d}_{name}.png"] = draw_sample(sample, cfg, metadata)
        panels.append(draw_sample(sample, cfg, metadata, panel=_PANEL))
    folder = Path(args.output_dir)
    check_no_other_run(folder, pictures)
    for name, picture in pictures.items():
        write_picture(picture, folder / name)
    sheet = make_sheet(panels, _COLUMNS, _PANEL[0])
    write_picture(sheet, folder / SHEET)
    print(f"written: {folder}, {len(pictures)} samples, and all of them on {SHEET}")


def draw_sample(
    sample: dict[str, Any], cfg: CfgNode, metadata: Any, *, panel: tuple[int, int] | None = None
) -> np.ndarray:
    """The image that the network gets, with its boxes, masks, keypoints and class names.

    Args:
        sample: of the training loader.
        metadata: of :func:`~rope_vit_det.visualization.colours.class_metadata`.
        panel: (width, height) to fit the picture into; None: the size of the image.

    Returns:
        RGB, uint8.

    Raises:
        InputError: the loader feeds no instances.
    """
    if "instances" not in sample:
        architecture = cfg.MODEL.META_ARCHITECTURE
        raise InputError(f"MODEL.META_ARCHITECTURE {architecture} is fed no instances to draw")
    image = convert_image_to_rgb(sample["image"].permute(1, 2, 0), cfg.INPUT.FORMAT)
    image = image.astype(np.uint8)
    target = sample["instances"]
    classes = target.gt_classes.tolist()
    canvas = Visualizer(image, metadata, fit_scale(image, panel) if panel else 1.0)
    canvas.overlay_instances(
        boxes=target.gt_boxes if target.has("gt_boxes") else None,
        masks=target.gt_masks if target.has("gt_masks") else None,
        keypoints=target.gt_keypoints if target.has("gt_keypoints") else None,
        labels=[metadata.thing_classes[i] for i in classes],
        assigned_colors=[np.array(metadata.thing_colors[i]) / 255 for i in classes],
    )
    return canvas.output.get_image()
