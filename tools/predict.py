#!/usr/bin/env python3
"""Detects objects: python tools/predict.py --config-file RUN_FOLDER --input photos/ --output drawn

Exit status 2: an input is wrong, for the reason on stderr, and nothing was written.
"""

import argparse

from rope_vit_det.errors import input_errors_as_one_line
from rope_vit_det.prediction.predict_files import run


@input_errors_as_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", required=True, metavar="PATH", help="a config, or a training's OUTPUT_DIR"
    )
    parser.add_argument("--weights", help="a checkpoint; default: the folder's best, or final")
    parser.add_argument(
        "--input",
        dest="inputs",
        nargs="+",
        required=True,
        metavar="PATH",
        help="images, folders, quoted patterns (photos/**/*.jpg), or a video",
    )
    parser.add_argument("--output", metavar="FOLDER", help="for a PNG an image, or the MP4")
    parser.add_argument(
        "--json", dest="json_file", metavar="FILE", help="for the detections, in COCO's format"
    )
    parser.add_argument(
        "--confidence-threshold", type=float, default=0.5, metavar="SCORE", help="default: 0.5"
    )
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="only these")
    parser.add_argument(
        "--categories",
        metavar="JSON",
        help="a COCO file with the classes, for a checkpoint that does not hold them",
    )
    parser.add_argument("--batch-size", type=int, default=1, help="images at a time (default: 1)")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--tta", action="store_true", help="Detectron2's test-time augmentation")
    parser.add_argument("--bf16", action="store_true", help="mixed precision with bfloat16")
    parser.add_argument(
        "--slice",
        dest="slice_side",
        type=int,
        metavar="PIXELS",
        help="cut images into slices with this side (needs sahi)",
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs over the config"
    )
    run(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
