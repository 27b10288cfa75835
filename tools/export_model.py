#!/usr/bin/env python3
"""Exports a trained detector, or its backbone: python tools/export_model.py output/demo detector.ts

The suffix of the file says what is exported:
  .ts    the detector, as TorchScript
  .pt2   the backbone with its pyramid, by torch.export
  .onnx  the backbone with its pyramid, or with --part detector the detector, as ONNX
         (pip install 'rope-vit-det[export]')
  .xml   the same for OpenVINO, with weights in a .bin beside it
         (pip install 'rope-vit-det[openvino]')

The file is compared with the model that it was made from, and gets its name only where they agree.
Exit status: 1, they do not; 2, an input is wrong.
"""

import argparse

from rope_vit_det.errors import input_errors_as_one_line


@input_errors_as_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config_file", metavar="CONFIG", help="a config, or a training's OUTPUT_DIR")
    add("output", metavar="FILE", help="to write; .ts, .pt2, .onnx or .xml")
    add("--part", choices=("detector", "backbone"),
        help="of .onnx and .xml, which are the backbone without it")  # fmt: skip
    add("--weights", help="a checkpoint; default: the folder's best, or final")
    add("--image", dest="images", nargs="+", default=[], metavar="FILE",
        help="images to compare on (default: drawn ones)")  # fmt: skip
    add("--confidence-threshold", dest="threshold", type=float, default=0.05, metavar="SCORE",
        help="detections below are left out (default: 0.05)")  # fmt: skip
    add("--categories", metavar="JSON",
        help="a COCO file with the classes, for a checkpoint that does not hold them")  # fmt: skip
    add("--eval", dest="evaluate", action="store_true",
        help="compare AP on DATASETS.TEST as well")  # fmt: skip
    add("--max-ap-loss", type=float, metavar="POINTS",
        help="AP, of 100, that may be lost (default: 0.1, with --int8 1)")  # fmt: skip
    add("--fp16", action="store_true", help="weights of .xml in half the precision; with --eval")
    add("--int8", metavar="DATASET",
        help="quantise .xml to 8 bits with images of this dataset; with --eval")  # fmt: skip
    add("--bundle", action="store_true",
        help="make FILE's folder, with a README, info.json and a script that runs it")  # fmt: skip
    add("--force", action="store_true", help="replace a file that is there")
    add("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs over the config")
    args = parser.parse_args()
    from rope_vit_det.export.export_model import run

    run(**vars(args))


if __name__ == "__main__":
    main()
