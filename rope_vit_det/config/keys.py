"""Every config switch of this project: the only place that defines keys and checks their values."""

import logging
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode, get_cfg

from ..errors import InputError
from ..models.variants import VARIANTS, check_network
from ..utils.arguments import is_whole_number

logger = logging.getLogger(__name__)

PYRAMID_STRIDE = 16
MIN_SLICE = 32  # pixels of a side
# Of SOLVER.BASE_LR, under AdamW and its like; a ResNet's under SGD are higher.
MAX_USUAL_LR = 1e-3
AMP_DTYPES = ("bfloat16", "float16")
# Of SOLVER.CLIP_GRADIENTS: each gradient's values, each gradient's norm, or the norm of all.
CLIP_TYPES = ("value", "norm", "full_model")
# As Detectron2's `get_norm` knows them, and ours of heads.py; "": none (in the pyramids: LN).
NORMS = (
    *("", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N"),
    "FastLN",
)


def add_rope_vit_config(cfg: CfgNode) -> None:
    """Adds the keys of this project, with their defaults, to a Detectron2 config.

    Call it before merging a yaml that uses them. A config that has them already keeps its values.

    Args:
        cfg: from `detectron2.config.get_cfg()`; changed in place.
    """
    if "ROPE_VIT" in cfg.MODEL:
        return
    cfg.MODEL.ROPE_VIT = net = CfgNode()
    # The network: a key of `rope_vit_det.models.VARIANTS`.
    net.NAME = "rope_vit_reg4_b14"
    # Pixels, a side or [h, w], at which the weights were trained: it sets the size of the absolute
    # position table, not that of the input. None: what the architecture says.
    net.IMAGE_SIZE = None
    # Pixels between patches. 16 is the only one the pyramids take: Detectron2's poolers want powers
    # of two. A kernel of another size is resampled. The neck alone can have its own patch size.
    net.PATCH_STRIDE = PYRAMID_STRIDE
    # How rotary positions meet a grid other than that of pretraining (the image's grid, or a
    # window's). None: what the architecture says. "count": positions count on, for long
    # fine-tuning. [h, w]: they are scaled onto h x w cells, for inference or shallow fine-tuning.
    net.PT_GRID_SIZE = None
    # Tokens along a side of the attention windows; 0: attention over the whole grid.
    net.WINDOW_SIZE = 0
    # With windows, the blocks that attend over the whole grid all the same. None: the last block of
    # each quarter. []: none.
    net.GLOBAL_BLOCKS = None
    # In training, multiplies all rotary positions of an image batch by a random factor between
    # 1 / RESCALE_COORDS and RESCALE_COORDS (DINOv3's configs: 2). None: no.
    net.RESCALE_COORDS = None
    # The absolute position table on a larger grid. False: interpolated over the whole of it, as in
    # birder. True: repeated, one whole table to a window, so that windows see what was pretrained
    # (arXiv 2311.05613); without windows, the tiles have the table's own grid.
    net.TILE_POS_EMBED = False
    # Stochastic depth of the last block, growing linearly from the first. None: the architecture's.
    net.DROP_PATH_RATE = None
    # 0: the whole network learns. n >= 1: stem, special tokens, position table and the first n
    # blocks are frozen, without drop path. -1: all of it is. MODEL.BACKBONE.FREEZE_AT is not read.
    net.FREEZE_BLOCKS = 0
    # Of the network's weights: "float32", or with FREEZE_BLOCKS -1 "bfloat16": half the memory, for
    # networks of billions of parameters. Pyramid and heads stay in float32.
    net.DTYPE = "float32"
    # LoRA (arXiv 2106.09685): adapters of this rank at the products of every block, which learn
    # instead of the network; times ALPHA / RANK. RANK 0: none. Exported files have them merged.
    net.LORA = CfgNode({"RANK": 0, "ALPHA": 16.0, "DROPOUT": 0.0})
    # Recompute each block's activations in the backward pass: less memory, more time.
    net.ACTIVATION_CHECKPOINT = False
    # Run the blocks through `torch.compile`, in training and inference: the same result, after a
    # minute of compiling for each graph. Without windows, all image sizes share one graph; with
    # them, there are a few, whatever the number of sizes. Inference at sizes that repeat becomes
    # CUDA graphs. On GPUs alone: on the CPU our own kernels, which a graph cannot hold, are
    # faster, and nothing is compiled.
    net.COMPILE = False
    # Where birder's weights in MODEL.WEIGHTS were trained with other pixel statistics, channel
    # order or grid than this config has, our tools refuse to start and other scripts log a warning.
    # False: neither.
    net.CHECK_WEIGHTS = True

    # Images that cannot be read end a run before it starts. True: they are skipped, counted in the
    # log and listed in OUTPUT_DIR/skipped_images_DATASET.txt; for that, every image is decoded
    # first. In evaluation, the objects of a skipped image count as missed.
    cfg.DATALOADER.SKIP_UNREADABLE = False

    cfg.INPUT.LSJ = lsj = CfgNode()
    # Large-scale jitter instead of INPUT.MIN_SIZE_TRAIN: training images are scaled at random, then
    # cropped or padded to a square (arXiv 2012.07177; ViTDet, arXiv 2203.16527).
    lsj.ENABLED = False
    # Pixels of a side of the square.
    lsj.IMAGE_SIZE = 1024
    # The scale's range, relative to the image fitted into the square.
    lsj.MIN_SCALE = 0.1
    lsj.MAX_SCALE = 2.0

    # A name in `rope_vit_det.solver.OPTIMIZERS`: "AdamW", "SGD", "Muon" (the matrices of the
    # encoder blocks; AdamW for all else) or one's own; or "timm:NAME", where timm is installed.
    cfg.SOLVER.OPTIMIZER = "AdamW"
    # Learning rate of each block relative to the next one; 1: the same for all (BEiT, arXiv
    # 2106.08254, appendix; ViTDet uses 0.7 for ViT-B).
    cfg.SOLVER.LAYER_DECAY = 1.0
    # Mixed precision with SOLVER.AMP.ENABLED: "bfloat16" (GPU and CPU) or "float16" (GPU only).
    cfg.SOLVER.AMP.DTYPE = "bfloat16"
    # Micro-batches of a process whose gradients are averaged to a step. IMS_PER_BATCH counts the
    # images of a step, so that it, the learning rate and the schedule stay as they are. 0: as few
    # as the memory of the GPU allows, measured before the start; on the CPU, micro-batches of
    # the size that REFERENCE_WORLD_SIZE GPUs would have.
    cfg.SOLVER.ACCUMULATE = 1
    # An exponential moving average of the weights, as EVA-02 uses (arXiv 2303.11331): it is what is
    # evaluated, and the "model" of a checkpoint.
    cfg.SOLVER.EMA = CfgNode({"ENABLED": False, "DECAY": 0.9999})
    # The metric, such as "bbox/AP", whose best checkpoint is kept as model_best.pth; "": none is.
    cfg.SOLVER.BEST_METRIC = ""
    # Newest periodic checkpoints that are kept; 0: all. model_final.pth and model_best.pth stay.
    # With 1, there is none before a checkpoint that the disk damages later.
    cfg.SOLVER.KEEP_CHECKPOINTS = 0
    # Evaluations in a row without a better BEST_METRIC that end the training; 0: none do.
    cfg.SOLVER.EARLY_STOPPING = 0

    # Evaluation of images in overlapping slices, as `tools/predict.py --slice` predicts: each slice
    # is resized by INPUT.MIN_SIZE_TEST, and the whole image once more. SIZE: pixels of
    # a slice's side; OVERLAP: of neighbours, as a share of it.
    cfg.TEST.SLICE = CfgNode({"ENABLED": False, "SIZE": 512, "OVERLAP": 0.2})

    # Your own data, JSON files in COCO's format and the folders of their images: where TRAIN_JSON
    # or VAL_JSON is set, it takes the place of DATASETS.TRAIN and TEST, and its categories set
    # NUM_CLASSES.
    own = {"TRAIN_JSON": "", "TRAIN_IMAGES": "", "VAL_JSON": "", "VAL_IMAGES": ""}
    cfg.DATASETS.OWN = CfgNode(own)


def default_config() -> CfgNode:
    """Detectron2's keys and this project's, with their defaults."""
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    return cfg


def check_key(cfg: CfgNode, key: str, ok: bool, allowed: str) -> None:
    """
    Args:
        key: in full, such as "MODEL.FPN.NORM".
        ok: whether its value is an allowed one.

    Raises:
        InputError: it is not; names the key, its value and the allowed values.
    """
    if not ok:
        raise InputError(f"{key} is {get_key(cfg, key)!r}; allowed: {allowed}")


def get_key(cfg: CfgNode, key: str) -> Any:
    """The value of a key in full, such as "MODEL.FPN.NORM"."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def set_keys(cfg: CfgNode, settings: Mapping[str, Any]) -> None:
    """Sets the values of keys in full."""
    for key, value in settings.items():
        section, _, last = key.rpartition(".")
        (get_key(cfg, section) if section else cfg)[last] = value


def with_settings(cfg: CfgNode, settings: Mapping[str, Any]) -> CfgNode:
    """A copy of a config, frozen, with other values of some keys in full."""
    cfg = cfg.clone()
    cfg.defrost()
    set_keys(cfg, settings)
    cfg.freeze()
    return cfg


def check_rope_vit_config(cfg: CfgNode, *, own_stride: bool = False) -> None:
    """Checks the values under MODEL.ROPE_VIT that the network itself cannot know.

    Its own arguments are checked where it is built.

    Args:
        own_stride: whether the backbone at hand can take the network's own patch size as stride.

    Raises:
        InputError: names the key, its value and the allowed values.
    """
    if "ROPE_VIT" not in cfg.MODEL:
        raise InputError(
            "the config has no MODEL.ROPE_VIT: call rope_vit_det.add_rope_vit_config(cfg) on it"
        )
    net = cfg.MODEL.ROPE_VIT
    check_network(net.NAME, f"MODEL.ROPE_VIT.NAME is {net.NAME!r}: ")
    stride, patch = net.PATCH_STRIDE, VARIANTS[net.NAME]["patch_size"]
    strides = sorted({PYRAMID_STRIDE, patch} if own_stride else {PYRAMID_STRIDE})
    ok = is_whole_number(stride) and stride in strides
    check_key(cfg, "MODEL.ROPE_VIT.PATCH_STRIDE", ok, " or ".join(map(str, strides)))


def check_pyramid_config(cfg: CfgNode) -> None:
    """Checks the MODEL.FPN keys that the pyramids read.

    Raises:
        InputError: names the key, its value and the allowed values.
    """
    norm, width = cfg.MODEL.FPN.NORM, cfg.MODEL.FPN.OUT_CHANNELS
    check_key(cfg, "MODEL.FPN.OUT_CHANNELS", is_whole_number(width, 1), "a whole number above 0")
    check_key(cfg, "MODEL.FPN.NORM", norm in NORMS, ", ".join(map(repr, NORMS)))
    if norm == "GN" and width % 32:
        raise InputError(
            f"MODEL.FPN.NORM is 'GN', which takes a multiple of 32 channels, not {width}"
        )


def check_solver_config(cfg: CfgNode) -> None:
    """Checks what the SOLVER keys of this project say together.

    Raises:
        InputError: names the key, its value and the allowed values.
    """
    solver = cfg.SOLVER
    check_optimizer_config(cfg)
    check_precision(cfg)
    if solver.EARLY_STOPPING and not solver.BEST_METRIC:
        raise InputError("SOLVER.EARLY_STOPPING needs SOLVER.BEST_METRIC, such as bbox/AP")
    if solver.BEST_METRIC and not (cfg.TEST.EVAL_PERIOD > 0 and cfg.DATASETS.TEST):
        raise InputError("SOLVER.BEST_METRIC needs TEST.EVAL_PERIOD above 0 and DATASETS.TEST")


def check_precision(cfg: CfgNode) -> None:
    """Checks SOLVER.AMP.

    Raises:
        InputError: names the key, its value and the allowed values.
    """
    amp = cfg.SOLVER.AMP
    check_key(cfg, "SOLVER.AMP.DTYPE", amp.DTYPE in AMP_DTYPES, ", ".join(AMP_DTYPES))
    if amp.ENABLED and amp.DTYPE == "float16" and cfg.MODEL.DEVICE == "cpu":
        raise InputError(
            "SOLVER.AMP.DTYPE float16 needs a GPU; on the CPU use SOLVER.AMP.DTYPE bfloat16"
        )


def check_optimizer_config(cfg: CfgNode) -> None:
    """Refuses an unknown CLIP_TYPE, and keys of Detectron2's SGD that the optimizer does not read.

    One of the user's own is taken to read none of them either.

    Raises:
        InputError: names the key, its value and its default.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    is_known = not clip.ENABLED or clip.CLIP_TYPE in CLIP_TYPES
    check_key(cfg, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", is_known, ", ".join(CLIP_TYPES))
    solver, defaults = cfg.SOLVER, get_cfg().SOLVER
    unread = dict.fromkeys(
        ("BIAS_LR_FACTOR", "WEIGHT_DECAY_BIAS", "WEIGHT_DECAY_NORM"),
        "norms and biases have no weight decay, and SOLVER.LAYER_DECAY sets the rates of layers",
    )
    if solver.OPTIMIZER != "SGD":
        unread |= dict.fromkeys(("MOMENTUM", "NESTEROV"), "set SOLVER.OPTIMIZER SGD")
    for key, remedy in unread.items():
        value, default = solver[key], defaults[key]
        # No weight decay of biases is what is done anyway.
        if value != default and not (key == "WEIGHT_DECAY_BIAS" and value == 0):
            raise InputError(
                f"SOLVER.{key} is {value!r}, which SOLVER.OPTIMIZER {solver.OPTIMIZER} does not "
                f"read: leave it at {default!r} ({remedy})"
            )


def warn_of_high_rate(cfg: CfgNode) -> None:
    """One line where SOLVER.BASE_LR is usual for a ResNet's SGD, and high for all else."""
    if cfg.SOLVER.OPTIMIZER != "SGD" and cfg.SOLVER.BASE_LR > MAX_USUAL_LR:
        logger.warning(
            "SOLVER.BASE_LR is %g, a rate for a ResNet under SGD: transformers train badly by it, "
            "and AdamW wants less (ViTDet: 0.0001). rope_vit_det.use_rope_vit(cfg) sets SOLVER, "
            "and a trainer's build_optimizer is to be rope_vit_det.build_optimizer",
            cfg.SOLVER.BASE_LR,
        )


def check_input_config(cfg: CfgNode) -> None:
    """Checks what INPUT's keys of this project say together.

    Raises:
        InputError: names the key, its value and the allowed values.
    """
    lsj = cfg.INPUT.LSJ
    allowed = f"above 0, up to MAX_SCALE, which is {lsj.MAX_SCALE}"
    check_key(cfg, "INPUT.LSJ.MIN_SCALE", 0 < lsj.MIN_SCALE <= lsj.MAX_SCALE, allowed)
    if lsj.ENABLED and cfg.INPUT.CROP.ENABLED:
        raise InputError(
            "INPUT.LSJ.ENABLED and INPUT.CROP.ENABLED are both True; large-scale jitter crops by "
            "itself: set INPUT.CROP.ENABLED False"
        )
