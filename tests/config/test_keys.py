"""The keys of this project, and the README's table of them."""

import re
from pathlib import Path

from detectron2.config import get_cfg

from rope_vit_det import add_rope_vit_config
from rope_vit_det.config.rules import leaves

README = Path(__file__).parents[2] / "README.md"


def test_every_key_is_in_the_readmes_table():
    cfg = get_cfg()
    detectron2s = dict(leaves(cfg))
    add_rope_vit_config(cfg)
    table = README.read_text("utf-8").partition("## The switches")[2].partition("\n## ")[0]
    named = {name.rpartition(".")[2] for name in re.findall(r"`([\w.]*)`", table)}
    ours = {key for key in dict(leaves(cfg)).keys() - detectron2s if ".OWN." not in key}
    assert ours and {key for key in ours if key.rpartition(".")[2] not in named} == set()
