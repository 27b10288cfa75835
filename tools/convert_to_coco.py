#!/usr/bin/env python3
"""Converts YOLO or Pascal VOC folders to COCO's format, by the package supervision."""

import argparse

from rope_vit_det.errors import input_errors_as_one_line


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--split",
        dest="splits",
        nargs=3,
        action="append",
        required=True,
        metavar=("JSON", "IMAGES", "ANNOTATIONS"),
        help="file to write, folder of the images, folder of the .txt or .xml files; may be "
        "repeated, so that all splits get the same categories",
    )
    parser.add_argument(
        "--names", metavar="YAML", help="YOLO's data.yaml; without it, the folders are Pascal VOC's"
    )
    return parser.parse_args()


@input_errors_as_one_line()
def main() -> None:
    args = parse_args()
    from rope_vit_det.data.convert import convert_to_coco

    print("\n".join(convert_to_coco(**vars(args))))


if __name__ == "__main__":
    main()
