"""--config-file: repeated, by its name in the model zoo, and as Detectron2 takes it."""

import re
from pathlib import Path

import pytest
from detectron2.config import LazyConfig
from detectron2.engine import default_argument_parser
from omegaconf import OmegaConf

from rope_vit_det.engine.command_line import argument_parser
from rope_vit_det.engine.setup import load_config
from rope_vit_det.errors import InputError

CONFIGS = Path(__file__).parents[2] / "configs"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
OVERLAY = str(CONFIGS / "backbones" / "rope_vit_reg4_b14.yaml")


def load(*arguments):
    return load_config(argument_parser().parse_args(arguments))


def test_files_merge_in_order_and_key_values_come_last(tmp_path):
    for name, rate in (("a", 0.1), ("b", 0.2)):
        (tmp_path / f"{name}.yaml").write_text(f"SOLVER: {{BASE_LR: {rate}}}\nVERSION: 2\n")
    a, b = str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")
    assert load("--config-file", a, "--config-file", b).SOLVER.BASE_LR == 0.2
    assert load("--config-file", b, "--config-file", a).SOLVER.BASE_LR == 0.1
    cfg = load("--config-file", a, "--config-file", b, "SOLVER.BASE_LR", "0.3", "SEED", "5")
    assert (cfg.SOLVER.BASE_LR, cfg.SEED) == (0.3, 5)


def test_the_overlay_takes_over_what_was_a_resnets():
    cfg = load("--config-file", RETINANET, "--config-file", OVERLAY)
    assert cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    assert cfg.MODEL.WEIGHTS.startswith("birder://")
    assert (cfg.INPUT.FORMAT, cfg.MODEL.BACKBONE.FREEZE_AT) == ("RGB", 0)
    assert cfg.SOLVER.BASE_LR < 1e-3  # not that of SGD


def test_detectron2s_own_arguments_do(tmp_path):
    arguments = ["--config-file", OVERLAY, "SOLVER.MAX_ITER", "3"]
    cfg = load_config(default_argument_parser().parse_args(arguments))
    assert cfg.SOLVER.MAX_ITER == 3
    assert load(*arguments) == cfg


def _options(parser):
    """Every option's names, and all of it that an argument passes through."""
    read = ("dest", "nargs", "const", "default", "type", "choices", "required")
    return {
        (*action.option_strings, action.dest): [type(action), *(getattr(action, k) for k in read)]
        for action in parser._actions
    }


def test_all_other_options_are_detectron2s():
    ours, theirs = _options(argument_parser()), _options(default_argument_parser())
    assert {key[0] for key in ours.keys() - theirs.keys()} == {
        "--no-rehearsal",
        "--overwrite",
        "--replay",
    }
    for options in (ours, theirs):
        del options["--config-file", "config_file"]  # a list here
    assert {key: ours[key] for key in theirs} == theirs
    assert argument_parser().parse_args([]).config_file == []


def test_the_examples_of_help_are_overrides_that_a_lazyconfig_has():
    cfg = LazyConfig.load(str(CONFIGS / "COCO-Detection" / "fcos_rope_vit_reg4_b14_1x.py"))
    source = (Path(__file__).parents[2] / "tools" / "lazyconfig_train_net.py").read_text()
    (opts,) = re.findall(r'opts = "(.*)"', source)
    assert f"--config-file FILE {opts}" in argument_parser(opts=opts).format_help()
    for key in (each.partition("=")[0] for each in opts.split()):
        assert OmegaConf.select(cfg, key, default=None) is not None, key


def test_a_name_that_is_nowhere_brings_up_its_neighbour():
    with pytest.raises(InputError, match=f"neither here nor .*did you mean '{RETINANET}'"):
        load("--config-file", "COCO-Detection/retinanet_R_50_FPN_1.yaml")
