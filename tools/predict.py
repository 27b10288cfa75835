#!/usr/bin/env python3
"""Detects objects: python tools/predict.py --config-file RUN_FOLDER --input photos/ --output drawn

Exit status 2: an input is wrong, for the reason on stderr, and nothing was written. 1: all is
written but for the images that stderr names: damaged inside, or too thin for the network.
"""

import argparse
import sys

from rope_vit_det.errors import input_errors_as_one_line


@input_errors_as_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="PATH", help="a config, or a training's OUTPUT_DIR")
    add("--weights", help="a checkpoint; default: the folder's best, or final")
    add(
        "--input",
        dest="inputs",
        nargs="+",
        required=True,
        metavar="PATH",
        help="images, folders, quoted patterns (photos/**/*.jpg), or a video",
    )
    add("--output", metavar="FOLDER", help="for a PNG an image, or the MP4")
    add("--json", dest="json_file", metavar="FILE", help="for the detections, in COCO's format")
    add("--yolo", metavar="FOLDER", help="for YOLO's data.yaml and labels/")
    add("--label-studio", metavar="FILE", help="for Label Studio's tasks with predictions, JSON")
    add("--confidence-threshold", type=float, default=0.5, metavar="SCORE", help="default: 0.5")
    add("--classes", nargs="+", metavar="NAME", help="only these")
    add(
        "--categories",
        metavar="JSON",
        help="a COCO file with the classes, for a checkpoint that does not hold them",
    )
    add("--batch-size", type=int, default=1, help="images at a time (default: 1)")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--tta", action="store_true", help="Detectron2's test-time augmentation")
    add("--bf16", action="store_true", help="mixed precision with bfloat16")
    add(
        "--slice",
        dest="slice_side",
        type=int,
        metavar="PIXELS",
        help="cut images, of any number of pixels, into slices with this side",
    )
    add("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs over the config")
    args = parser.parse_args()
    from rope_vit_det.prediction.predict_files import run

    sys.exit(run(**vars(args)))


if __name__ == "__main__":
    main()
