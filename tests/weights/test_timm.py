"""timm's files and its publishers' read here, files written here read by timm."""

import json

import pytest
import timm
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from helpers import move_off_initial_values, relative_difference
from hub_server import hub_server, take_for_the_hub
from huggingface_hub.errors import GatedRepoError
from publishers import eva02, meta_dinov3, meta_perception_encoder
from safetensors.torch import load_file, save_file
from timm.models._registry import _model_pretrained_cfgs
from timm.models.eva import checkpoint_filter_fn

from rope_vit_det import add_rope_vit_config, create_model, load_model, use_rope_vit
from rope_vit_det.checkpoint.checkpointer import DetectorCheckpointer
from rope_vit_det.config.use import compared_settings, disagreement
from rope_vit_det.errors import InputError
from rope_vit_det.models import VARIANTS
from rope_vit_det.weights import catalogue, hub, published_weights
from rope_vit_det.weights.convert import convert
from rope_vit_det.weights.load import as_birder_url
from rope_vit_det.weights.timm import from_timm

TINY = "vit_tiny_patch16_dinov3_qkvb"
EUPE = f"{TINY}.eupe_lvd1689m"


@pytest.fixture
def shallow(monkeypatch):
    """Networks of timm's with a block each, here too."""

    def build(name, *, depth=1):
        torch.manual_seed(0)
        monkeypatch.setitem(VARIANTS, name, VARIANTS[name] | {"num_layers": depth})
        oracle = timm.create_model(name, depth=depth, dynamic_img_size=True)
        return move_off_initial_values(oracle).eval()

    return build


def agree(ours, oracle, size=None):
    side = size or ours.patch_size * 6
    x = torch.randn(2, 3, side, side)
    with torch.inference_mode():
        neck = oracle.forward_intermediates(x, indices=1, intermediates_only=True)[-1]
        assert relative_difference(ours.detection_features(x)["neck"], neck) < 1e-5
        features = oracle.forward_features(x)
        embedding = oracle.forward_head(features, pre_logits=True)
        assert relative_difference(ours.embedding(x), embedding) < 1e-5
        if ours.num_classes:
            assert relative_difference(ours(x), oracle(x)) < 1e-5


def test_the_catalogue_is_timms():
    wanted = {
        name: cfg
        for name, cfg in _model_pretrained_cfgs.items()
        if "." in name and name.split(".")[0] in VARIANTS
    }
    timms = {name: each for name, each in published_weights().items() if each.hub_id}
    assert timms.keys() == wanted.keys() and len(timms) == 70
    for name, cfg in wanted.items():
        entry = timms[name]
        assert (entry.hub_id, entry.license) == (cfg.hf_hub_id, cfg.license)
        assert entry.image_size == cfg.input_size[1:]
        assert (entry.rgb_mean, entry.rgb_std) == (tuple(cfg.mean), tuple(cfg.std))
        assert entry.num_classes == cfg.num_classes


@pytest.mark.parametrize(
    "name",
    [
        TINY,
        "eva02_tiny_patch14_336",
        "eva02_base_patch14_224",
        "vit_pe_core_tiny_patch16_384",
        "vit_small_patch16_rope_mixed_224",
        "vit_medium_patch16_rope_reg1_gap_256",
    ],
)
def test_timms_files_load_and_go_back(name, shallow, tmp_path):
    oracle = shallow(name)
    path = tmp_path / f"{name}.mine.safetensors"
    save_file(oracle.state_dict(), path)
    model, info = load_model(path)
    assert (info.network, info.tag, info.num_classes) == (name, "mine", oracle.num_classes)
    assert info.image_size == oracle.patch_embed.img_size
    agree(model, oracle)
    back = tmp_path / f"{name}.back.safetensors"
    convert(path, back)
    written = load_file(back)
    assert written.keys() == oracle.state_dict().keys()
    assert all(torch.equal(written[k], v) for k, v in oracle.state_dict().items())


def _as_the_hub(oracle, folder, **changes):
    """timm's files of a model; `changes` are of its `config.json`, None takes an entry out."""
    timm.models.save_for_hf(oracle, folder, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] = config["model_args"] | changes.pop("model_args", {})
    config["model_args"] = {k: v for k, v in config["model_args"].items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config | changes))
    return f"timm:{folder / 'model.safetensors'}"


def test_the_hubs_config_beside_a_file_says_its_network(shallow, tmp_path):
    oracle = shallow(TINY)
    model, info = load_model(_as_the_hub(oracle, tmp_path, model_args={"depth": None}))
    assert info.network == TINY
    assert info.rgb_mean == pytest.approx(oracle.pretrained_cfg["mean"])
    agree(model, oracle)


@pytest.mark.parametrize(
    ("name", "pool", "size"),
    [
        ("vit_small_patch16_dinov3", "token", 256),
        ("vit_small_patch16_dinov3", "avg", 512),
        ("eva02_tiny_patch14_224", "token", (224, 448)),
        ("vit_pe_core_tiny_patch16_384", "avg", 384),
        ("vit_pe_core_tiny_patch16_384", "map", 192),
        ("vit_small_patch16_rope_ape_224", "avg", (160, 224)),
    ],
)
def test_what_the_hubs_config_changes_is_followed(name, pool, size, monkeypatch, tmp_path):
    torch.manual_seed(0)
    monkeypatch.setitem(VARIANTS, name, VARIANTS[name] | {"num_layers": 1})
    own = {"num_classes": 10, "global_pool": pool, "img_size": size}
    oracle = timm.create_model(name, depth=1, dynamic_img_size=True, **own)
    move_off_initial_values(oracle).eval()
    path = _as_the_hub(oracle, tmp_path, model_args={"depth": None})
    model, info = load_model(path)
    assert info.image_size == (size if isinstance(size, tuple) else (size, size))
    agree(model, oracle)
    # ... and a detector, which pools nothing, has no quarrel with it.
    cfg = small_config()
    use_rope_vit(cfg, path)
    assert disagreement(compared_settings(cfg), info) is None


def test_an_older_config_of_the_hubs_and_a_damaged_one(shallow, tmp_path):
    """timm's `_parse_model_cfg` takes the first; the second was passed over without a word."""
    path = _as_the_hub(shallow(TINY), tmp_path, model_args={"depth": None})
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"architecture": TINY, "mean": [0.1, 0.2, 0.3]}))
    assert load_model(path)[1].rgb_mean == (0.1, 0.2, 0.3)
    file.write_text(file.read_text()[:-1])
    with pytest.raises(InputError, match=r"config\.json cannot be read: .*line 1"):
        load_model(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "deit3_small_patch16_224"}, "holds a deit3_small_patch16_224, a network"),
        ({"model_args": {"global_pool": "avgmax"}}, "global_pool 'avgmax'; known are avg, token"),
        ({"model_args": {"ref_feat_shape": 16}}, "model_args has 'ref_feat_shape'"),
    ],
)
def test_what_the_hubs_config_changes_and_is_not_built_is_refused(
    changes, message, shallow, tmp_path
):
    changes["model_args"] = changes.get("model_args", {}) | {"depth": None}
    path = _as_the_hub(shallow("vit_small_patch16_rope_ape_224"), tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        load_model(path)


def test_the_name_of_a_file_says_which_of_its_networks_weights_it_has(
    shallow, cache, tmp_path, caplog
):
    name = "vit_large_patch16_dinov3"
    state = shallow(name).state_dict()
    for file in (f"{name}.sat493m.safetensors", f"{name}.lvd1689m.safetensors"):
        save_file(state, tmp_path / file)
        _, info = load_model(tmp_path / file)
        assert info.rgb_mean == tuple(_model_pretrained_cfgs[file.rpartition(".")[0]].mean)
    torch.save(meta_dinov3(state), tmp_path / "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth")
    _, info = load_model(tmp_path / "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth", network=name)
    assert info.rgb_mean == tuple(_model_pretrained_cfgs[f"{name}.sat493m"].mean)
    cfg = small_config()
    use_rope_vit(cfg, tmp_path / f"{name}.sat493m.safetensors")
    assert pytest.approx([255 * x for x in info.rgb_mean], abs=1e-3) == cfg.MODEL.PIXEL_MEAN
    assert "which weights" not in caplog.text
    save_file(state, tmp_path / f"{name}.safetensors")
    load_model(tmp_path / f"{name}.safetensors")
    assert "does not say which weights" in caplog.text and "lvd1689m or sat493m" in caplog.text
    small = "vit_small_patch16_dinov3_qkvb"
    for tag, licence in (("lvd1689m", "dinov3-license"), ("eupe_lvd1689m", "fair-noncomm")):
        save_file(shallow(small).state_dict(), tmp_path / f"{small}.{tag}.safetensors")
        assert load_model(tmp_path / f"{small}.{tag}.safetensors")[1].license.startswith(licence)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state, wrong: {"state_dict": wrong, "state_dict_ema": state},  # timm's trainer
        lambda state, wrong: {"model": wrong, "model_ema": state},
        lambda state, wrong: {f"_orig_mod.{key}": value for key, value in state.items()},
        lambda state, wrong: {"state_dict": {f"model.{k}": v for k, v in state.items()}},
        lambda state, wrong: {"teacher": {f"backbone.{k}": v for k, v in state.items()}},  # Meta's
    ],
)
def test_files_of_training_codes(wrap, shallow, tmp_path):
    oracle = shallow(TINY)
    state = oracle.state_dict()
    wrong = {key: torch.zeros_like(value) for key, value in state.items()}
    torch.save(wrap(state, wrong), tmp_path / "file.pth")
    model, _ = load_model(f"timm:{tmp_path / 'file.pth'}", network=TINY)
    agree(model, oracle)


def test_a_patch_kernel_of_another_size_is_resampled_as_timm_does(shallow, tmp_path, caplog):
    """EVA-02's files for detection have kernels of 16 px."""
    name = "eva02_tiny_patch14_224"
    oracle, larger = shallow(name), timm.create_model(name, depth=1, patch_size=16, img_size=256)
    state = move_off_initial_values(larger).state_dict()
    oracle.load_state_dict(checkpoint_filter_fn(dict(state), oracle))
    torch.save(eva02(state, ""), tmp_path / "eva02_Ti_pt_in21k_p14to16.pt")
    model, _ = load_model(f"timm:{tmp_path / 'eva02_Ti_pt_in21k_p14to16.pt'}", network=name)
    agree(model, oracle)
    assert "resampled from 16 to 14 px" in caplog.text


def test_two_final_norms_are_refused(shallow, tmp_path):
    state = shallow("eva02_tiny_patch14_224").state_dict()
    state |= {k.replace("fc_norm", "norm"): v + 1 for k, v in state.items() if "fc_norm" in k}
    save_file(state, tmp_path / "eva02_tiny_patch14_224.x.safetensors")
    with pytest.raises(InputError, match="two final norms"):
        load_model(tmp_path / "eva02_tiny_patch14_224.x.safetensors")


def test_an_override_of_none_takes_a_part_out(shallow, tmp_path):
    name = "vit_pe_core_tiny_patch16_384"
    save_file(shallow(name).state_dict(), tmp_path / f"{name}.x.safetensors")
    model, info = load_model(tmp_path / f"{name}.x.safetensors", attn_pool_num_heads=None)
    assert model.attn_pool is None and info.config == {}
    whole, _ = load_model(tmp_path / f"{name}.x.safetensors", image_size=None, pt_grid_size=None)
    assert whole.attn_pool is not None and whole.pos_grid == (24, 24)
    load_model(tmp_path / f"{name}.x.safetensors", features_only=True, num_classes=0)
    with pytest.raises(ValueError, match=r"overrides .*num_layers.*: missing encoder\.block\.1"):
        load_model(tmp_path / f"{name}.x.safetensors", num_layers=2)


def test_what_timms_files_cannot_say_is_not_lost(shallow, tmp_path):
    name = "eva02_tiny_patch14_224"
    save_file(shallow(name).state_dict(), tmp_path / f"{name}.x.safetensors")
    output = tmp_path / f"{name}.y.safetensors"
    for changes in ({"patch_size": 16}, {"add_config": {"pt_grid_size": None}}):
        with pytest.raises(InputError, match="timm's files cannot say p"):
            convert(tmp_path / f"{name}.x.safetensors", output, **changes)
    assert not output.exists()


def test_a_publishers_pth_is_converted(shallow, tmp_path):
    """As docs/networks.md has it."""
    oracle = shallow(TINY)
    source = tmp_path / "dinov3_vitt16.pth"
    torch.save(meta_dinov3(oracle.state_dict()), source)
    for i, name in enumerate((source, f"timm:{source}")):
        output = tmp_path / f"{TINY}.mine{i}.safetensors"
        convert(name, output, network=TINY)
        written = load_file(output)
        assert all(torch.equal(written[k], v) for k, v in oracle.state_dict().items())


def test_transformers_files_load_under_both_prefixes(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    name = "vit_small_plus_patch16_dinov3_qkvb"
    monkeypatch.setitem(VARIANTS, name, VARIANTS[name] | {"num_layers": 2})
    config = transformers.DINOv3ViTConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_register_tokens=4,
        use_gated_mlp=True,
        hidden_act="silu",
        image_size=256,
    )
    oracle = move_off_initial_values(transformers.DINOv3ViTModel(config)).eval()
    oracle.save_pretrained(tmp_path)  # layer.0.…
    state = load_file(tmp_path / "model.safetensors")
    assert any(key.startswith("layer.0.") for key in state)
    longer = {k.replace("layer.", "model.layer.", 1): v for k, v in state.items()}
    save_file(longer, tmp_path / "longer.safetensors")
    x = torch.randn(2, 3, 96, 160)
    with torch.inference_mode():
        theirs = oracle(x)
    for file in ("model.safetensors", "longer.safetensors"):
        model, _ = load_model(tmp_path / file, network=name)
        with torch.inference_mode():
            pooled = model.embedding(x, pooling="class_token")
            mean = model.embedding(x)
        assert relative_difference(pooled, theirs.pooler_output) < 1e-5
        assert relative_difference(mean, theirs.last_hidden_state[:, 5:].mean(1)) < 1e-5


LAYOUTS = [
    (TINY, meta_dinov3),
    ("vit_small_patch16_dinov3", meta_dinov3),
    ("vit_small_plus_patch16_dinov3_qkvb", meta_dinov3),
    ("vit_pe_core_tiny_patch16_384", lambda state: meta_perception_encoder(state, "visual.")),
    ("vit_pe_core_tiny_patch16_384", lambda state: meta_perception_encoder(state, "")),
    ("vit_pe_lang_large_patch14_448", lambda state: meta_perception_encoder(state, "")),
    ("eva02_base_patch14_224", lambda state: eva02(state, "")),
    ("eva02_tiny_patch14_224", lambda state: eva02(state, "")),
    ("eva02_base_patch16_clip_224", lambda state: eva02(state, "visual.")),
]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_publishers_files_load_as_timm_loads_them(name, layout, shallow, tmp_path):
    source = shallow(name)
    state = layout(source.state_dict())
    oracle = shallow(name)
    strict = not any(key.startswith("visual.head") for key in state)
    oracle.load_state_dict(checkpoint_filter_fn(dict(state), oracle), strict=strict)
    path = tmp_path / "file.pth"
    torch.save({"model": state}, path)
    model, info = load_model(f"timm:{path}", network=name)
    assert info.network == name
    agree(model, oracle)


def test_a_file_that_says_nothing_is_known_by_its_tensors(tmp_path, shallow):
    oracle = shallow("vit_pe_spatial_tiny_patch16_512", depth=12)
    save_file(oracle.state_dict(), tmp_path / "model.safetensors")
    model, info = load_model(tmp_path / "model.safetensors")
    assert info.network == "vit_pe_spatial_tiny_patch16_512"
    agree(model, oracle)


def test_zero_biases_fit_both_networks_and_others_only_the_one_that_has_them(shallow):
    name = "vit_small_patch16_dinov3"
    with_bias = shallow(f"{name}_qkvb").state_dict()
    with pytest.raises(InputError, match=r"bias of q is not zero.*_qkvb"):
        from_timm(with_bias, name)
    keys = {k.replace("q_bias", "k_bias"): v for k, v in with_bias.items() if "q_bias" in k}
    with pytest.raises(InputError, match="the bias of k is not zero"):
        from_timm(with_bias | keys, f"{name}_qkvb")
    zero = {k: torch.zeros_like(v) if k.endswith("_bias") else v for k, v in with_bias.items()}
    for network in (name, f"{name}_qkvb"):
        state, _ = from_timm(zero, network)
        create_model(network, num_layers=1).load_state_dict(state)
    without, _ = from_timm(shallow(name).state_dict(), f"{name}_qkvb")
    create_model(f"{name}_qkvb", num_layers=1).load_state_dict(without)


def test_what_is_no_part_of_the_network_is_listed_and_anything_else_refused(shallow, tmp_path):
    state = meta_dinov3(shallow(TINY).state_dict())
    _, left_out = from_timm(state, TINY)
    masks = [key for key in state if key.endswith("bias_mask")]
    others = ["mask_token", "rope_embed.periods", "local_cls_norm.weight"]
    assert sorted(left_out) == sorted(masks + others)
    torch.save(state | {"extra.weight": torch.ones(3)}, tmp_path / "file.pth")
    with pytest.raises(InputError, match=r"unexpected extra\.weight"):
        load_model(f"timm:{tmp_path / 'file.pth'}", network=TINY)


@pytest.mark.parametrize("missing", ["classifier", "pooling"])
def test_files_without_classifier_or_pooling_load(missing, shallow, tmp_path):
    name = "vit_pe_core_tiny_patch16_384"
    oracle = shallow(name)
    gone = ("head.",) if missing == "classifier" else ("head.", "attn_pool.")
    state = {k: v for k, v in oracle.state_dict().items() if not k.startswith(gone)}
    path = tmp_path / f"{name}.safetensors"
    save_file(state, path)
    model, info = load_model(path)
    assert info.num_classes == 0
    x = torch.randn(1, 3, 96, 96)
    neck = oracle.forward_intermediates(x, indices=1, intermediates_only=True)[-1]
    assert relative_difference(model.detection_features(x)["neck"], neck) < 1e-5
    assert model.embedding(x).shape == (1, 192)


def small_config():
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_rope_vit_sfp_backbone"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@pytest.fixture
def eupe(cache, shallow, monkeypatch):
    """A hub with a published file of timm's."""
    oracle = shallow(TINY)
    path = cache.parent / "eupe.safetensors"
    save_file(oracle.state_dict(), path)
    url = f"/timm/{EUPE}/resolve/main/model.safetensors"
    with hub_server({url: path.read_bytes()}) as server:
        take_for_the_hub(server, monkeypatch)
        yield server, oracle


def test_a_published_name_loads_and_says_its_licence(eupe, caplog):
    for name in (EUPE, f"timm://{EUPE}"):
        caplog.clear()
        model, info = load_model(name)
        assert (info.network, info.tag) == (TINY, "eupe_lvd1689m")
        assert f"{EUPE}: licence fair-noncommercial-research-license" in caplog.text
        agree(model, eupe[1])


def test_a_file_that_is_not_the_hubs_is_refused(eupe):
    eupe[0].behaviour = "tamper"
    with pytest.raises(InputError, match=r"is not .*eupe_lvd1689m as published: its sha256"):
        load_model(EUPE)


def test_a_gated_repository_names_the_licence_and_the_way(cache, monkeypatch):
    def gated(*args, **kwargs):
        raise GatedRepoError.__new__(GatedRepoError)  # its arguments differ by the hub's version

    monkeypatch.setattr(hub, "hf_hub_download", gated)
    entry = catalogue.resolve("vit_base_patch16_dinov3.lvd1689m")
    with pytest.raises(InputError, match=r"dinov3-license.*accept it at .*timm/.*hf auth login"):
        hub.fetch(entry)


def test_a_network_without_a_tag_names_its_weights():
    with pytest.raises(InputError, match=r"did you mean 'vit_base_patch16_dinov3\.lvd1689m'"):
        catalogue.resolve("vit_base_patch16_dinov3")


def test_under_a_detector_they_load_as_birders_do(eupe, caplog):
    oracle = eupe[1]
    cfg = small_config()
    use_rope_vit(cfg, weights=f"timm://{EUPE}")
    assert f"timm://{EUPE}" == cfg.MODEL.WEIGHTS
    assert (cfg.MODEL.ROPE_VIT.NAME, cfg.MODEL.ROPE_VIT.IMAGE_SIZE) == (TINY, 256)
    assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53] and cfg.INPUT.FORMAT == "RGB"
    model = build_model(cfg).eval()
    DetectorCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    x = torch.randn(1, 3, 96, 128)
    neck = oracle.forward_intermediates(x, indices=1, intermediates_only=True)[-1]
    assert relative_difference(model.backbone.net(x)["neck"], neck) < 1e-5


@pytest.mark.parametrize("network", ["vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb"])
def test_a_file_that_fits_two_networks_serves_either(network, shallow, cache, tmp_path):
    """Meta's DINOv3 of B, L and H have biases of zero."""
    name = "vit_small_patch16_dinov3"
    oracle = shallow(name)
    shallow(f"{name}_qkvb")
    file = tmp_path / "dinov3_vits16.pth"
    torch.save(meta_dinov3(oracle.state_dict()), file)
    for weights in (f"timm:{file}", str(file)):
        cfg = small_config()
        with pytest.raises(InputError, match="fits several networks; say which: network="):
            use_rope_vit(cfg, weights)
        use_rope_vit(cfg, weights, network=network)
        assert cfg.MODEL.WEIGHTS.startswith("birder:") and cfg.INPUT.FORMAT == "RGB"
        cfg.MODEL.WEIGHTS = as_birder_url(weights)
        model = build_model(cfg).eval()
        DetectorCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        x = torch.randn(1, 3, 96, 128)
        neck = oracle.forward_intermediates(x, indices=1, intermediates_only=True)[-1]
        assert relative_difference(model.backbone.net(x)["neck"], neck) < 1e-5


def test_a_local_file_under_a_detector_needs_no_network(shallow, cache, tmp_path):
    oracle = shallow(TINY, depth=12)
    save_file(oracle.state_dict(), tmp_path / "model.safetensors")
    cfg = small_config()
    cfg.MODEL.ROPE_VIT.NAME = TINY
    model = build_model(cfg).eval()
    DetectorCheckpointer(model).load(f"timm:{tmp_path / 'model.safetensors'}")
    x = torch.randn(1, 3, 96, 128)
    neck = oracle.forward_intermediates(x, indices=1, intermediates_only=True)[-1]
    assert relative_difference(model.backbone.net(x)["neck"], neck) < 1e-5
