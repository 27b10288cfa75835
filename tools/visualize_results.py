#!/usr/bin/env python3
"""Draws what a detector found (green), what is no object (orange) and what it missed (blue).

python tools/visualize_results.py --input output/demo/inference/coco_instances_results.json \
    --dataset rope_vit_det_demo_val --output output/mistakes
"""

import argparse

from rope_vit_det.errors import input_errors_as_one_line


@input_errors_as_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--input",
        dest="results",
        required=True,
        metavar="JSON",
        help="COCO results, or what tools/predict.py --json wrote",
    )
    add("--output", required=True, metavar="FOLDER", help="for the pictures")
    add("--dataset", metavar="NAME", help="registered with Detectron2; or:")
    add("--val-json", metavar="JSON", help="ground truth in COCO's format")
    add("--val-images", metavar="FOLDER", help="its images")
    add("--confidence-threshold", type=float, default=0.5, metavar="SCORE", help="default: 0.5")
    add("--iou", type=float, default=0.5, help="of a match (default: 0.5)")
    add("--number", type=int, default=20, help="images to draw (default: 20)")
    args = parser.parse_args()
    from rope_vit_det.visualization.worst_images import run

    run(**vars(args))


if __name__ == "__main__":
    main()
