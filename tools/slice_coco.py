#!/usr/bin/env python3
"""Cuts large photographs and their COCO annotations into tiles to train on (docs/large_images.md).

python tools/slice_coco.py --train-json train.json --train-images train/ --output tiles --size 512
"""

import argparse

from rope_vit_det.engine.command_line import add_config_option, add_own_data_options
from rope_vit_det.errors import input_errors_as_one_line


@input_errors_as_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_option(parser)
    add = parser.add_argument
    add("--dataset", nargs="+", metavar="NAME", help="registered ones, in COCO's format")
    add("--output", required=True, metavar="FOLDER", help="for a JSON file and a folder each")
    add("--size", type=int, required=True, metavar="PIXELS", help="of a tile's side")
    add("--overlap", type=float, default=0.2, metavar="SHARE", help="of the side (default: 0.2)")
    add(
        "--min-area",
        type=float,
        default=0.3,
        metavar="SHARE",
        help="objects are kept in tiles that show at least so much of them (default: 0.3)",
    )
    add("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs over the config")
    args = add_own_data_options(parser).parse_args()
    from rope_vit_det.data.demo.dataset import register_where_named
    from rope_vit_det.data.tiles import slice_datasets
    from rope_vit_det.engine.setup import load_config

    args.eval_only = True  # validation data alone will do
    datasets = load_config(args).DATASETS
    names = args.dataset or (*datasets.TRAIN, *datasets.TEST)
    register_where_named(names)
    options = {"side": args.size, "overlap": args.overlap, "min_area": args.min_area}
    print("\n".join(slice_datasets(names, args.output, **options)))


if __name__ == "__main__":
    main()
