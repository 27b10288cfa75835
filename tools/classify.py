#!/usr/bin/env python3
"""Classes or embeddings of images: python tools/classify.py WEIGHTS IMAGE_FOLDER_OR_PATTERN...

Exit status: 0, all went well; 1, some images could not be read (they are named on stderr, and the
results of the others are complete); 2, nothing was done, for the reason on stderr.
"""

import argparse
import sys

from rope_vit_det.classification.classify_files import run
from rope_vit_det.errors import input_errors_as_one_line


@input_errors_as_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "weights", help="a published name, or a .pt or .safetensors file of birder's"
    )
    parser.add_argument(
        "inputs", nargs="*", help="images, folders, quoted patterns (photos/**/*.jpg)"
    )
    parser.add_argument("-o", "--output", help=".csv or .npz; left out: CSV to stdout")
    parser.add_argument("--embeddings", action="store_true", help="embeddings instead of classes")
    parser.add_argument("--top-k", type=int, default=5, help="classes an image (default: 5)")
    parser.add_argument(
        "--size", type=int, nargs="+", metavar="PIXELS", help="side, or height and width"
    )
    parser.add_argument(
        "--model-config",
        help="JSON over the architecture, e.g. '{\"pt_grid_size\": [16, 16]}'",
    )
    parser.add_argument("--network", help="the architecture, where the file name does not say it")
    parser.add_argument("--batch-size", type=int, default=32, help="default: 32")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    sys.exit(run(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
