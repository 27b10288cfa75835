"""Faulty configs and command lines."""

from .case import OWN, REFUSED, REGISTERED, Case, World

TRACE = "code-was-run"


def _opts(*opts: str):
    return lambda world: world.opts.extend(opts)


def _flags(*flags: str):
    return lambda world: world.flags.extend(flags)


def _yaml(text: str | bytes, name: str = "extra.yaml"):
    def spoil(world: World) -> None:
        content = text if isinstance(text, bytes) else text.encode()
        (world.folder / name).write_bytes(content)
        world.configs.append(name)

    return spoil


def _names(**names: str):
    def spoil(world: World) -> None:
        for key, value in names.items():
            setattr(world, key, value)

    return spoil


def _refused(name: str, how: str, spoil, *says: str, ways: tuple[str, ...] = (OWN,)) -> Case:
    return Case(name, how, spoil, REFUSED, says, ways)


def _value(key: str, value: str, *says: str) -> Case:
    return _refused(f"{key} {value}", "on the command line", _opts(key, value), key, *says)


YAML = [
    _refused("missing config", "--config-file nowhere.yaml",
             lambda world: world.configs.append("nowhere.yaml"), "nowhere.yaml: no such file"),
    _refused("unknown key in a yaml", "MODEL: {ROPE_VIT: {WINDOWS: 8}}",
             _yaml("MODEL: {ROPE_VIT: {WINDOWS: 8}}"), "extra.yaml", "MODEL.ROPE_VIT.WINDOWS"),
    _refused("wrong type in a yaml", "SOLVER: {MAX_ITER: many}", _yaml("SOLVER: {MAX_ITER: many}"),
             "extra.yaml", "MAX_ITER"),
    _refused("a value in place of a section", "MODEL: 5", _yaml("MODEL: 5"), "extra.yaml", "MODEL"),
    _refused("yaml that executes", "!!python/object/apply:os.mkdir",
             _yaml(f"OUTPUT_DIR: !!python/object/apply:os.mkdir [{TRACE}]"),
             "extra.yaml:1: the tag '!!python/object/apply:os.mkdir' is refused"),
    _refused("yaml that evaluates", "a string of !!python/object/apply:eval",
             _yaml(f"""A: !!python/object/apply:eval ["__import__('os').mkdir('{TRACE}')"]"""),
             "extra.yaml:1: the tag", "is refused"),
    _refused("base that executes", "_BASE_ names a yaml with a tag",
             lambda world: [_yaml("_BASE_: base.yaml")(world),
                            (world.folder / "base.yaml").write_text("A: !!python/name:os.system")],
             "base.yaml:1: the tag", "is refused"),
    _refused("base of itself", "_BASE_: extra.yaml", _yaml("_BASE_: extra.yaml"), "extra.yaml",
             "_BASE_ leads back to itself"),
    _refused("missing base", "_BASE_: nowhere.yaml", _yaml("_BASE_: nowhere.yaml"),
             "nowhere.yaml"),
    _refused("not yaml", "an opening bracket", _yaml("MODEL: ["), "extra.yaml:1 is not yaml"),
    _refused("a list as a config", "- MODEL", _yaml("- MODEL"), "extra.yaml is not a config"),
    _refused("binary as a config", "bytes that are no UTF-8", _yaml(b"\xff\xfe\x00\x80"),
             "extra.yaml is not a text file"),
    _refused("empty config", "a file of no bytes", _yaml(""), "extra.yaml is not a config"),
]  # fmt: skip

KEYS = [
    _refused("unknown key", "MODEL.ROPE_VIT.WINDOWS 8", _opts("MODEL.ROPE_VIT.WINDOWS", "8"),
             "MODEL.ROPE_VIT.WINDOWS"),
    _refused("key without value", "an odd number of arguments", _opts("SOLVER.MAX_ITER"),
             "command line"),
    _value("SOLVER.MAX_ITER", "many"),
    _value("MODEL.ROPE_VIT.NAME", "rope_vit_xl99", "allowed: "),
    _value("MODEL.ROPE_VIT.IMAGE_SIZE", "225", "allowed: "),
    _value("MODEL.ROPE_VIT.PATCH_STRIDE", "8", "allowed: "),
    _value("MODEL.ROPE_VIT.PT_GRID_SIZE", "[16,16,16]", "allowed: "),
    _value("MODEL.ROPE_VIT.WINDOW_SIZE", "-1", "allowed: "),
    _value("MODEL.ROPE_VIT.GLOBAL_BLOCKS", "[99]", "allowed: "),
    _value("MODEL.ROPE_VIT.DROP_PATH_RATE", "2.0", "allowed: "),
    _value("MODEL.ROPE_VIT.FREEZE_BLOCKS", "5", "allowed: "),
    _value("SOLVER.LAYER_DECAY", "0.0", "allowed: "),
    _value("SOLVER.AMP.DTYPE", "float8", "allowed: "),
    _value("SOLVER.ACCUMULATE", "-1", "allowed: "),
    _value("SOLVER.EMA.DECAY", "2.0", "allowed: "),
    _value("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "hard", "allowed: value, norm"),
    _value("INPUT.LSJ.IMAGE_SIZE", "0", "allowed: "),
    _refused("DATALOADER.SAMPLER_TRAIN WeightedTrainingSampler", "on the command line",
             _opts("DATALOADER.SAMPLER_TRAIN", "WeightedTrainingSampler"),
             "rehearsal, building optimizer", "TRAIN_REPEAT_FACTOR"),
    _value("INPUT.LSJ.MIN_SCALE", "5.0", "allowed: "),
]  # fmt: skip

COMBINATIONS = [
    _refused("float16 on the CPU", "SOLVER.AMP with float16 without a GPU",
             _opts("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "float16",
                   "MODEL.DEVICE", "cpu"),
             "SOLVER.AMP.DTYPE float16 needs a GPU"),
    _refused("two croppings", "INPUT.LSJ.ENABLED and INPUT.CROP.ENABLED",
             _opts("INPUT.LSJ.ENABLED", "True", "INPUT.CROP.ENABLED", "True"),
             "INPUT.LSJ.ENABLED and INPUT.CROP.ENABLED are both True"),
    _refused("stopping early at nothing", "EARLY_STOPPING without BEST_METRIC",
             _opts("SOLVER.EARLY_STOPPING", "2"), "SOLVER.EARLY_STOPPING needs SOLVER.BEST_METRIC"),
    _refused("a batch that does not divide", "4 images in 3 micro-batches",
             _opts("SOLVER.ACCUMULATE", "3"), "SOLVER.IMS_PER_BATCH 4", "does not divide by 3"),
    _refused("keypoints of unknown symmetry", "MODEL.KEYPOINT_ON with --train-json",
             _opts("MODEL.KEYPOINT_ON", "True"), "MODEL.KEYPOINT_ON"),
    _refused("no instances to learn", "SemanticSegmentor with --train-json",
             _opts("MODEL.META_ARCHITECTURE", "SemanticSegmentor"), "learns from pixel maps"),
    _refused("half of the options", "--val-json with no images",
             _flags("--val-images", ""), "--val-images is missing"),
    _refused("no process", "--num-gpus 0", _flags("--num-gpus", "0"), "--num-gpus 0"),
    _refused("another number of classes", "NUM_CLASSES 80 for two categories",
             _opts("MODEL.ROI_HEADS.NUM_CLASSES", "80"), "has 2 categories",
             "set MODEL.ROI_HEADS.NUM_CLASSES 2", ways=(REGISTERED,)),
    _refused("unknown dataset", "a name that nobody registered",
             _names(train="rope_vit_det_demo_trian"), "DATASETS.TRAIN",
             "did you mean 'rope_vit_det_demo_train'?", ways=(REGISTERED,)),
    _refused("no dataset", "DATASETS.TRAIN ()", _names(train=""), "DATASETS.TRAIN is empty",
             ways=(REGISTERED,)),
    _refused("unknown evaluator", "a registered dataset without evaluator_type",
             _names(test="corpus_without_evaluator"), "has evaluator_type None",
             ways=(REGISTERED,)),
    _refused("evaluation of nothing", "--eval-only without MODEL.WEIGHTS", _flags("--eval-only"),
             "--eval-only needs MODEL.WEIGHTS"),
]  # fmt: skip

CASES = YAML + KEYS + COMBINATIONS
