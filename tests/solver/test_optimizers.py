"""The optimizer's groups against ViTDet's own layer decay in Detectron2."""

import copy
import logging
import re

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver import build_optimizer as detectron2_optimizer
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rope_vit_det import create_backbone
from rope_vit_det.checkpoint.resume import carry_over, describe_groups
from rope_vit_det.errors import InputError
from rope_vit_det.solver import OPTIMIZERS, build_optimizer, optimizers
from rope_vit_det.solver.optimizers import learning_rate_table

muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


def _vitdet_name(name: str) -> str:
    """The name that the parameter has, or would have, in Detectron2's ViT."""
    name = re.sub(r"encoder\.block\.(\d+)", r"blocks.\1", name)
    name = re.sub(r"net\.conv_proj", "net.patch_embed.proj", name)
    return re.sub(r"net\..*(pos_embedding|class_token|reg_tokens)$", "net.pos_embed", name)


@pytest.fixture
def built(detector_cfg):
    detector_cfg.SOLVER.BASE_LR = 0.5
    detector_cfg.SOLVER.WEIGHT_DECAY = 0.25
    detector_cfg.SOLVER.LAYER_DECAY = 0.7
    detector_cfg.MODEL.FPN.NORM = "LN"
    model = build_model(detector_cfg)
    optimizer = build_optimizer(detector_cfg, model)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return model, optimizer, group_of


def test_learning_rates_are_vitdets(built):
    model, optimizer, group_of = built
    assert isinstance(optimizer, torch.optim.AdamW)
    rates = set()
    for name, parameter in model.named_parameters():
        oracle = get_vit_lr_decay_rate(_vitdet_name(name), lr_decay_rate=0.7, num_layers=12)
        assert group_of[id(parameter)]["lr"] == pytest.approx(0.5 * oracle), name
        rates.add(round(oracle, 9))
    assert len(rates) == 14  # stem, twelve blocks, heads


def test_weight_decay_spares_norms_biases_tokens_and_positions(built):
    model, _, group_of = built
    spared = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_norm = "norm" in type(module).__name__.lower()
            is_token = name in ("class_token", "reg_tokens", "pos_embedding")
            no_decay = is_norm or is_token or name == "bias"
            decay = group_of[id(parameter)]["weight_decay"]
            assert decay == (0.0 if no_decay else 0.25), f"{module_name}.{name}"
            if no_decay:
                spared.add(name)
    assert spared == {"weight", "bias", "class_token", "reg_tokens", "pos_embedding"}


def _with_queries():
    model = nn.ModuleDict({"queries": nn.Embedding(5, 4), "head": nn.Linear(4, 4)})
    return model, model["queries"].weight


@pytest.mark.parametrize("decay", [None, 0.0, 0.125])
def test_embeddings_decay_as_mask2former_says(detector_cfg, decay):
    """As its train_net.py does: every nn.Embedding has WEIGHT_DECAY_EMBED, 0.0 in its configs."""
    detector_cfg.SOLVER.WEIGHT_DECAY = 0.25
    if decay is not None:
        detector_cfg.SOLVER.WEIGHT_DECAY_EMBED = decay
    model, queries = _with_queries()
    groups = build_optimizer(detector_cfg, model).param_groups
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay_of[id(queries)] == (decay or 0.0)
    assert decay_of[id(model["head"].weight)] == 0.25


def test_a_run_goes_on_whose_embeddings_had_weight_decay(detector_cfg):
    model, queries = _with_queries()
    bias = model["head"].bias
    matrices = [queries, model["head"].weight]
    before = torch.optim.AdamW([{"params": matrices}, {"params": [bias], "weight_decay": 0.0}])
    _steps(model, before, 2)
    now = build_optimizer(detector_cfg, model)
    groups = (describe_groups(each, model) for each in (before, now))
    now.load_state_dict(carry_over(before.state_dict(), *groups))
    for parameter in model.parameters():
        assert torch.equal(now.state[parameter]["exp_avg"], before.state[parameter]["exp_avg"])
    assert {group["weight_decay"] for group in now.param_groups if len(group["params"]) == 2} == {0}


def test_every_trainable_parameter_is_there_once_and_no_frozen_one(detector_cfg):
    detector_cfg.MODEL.ROPE_VIT.FREEZE_BLOCKS = 3
    model = build_model(detector_cfg)
    optimizer = build_optimizer(detector_cfg, model)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert any(not p.requires_grad for p in model.parameters())


def test_a_resnet_backbone_can_be_trained_too(detector_cfg):
    detector_cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    detector_cfg.SOLVER.LAYER_DECAY = 0.7
    optimizer = build_optimizer(detector_cfg, build_model(detector_cfg))
    assert {group["lr"] for group in optimizer.param_groups} == {detector_cfg.SOLVER.BASE_LR}


def test_a_net_that_is_no_rope_vit_learns_at_the_whole_rate(detector_cfg):
    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.net = nn.Linear(3, 3)
    detector_cfg.SOLVER.LAYER_DECAY = 0.7
    optimizer = build_optimizer(detector_cfg, model)
    assert {group["lr"] for group in optimizer.param_groups} == {detector_cfg.SOLVER.BASE_LR}


@pytest.mark.parametrize("backbone", ["build_rope_vit_sfp_backbone", "build_resnet_fpn_backbone"])
@pytest.mark.parametrize(
    ("rate", "name", "told"), [(0.02, "AdamW", 1), (0.001, "AdamW", 0), (0.02, "SGD", 0)]
)
def test_a_resnets_rate_is_told_of_once(detector_cfg, caplog, backbone, rate, name, told):
    detector_cfg.MODEL.BACKBONE.NAME = backbone
    detector_cfg.SOLVER.BASE_LR, detector_cfg.SOLVER.OPTIMIZER = rate, name
    with caplog.at_level(logging.WARNING, logger="rope_vit_det.config.keys"):
        build_optimizer(detector_cfg, build_model(detector_cfg))
    lines = [record.getMessage() for record in caplog.records if "BASE_LR" in record.getMessage()]
    assert len(lines) == told and all("\n" not in line for line in lines)


class _Blocks(nn.Module):
    """Parameters under the names of a detector's: two matrices of blocks, and what is beside."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        small = dict(num_layers=2, hidden_dim=32, num_heads=2, mlp_dim=48)
        self.backbone.net = create_backbone("rope_vit_reg4_demo16", **small)
        self.head = nn.Linear(4, 4)


def _compiled_network(model):
    model.backbone.net = torch.compile(model.backbone.net)
    return model


def _compiled_backbone(model):
    model.backbone = torch.compile(model.backbone)
    return model


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = [
    DistributedDataParallel,
    torch.compile,
    lambda model: torch.compile(DistributedDataParallel(model)),
    lambda model: DistributedDataParallel(torch.compile(model)),
    _compiled_network,
    _compiled_backbone,
]


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("name", ["AdamW", pytest.param("Muon", marks=muon)])
def test_a_wrapped_model_has_the_groups_of_its_model(detector_cfg, one_process, wrap, name):
    detector_cfg.SOLVER.LAYER_DECAY, detector_cfg.SOLVER.OPTIMIZER = 0.5, name
    model = _Blocks()
    expected = build_optimizer(detector_cfg, model)
    table = learning_rate_table(model, expected)
    assert len({group["lr"] for group in expected.param_groups}) == 4  # stem, two blocks, head
    wrapped = wrap(model)
    optimizer = build_optimizer(detector_cfg, wrapped)
    for group, of_model in zip(optimizer.param_groups, expected.param_groups, strict=True):
        assert all(a is b for a, b in zip(group["params"], of_model["params"], strict=True))
        settings = ({k: v for k, v in g.items() if k != "params"} for g in (group, of_model))
        assert next(settings) == next(settings)
    assert learning_rate_table(wrapped, optimizer) == table


def _steps(model, optimizer, count, seed=0):
    """Steps by gradients that are the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return model


def _same(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_sgd_is_detectron2s(detector_cfg):
    solver = detector_cfg.SOLVER
    solver.OPTIMIZER, solver.BASE_LR, solver.WEIGHT_DECAY = "SGD", 0.1, 0.0
    solver.MOMENTUM, solver.NESTEROV = 0.8, True
    model = _Blocks()
    oracle = copy.deepcopy(model)
    _steps(model, build_optimizer(detector_cfg, model), 3)
    assert _same(model, _steps(oracle, detectron2_optimizer(detector_cfg, oracle), 3))


def test_timms_are_taken_by_name(detector_cfg):
    timm = pytest.importorskip("timm.optim")
    detector_cfg.SOLVER.OPTIMIZER = "timm:lion"
    model = _Blocks()
    optimizer = build_optimizer(detector_cfg, model)
    assert isinstance(optimizer, timm.Lion)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {
        0.0,
        detector_cfg.SOLVER.WEIGHT_DECAY,
    }
    _steps(model, optimizer, 1)


@pytest.mark.parametrize(
    ("name", "line"),
    [("AdamV", "did you mean 'AdamW'?"), ("timm:lionn", "did you mean 'timm:lion'?")],
)
def test_an_unknown_name_is_one_line(detector_cfg, name, line):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    detector_cfg.SOLVER.OPTIMIZER = name
    with pytest.raises(InputError) as error:
        build_optimizer(detector_cfg, _Blocks())
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("own", [lambda cfg, groups, model: None, torch.optim.Adagrad])
def test_what_makes_no_optimizer_is_one_line(detector_cfg, monkeypatch, own):
    monkeypatch.setattr(OPTIMIZERS, "_obj_map", {"Mine": own})
    detector_cfg.SOLVER.OPTIMIZER = "Mine"
    with pytest.raises(InputError, match=r"is 'Mine', which gives (None|<class .*>); register"):
        build_optimizer(detector_cfg, _Blocks())


@muon
@pytest.mark.slow
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_all_else(detector_cfg):
    solver = detector_cfg.SOLVER
    solver.OPTIMIZER, solver.BASE_LR, solver.WEIGHT_DECAY = "Muon", 0.01, 0.1
    model = _Blocks()
    oracle = copy.deepcopy(model)
    matrices = [p for p in oracle.backbone.net.encoder.block.parameters() if p.dim() == 2]
    known = {id(p) for p in matrices}
    others = [
        {"params": [p], "weight_decay": 0.1 if p.dim() > 1 and "weight" in name else 0.0}
        for name, p in oracle.named_parameters()
        if id(p) not in known
    ]
    parts = [
        torch.optim.Muon(matrices, 0.01, 0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.01),
    ]
    _steps(model, build_optimizer(detector_cfg, model), 3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for parameter in oracle.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for part in parts:
            part.step()
    assert _same(model, oracle)


@muon
@pytest.mark.parametrize("clip_type", ["norm", "full_model"])
@pytest.mark.slow
def test_muon_is_scheduled_clipped_and_resumed_as_one_optimizer(detector_cfg, tmp_path, clip_type):
    solver = detector_cfg.SOLVER
    solver.OPTIMIZER, solver.LAYER_DECAY = "Muon", 0.7
    solver.CLIP_GRADIENTS.ENABLED, solver.CLIP_GRADIENTS.CLIP_TYPE = True, clip_type

    def build(model):
        optimizer = build_optimizer(detector_cfg, model)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    model = _Blocks()
    optimizer, schedule = build(model)
    _steps(model, optimizer, 2)
    schedule.step()
    resumed = copy.deepcopy(model)
    torch.save([optimizer.state_dict(), schedule.state_dict()], tmp_path / "state.pth")
    other, other_schedule = build(resumed)
    saved = torch.load(tmp_path / "state.pth")
    for part, state in zip((other, other_schedule), saved, strict=True):
        part.load_state_dict(state)
    before = copy.deepcopy(model)
    _steps(model, optimizer, 2, seed=1)
    assert not _same(model, before)
    assert _same(model, _steps(resumed, other, 2, seed=1))
    assert {group["lr"] for group in other.param_groups} == {
        group["lr"] for group in optimizer.param_groups
    }


@muon
def test_muon_without_a_matrix_to_learn_is_refused(detector_cfg):
    detector_cfg.SOLVER.OPTIMIZER = "Muon"
    model = _Blocks()
    model.backbone.net.freeze(-1)
    with pytest.raises(InputError, match=r"set SOLVER\.OPTIMIZER AdamW"):
        build_optimizer(detector_cfg, model)


def test_the_users_own(detector_cfg):
    @OPTIMIZERS.register()
    def Mine(cfg, groups, model):  # noqa: N802
        return torch.optim.Adagrad(groups, lr=cfg.SOLVER.BASE_LR)

    detector_cfg.SOLVER.OPTIMIZER = "Mine"
    try:
        assert isinstance(build_optimizer(detector_cfg, _Blocks()), torch.optim.Adagrad)
    finally:
        OPTIMIZERS._obj_map.pop("Mine")


@pytest.mark.parametrize("name", ["AdamW", pytest.param("Muon", marks=muon)])
def test_adamw_is_fused_on_gpus_alone(detector_cfg, monkeypatch, name):
    detector_cfg.SOLVER.OPTIMIZER = name
    model = _Blocks()
    for on_gpu, fused in ((False, None), (True, True)):
        monkeypatch.setattr(torch.Tensor, "is_cuda", on_gpu)
        optimizer = build_optimizer(detector_cfg, model)
        groups = [group for group in optimizer.param_groups if not group.get("muon")]
        assert groups and {group["fused"] for group in groups} == {fused}


@pytest.mark.parametrize("clip_type", ["value", "norm"])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_clipping_is_detectron2s_to_the_bit(detector_cfg, clip_type, norm_type):
    solver = detector_cfg.SOLVER
    clip = solver.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE, clip.NORM_TYPE, clip.CLIP_VALUE = True, clip_type, norm_type, 2.0
    solver.OPTIMIZER, solver.BASE_LR, solver.MOMENTUM, solver.WEIGHT_DECAY = "SGD", 1.0, 0.0, 0.0
    model = _Blocks()
    oracle, before = copy.deepcopy(model), copy.deepcopy(model)
    _steps(model, build_optimizer(detector_cfg, model), 1)
    theirs = torch.optim.SGD(oracle.parameters(), lr=1.0)
    _steps(oracle, maybe_add_gradient_clipping(detector_cfg, theirs), 1)
    assert _same(model, oracle) and not _same(model, before)


@pytest.mark.parametrize("clip_type", ["value", "norm", "full_model"])
def test_a_fused_optimizer_clips_without_the_scale_that_detectron2_leaves_to_it(
    detector_cfg, monkeypatch, clip_type
):
    clip = detector_cfg.SOLVER.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE = True, clip_type, 0.5
    monkeypatch.setattr(optimizers, "_are_on_gpu", lambda groups: True)

    def train(start, scale):
        model = copy.deepcopy(start)
        optimizer = build_optimizer(detector_cfg, model)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
        calls, done = 0, 0
        while done < 3:  # the lines of AMPTrainer
            optimizer.zero_grad()
            scaler.scale((100 * model.head(x)).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            calls, done = calls + 1, optimizer.state[model.head.weight]["step"]
        return model, calls

    start = _Blocks()
    plain, _ = train(start, 1)
    assert not _same(plain, start)
    for scale, overflows in ((2.0**16, False), (2.0**120, True)):
        model, calls = train(start, scale)
        assert _same(model, plain) and (calls > 3) is overflows


def test_an_unknown_way_to_clip_is_refused(detector_cfg):
    clip = detector_cfg.SOLVER.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE = True, "hard"
    with pytest.raises(InputError, match="CLIP_TYPE is 'hard'; allowed: value, norm, full_model"):
        build_optimizer(detector_cfg, _Blocks())


def test_every_weight_is_in_a_row_with_its_rate(detector_cfg):
    detector_cfg.SOLVER.BASE_LR, detector_cfg.SOLVER.WEIGHT_DECAY = 0.1, 0.25
    detector_cfg.SOLVER.LAYER_DECAY = 0.5
    detector_cfg.MODEL.ROPE_VIT.FREEZE_BLOCKS = 2
    model = build_model(detector_cfg)
    table = learning_rate_table(model, build_optimizer(detector_cfg, model))
    rows = [line.rsplit(maxsplit=3) for line in table.splitlines()[2:]]
    frozen = [line.split() for line in table.splitlines()[2:] if "frozen" in line]
    total = sum(int(line.split()[-1].replace(",", "")) for line in table.splitlines()[2:])
    assert total == sum(p.numel() for p in model.parameters())
    assert {words[0] for words in frozen} == {
        "backbone.net",
        "backbone.net.encoder.block.0",
        "backbone.net.encoder.block.1",
    }
    rates = {row[0].strip(): row[1] for row in rows if "frozen" not in " ".join(row)}
    assert rates["backbone.net.encoder.block.11"] == "0.05"
    assert rates["backbone.net.encoder.block.9"] == "0.0125"
    assert rates["roi_heads.box_head"] == rates["proposal_generator"] == "0.1"
    assert {row[2] for row in rows if "frozen" not in " ".join(row)} == {"0.25", "0.0"}


def test_another_network_under_the_same_name_has_no_stem_of_ours():
    model = nn.ModuleDict({"backbone": nn.ModuleDict({"net": nn.Linear(3, 2)})})
    table = learning_rate_table(model, torch.optim.SGD(model.parameters(), lr=0.1))
    (row,) = table.splitlines()[2:]
    assert row.split() == ["backbone", "0.1", "0", "8"]


def test_a_parameter_of_the_model_itself_has_a_row():
    model = nn.Linear(3, 2, bias=False)
    table = learning_rate_table(model, torch.optim.SGD(model.parameters(), lr=0.1))
    (row,) = table.splitlines()[2:]
    assert row.split() == ["weight", "0.1", "0", "6"]
