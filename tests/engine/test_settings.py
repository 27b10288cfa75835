"""Wrong values of keys end a run of the tool in one line, by a rule or in the rehearsal."""

import logging
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.layers import get_norm
from detectron2.modeling import META_ARCH_REGISTRY, ROI_BOX_HEAD_REGISTRY, build_model

from rope_vit_det.config.keys import NORMS
from rope_vit_det.engine import main
from rope_vit_det.engine.command_line import argument_parser
from rope_vit_det.engine.setup import check_settings, load_config
from rope_vit_det.errors import InputError
from rope_vit_det.heads import norm_by_name

CONFIGS = Path(__file__).parents[2] / "configs"
DEMO = CONFIGS / "demo.yaml"
SMALL = ("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64")


@pytest.fixture
def refusal(monkeypatch, tmp_path, small_demo_dataset):
    """Runs what tools/train_net.py runs; returns the one line that it ends with."""
    sets = {"TRAIN": "train", "TEST": "val"}
    for key, split in sets.items():
        path = small_demo_dataset / "annotations" / f"instances_{split}.json"
        register_coco_instances(f"set_{key}", {}, str(path), str(small_demo_dataset / split))

    def no_start(*args, **kwargs):
        raise AssertionError("the run has begun")

    monkeypatch.setattr(main, "launch", no_start)

    def run(*arguments: str, config: Path = DEMO) -> str:
        options = ["--config-file", str(config)]
        keys = [*SMALL, "OUTPUT_DIR", str(tmp_path / "output")]
        for key in sets:
            keys += [f"DATASETS.{key}", f"('set_{key}',)"]
        options += [*arguments, *keys] if arguments[:1] < ("A",) else [*keys, *arguments]
        with pytest.raises(InputError) as error:
            main.run(argument_parser().parse_args(options))
        assert "\n" not in str(error.value)
        return str(error.value)

    yield run
    for key in sets:
        DatasetCatalog.remove(f"set_{key}")
        MetadataCatalog.remove(f"set_{key}")


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        # names, and the closest one that is registered
        ("MODEL.META_ARCHITECTURE GeneralizedRCN", "found in 'META_ARCH' registry"),
        ("MODEL.BACKBONE.NAME build_rope_vit_spf_backbone", "found in 'BACKBONE' registry"),
        ("MODEL.ROI_HEADS.NAME StandardROIHead", "found in 'ROI_HEADS' registry"),
        ("MODEL.PROPOSAL_GENERATOR.NAME RPM", "found in 'PROPOSAL_GENERATOR' registry"),
        ("MODEL.RPN.HEAD_NAME StandardRPN", "found in 'RPN_HEAD' registry"),
        ("MODEL.ROI_BOX_HEAD.NAME FastRCNNConvFC", "found in 'ROI_BOX_HEAD' registry"),
        ("MODEL.ROI_MASK_HEAD.NAME MaskRCNN", "found in 'ROI_MASK_HEAD' registry"),
        ("MODEL.ROI_KEYPOINT_HEAD.NAME no MODEL.KEYPOINT_ON True", "in 'ROI_KEYPOINT_HEAD'"),
        ("MODEL.ANCHOR_GENERATOR.NAME Default", "found in 'ANCHOR_GENERATOR' registry"),
        (
            "MODEL.SEM_SEG_HEAD.NAME FPN MODEL.META_ARCHITECTURE PanopticFPN "
            "MODEL.BACKBONE.NAME build_rope_vit_sfp_backbone",
            "found in 'SEM_SEG_HEADS' registry",
        ),
        # closed choices
        ("MODEL.FPN.NORM bn", "allowed: '', 'BN', 'SyncBN'"),
        ("MODEL.FPN.NORM GN MODEL.FPN.OUT_CHANNELS 48", "a multiple of 32 channels, not 48"),
        ("MODEL.ROI_MASK_HEAD.NORM bn", "building the model: KeyError 'bn'"),
        ("INPUT.FORMAT RBG", "allowed: 'RGB', 'BGR'"),
        ("INPUT.FORMAT CMYK", "allowed: 'RGB', 'BGR'"),
        ("INPUT.RANDOM_FLIP sideways", "At least one of horiz or vert has to be True"),
        ("INPUT.MASK_FORMAT polygons", "the first training batch: AssertionError polygons"),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING rang", "AssertionError rang"),
        ("SOLVER.LR_SCHEDULER_NAME WarmupCosine", "Unknown LR scheduler: WarmupCosine"),
        ("SOLVER.WARMUP_METHOD cosine", "Unknown warmup method: cosine"),
        ("DATALOADER.SAMPLER_TRAIN Training", "Unknown training sampler: Training"),
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE ROIAling", "Unknown pooler type: ROIAling"),
        ("MODEL.RPN.BBOX_REG_LOSS_TYPE l1", "Invalid dense box regression loss type"),
        ("MODEL.DEVICE gpu", "allowed: 'cuda'"),
        # numbers
        ("MODEL.FPN.OUT_CHANNELS 0", "allowed: a whole number above 0"),
        ("SOLVER.IMS_PER_BATCH 0", "allowed: a whole number of 1 or more"),
        ("SOLVER.IMS_PER_BATCH 3 SOLVER.ACCUMULATE 2", "does not divide by 2"),
        ("SOLVER.ACCUMULATE -1", "allowed: a whole number of 0 or more"),
        ("SOLVER.MAX_ITER 0", "allowed: a whole number of 1 or more"),
        ("SOLVER.MAX_ITER None", "allowed: type int, such as 40000"),
        ("SOLVER.BASE_LR -0.1", "allowed: above 0"),
        ("SOLVER.BASE_LR_END 1.0", "allowed: 0 or more, up to 0.0006"),
        ("SOLVER.CHECKPOINT_PERIOD 0", "allowed: a whole number of 1 or more"),
        ("SOLVER.STEPS (5,3)", "rising order"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE -1.0", "allowed: above 0"),
        ("MODEL.PIXEL_MEAN [0.0,1.0]", "allowed: a list of 3"),
        ("MODEL.PIXEL_STD [0.0,0.0,0.0]", "allowed: a list of 3, each: above 0"),
        ("INPUT.MIN_SIZE_TRAIN ()", "allowed: a list of 1 or more"),
        ("INPUT.MAX_SIZE_TEST 0", "allowed: a whole number of 1 or more"),
        ("DATALOADER.NUM_WORKERS -1", "allowed: a whole number of 0 or more"),
        ("MODEL.ROI_HEADS.NUM_CLASSES 0", "allowed: a whole number of 1 or more"),
        ("MODEL.RPN.IOU_LABELS [0,1]", "assert len(labels) == len(thresholds) - 1"),
        ("MODEL.RPN.BBOX_REG_WEIGHTS (1.0,)", "not enough values to unpack (expected 4, got 1)"),
        # combinations
        ("MODEL.RPN.IN_FEATURES ['res4']", "the features of build_retinanet_rope_vit_sfp"),
        ("MODEL.RPN.IN_FEATURES ['p2']", "set MODEL.BACKBONE.NAME build_rope_vit_sfp_backbone"),
        ("MODEL.ROI_HEADS.IN_FEATURES ['p3','p5']", "neighbours in the order p3, p4, p5"),
        ("MODEL.RPN.IN_FEATURES ['p3']", "Got sizes of length 4 in anchor generator"),
        ("MODEL.ROI_HEADS.NAME Res5ROIHeads", "assert len(in_features) == 1"),
        ("MODEL.ROI_HEADS.NAME CascadeROIHeads", "only support class-agnostic"),
        ("MODEL.ROI_BOX_HEAD.NUM_FC 0", "assert len(conv_dims) + len(fc_dims) > 0"),
        ("MODEL.LOAD_PROPOSALS True", "assert len(names) == len(proposal_files)"),
        ("TEST.AUG.ENABLED True MODEL.META_ARCHITECTURE ProposalNetwork", "TTA is only "),
        ("TEST.AUG.ENABLED True MODEL.KEYPOINT_ON True", "TTA for keypoint is not supported"),
        ("TEST.AUG.ENABLED True TEST.AUG.MIN_SIZES ()", "allowed: a list of 1 or more"),
        ("TEST.EXPECTED_RESULTS [['bbox']]", "task, metric, value and tolerance"),
        ("TEST.EXPECTED_RESULTS [['box','AP',38.5,0.2]]", "names 'box/AP'; the evaluation gives: "),
        ("TEST.EXPECTED_RESULTS [['bbox_TTA','AP',9,1]]", "names 'bbox_TTA/AP'; the evaluation "),
        ("TEST.EXPECTED_RESULTS [['bbox','AP',9,1]] DATASETS.TEST ()", "is compared with the"),
        ("INPUT.CROP.ENABLED True INPUT.CROP.SIZE [2.0,2.0]", "Shape computation in RandomCrop"),
        # what AdamW does not read
        ("SOLVER.MOMENTUM 0.8", "set SOLVER.OPTIMIZER SGD"),
        ("SOLVER.NESTEROV True", "set SOLVER.OPTIMIZER SGD"),
        ("SOLVER.BIAS_LR_FACTOR 2.0", "leave it at 1.0"),
        ("SOLVER.WEIGHT_DECAY_BIAS 0.1", "leave it at None"),
        ("SOLVER.WEIGHT_DECAY_NORM 0.1", "leave it at 0.0"),
        # our own switches
        ("MODEL.ROPE_VIT.NAME ['a']", "MODEL.ROPE_VIT.NAME takes a str"),
        ("MODEL.ROPE_VIT.WINDOW_SIZE False", "MODEL.ROPE_VIT.WINDOW_SIZE takes a int"),
        ("MODEL.ROPE_VIT.DROP_PATH_RATE False", "allowed: 0 or more, below 1"),
        # keys
        ("MODEL.ROPE_VIT 3", "MODEL.ROPE_VIT is a section"),
        ("SOLVER.LEARNING_RATE 0.1", "there is no key SOLVER.LEARNING_RATE"),
        ("SOLVER.BASE_LRS 0.1", "did you mean 'SOLVER.BASE_LR'?"),
    ],
)
def test_a_wrong_value_is_named_with_the_allowed_ones(refusal, setting, line):
    refused = refusal(*setting.split())
    assert line in refused
    keys = [key for key in setting.split() if key.isupper() or "." in key]
    # Of Detectron2's own words the step is known.
    assert "rehearsal, " in refused or any(key in refused for key in keys)


@pytest.mark.parametrize("blocked", ["file", "file/below"])
def test_an_output_folder_that_cannot_be(refusal, tmp_path, blocked):
    (tmp_path / "file").write_text("")
    line = refusal("OUTPUT_DIR", str(tmp_path / blocked))
    assert line.startswith(f"OUTPUT_DIR: {tmp_path / blocked} cannot be written")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--num-machines", "0"), "give 1 or more machines"),
        (("--machine-rank", "1"), "a rank from 0"),
        (("--dist-url", "localhost"), "allowed: tcp://HOST:PORT"),
        (("--num-machines", "2"), "needs --dist-url tcp://HOST:PORT"),
    ],
)
def test_processes_that_cannot_be(refusal, options, line):
    assert line in refusal(*options)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[1, 2]\n", "is not a config"),
        ("hello\n", "is not a config"),
        ("MODEL: 5\n", "MODEL is a section"),
        ("MODEL:\n", "MODEL is a section"),
        ("MODEL: {ROI_MASK_HEAD: 5}\n", "MODEL.ROI_MASK_HEAD is a section"),
        ("MODEL: {ROI_MASK_HEAD: {NAME: [1]}}\n", "MODEL.ROI_MASK_HEAD.NAME takes a str"),
        ("MODLE: {MASK_ON: True}\n", "there is no key MODLE; did you mean 'MODEL'?"),
        ("MODEL: {1: 2}\n", "1 is no key"),
        ("VERSION: two\n", "VERSION is 'two'; allowed: 2"),
    ],
)
def test_a_yaml_that_does_not_fit(refusal, tmp_path, caplog, text, line):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    refused = refusal(config=path)
    assert refused.startswith(str(path)) and line in refused
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


RECIPES = sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("*-*/*.yaml")])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_our_own_recipes_pass(path, tmp_path):
    options = ["--config-file", str(path), "OUTPUT_DIR", str(tmp_path)]
    check_settings(load_config(argument_parser().parse_args(options)))


def test_what_the_user_registers_is_known(detector_cfg, tmp_path):
    class MyArchitecture:
        pass

    class MyBoxHead:
        pass

    detector_cfg.OUTPUT_DIR = str(tmp_path)
    detector_cfg.MODEL.ROI_BOX_HEAD.NAME = "MyBoxHead"
    registered = {META_ARCH_REGISTRY: MyArchitecture, ROI_BOX_HEAD_REGISTRY: MyBoxHead}
    for registry, each in registered.items():
        registry.register(each)
    try:
        check_settings(detector_cfg)
        detector_cfg.MODEL.META_ARCHITECTURE = "MyArchitecture"
        check_settings(detector_cfg)
    finally:
        for registry, each in registered.items():
            registry._obj_map.pop(each.__name__)


def test_norms_are_those_that_detectron2_takes():
    for name in NORMS:
        get_norm(norm_by_name(name), 32)
    with pytest.raises(KeyError):
        get_norm("bn", 32)


def test_heads_that_read_what_the_backbone_lacks_hear_of_it_in_any_script(detector_cfg):
    detector_cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    with pytest.raises(InputError, match=r"no feature 'p7', only p2, .*build_retinanet_rope_vit"):
        build_model(detector_cfg)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("NORM", "bn", r"MODEL\.FPN\.NORM is 'bn'; allowed: '', 'BN'"),
        ("NORM", "GN", "multiple of 32 channels, not 48"),
        ("OUT_CHANNELS", 0, r"MODEL\.FPN\.OUT_CHANNELS is 0"),
    ],
)
def test_the_pyramid_checks_its_keys_in_any_script(detector_cfg, key, value, message):
    detector_cfg.MODEL.FPN.OUT_CHANNELS = 48
    detector_cfg.MODEL.FPN[key] = value
    with pytest.raises(InputError, match=message):
        build_model(detector_cfg)
