#!/usr/bin/env python3
"""Classes or embeddings of images: python tools/classify.py WEIGHTS IMAGE_FOLDER_OR_PATTERN...

Exit status: 0, all went well; 1, some images could not be read (they are named on stderr, and the
results of the others are complete); 2, nothing was done, for the reason on stderr.
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
    add("weights", help="a published name, or a .pt or .safetensors file of birder's")
    add("inputs", nargs="*", help="images, folders, quoted patterns (photos/**/*.jpg)")
    add("-o", "--output", help=".csv or .npz; left out: CSV to stdout")
    add("--embeddings", action="store_true", help="embeddings instead of classes")
    add("--top-k", type=int, help="classes an image (default: 5)")
    add("--size", type=int, nargs="+", metavar="PIXELS", help="side, or height and width")
    add("--model-config", help="JSON over the architecture, e.g. '{\"pt_grid_size\": [16, 16]}'")
    add("--network", help="the architecture, where the file name does not say it")
    add("--batch-size", type=int, default=32, help="default: 32")
    add("--device", help="default: cuda where there is one, else cpu")
    args = parser.parse_args()
    from rope_vit_det.classification.classify_files import run

    sys.exit(run(**vars(args)))


if __name__ == "__main__":
    main()
