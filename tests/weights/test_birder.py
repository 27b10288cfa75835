"""Files of birder's read here, files written here read by birder."""

import dataclasses
import os
import stat

import pytest
import torch
from birder.common import fs_ops
from helpers import BIRDS, RGB_STATS, birders_weights, relative_difference
from safetensors import safe_open
from safetensors.torch import save_file

from rope_vit_det import create_model, load_model
from rope_vit_det.errors import InputError
from rope_vit_det.models import VARIANTS
from rope_vit_det.utils.atomic_files import new_file
from rope_vit_det.weights import published_weights, read_weights_file, write_weights_file
from rope_vit_det.weights.birder import network_of_file_name

SUFFIXES = (".pt", ".safetensors")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_birders_loads_and_says_what_it_is(birder_file, suffix):
    path, net = birder_file(size=(192, 256), suffix=suffix)
    model, info = load_model(path)
    assert (info.network, info.tag) == ("rope_vit_reg1_t16", "birds")
    assert (info.num_classes, dict(info.class_to_idx)) == (3, BIRDS)
    assert info.image_size == (192, 256)
    assert {"mean": info.rgb_mean, "std": info.rgb_std} == RGB_STATS
    assert info.rope["rope_temperature"] == 100.0 and info.pt_grid_size is None
    assert not model.training
    x = torch.randn(2, 3, 192, 256)
    assert relative_difference(model(x), net(x)) < 1e-5
    assert relative_difference(model.embedding(x), net.embedding(x)) < 1e-5


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("config", [None, {"pt_grid_size": [16, 16]}])
def test_what_is_written_here_loads_in_birder(birder_file, birder_output, tmp_path, suffix, config):
    path, net = birder_file(config=config)
    state, info = read_weights_file(path)
    written = tmp_path / f"rope_vit_reg1_t16_mine{suffix}"
    write_weights_file(written, state, info)
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(birder_output(written, info.network, x), net(x))
    _, told = fs_ops.load_model(
        torch.device("cpu"), info.network, path=written, inference=True, st=suffix != ".pt"
    )
    assert told.class_to_idx == BIRDS and told.custom_config == config
    assert {k: tuple(v) for k, v in told.rgb_stats.items()} == RGB_STATS
    assert read_weights_file(written)[1] == dataclasses.replace(info, tag="mine")


def test_the_metadata_is_birders_to_the_letter(birder_file, tmp_path):
    path, _ = birder_file(suffix=".safetensors", config={"pt_grid_size": [16, 16]})
    state, info = read_weights_file(path)
    written = tmp_path / "rope_vit_reg1_t16_mine.safetensors"
    write_weights_file(written, state, info)
    with safe_open(path, "pt") as a, safe_open(written, "pt") as b:
        assert a.metadata() == b.metadata()
        assert set(a.keys()) == set(b.keys())


def test_the_dict_is_birders_to_the_letter(birder_file, tmp_path):
    path, _ = birder_file(config={"pt_grid_size": (16, 16)})
    state, info = read_weights_file(path)
    write_weights_file(tmp_path / "rope_vit_reg1_t16_mine.pt", state, info)
    theirs, ours = (
        torch.load(p, weights_only=True) for p in (path, tmp_path / "rope_vit_reg1_t16_mine.pt")
    )
    assert theirs.pop("state").keys() == ours.pop("state").keys()
    assert theirs == ours


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_config_in_the_file_beats_the_architecture_and_the_caller_beats_both(birder_file, suffix):
    path, net = birder_file(config={"pt_grid_size": [16, 16]}, suffix=suffix)
    model, info = load_model(path)
    assert info.pt_grid_size == (16, 16) and info.config == {"pt_grid_size": [16, 16]}
    net.adjust_size((320, 288))
    x = torch.randn(1, 3, 320, 288)
    # birder's adjust_size resamples with antialiasing, the forward pass here without
    resampled, _ = load_model(path, image_size=(320, 288))
    assert relative_difference(resampled(x), net(x)) < 1e-5

    counting, _ = load_model(path, pt_grid_size="count")
    plain = create_model("rope_vit_reg1_t16", num_classes=3)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(counting(x), plain.eval()(x))
    assert relative_difference(model(x), counting(x)) > 1e-4


def test_no_pretraining_grid_in_the_file_beats_one_in_the_architecture(birder_file, monkeypatch):
    monkeypatch.setitem(
        VARIANTS,
        "rope_vit_reg1_t16",
        VARIANTS["rope_vit_reg1_t16"] | {"default_pt_grid_size": (8, 8)},
    )
    path, _ = birder_file(config={"pt_grid_size": None, "drop_path_rate": 0.3})
    model, info = load_model(path)
    assert info.pt_grid_size is None and model.default_pt_grid_size is None
    assert model.encoder.block[-1].drop_path.p == 0.3
    assert load_model(path, drop_path_rate=0.1)[0].encoder.block[-1].drop_path.p == 0.1


@pytest.mark.parametrize(
    "config",
    [
        {"norm_layer_type": "RMSNorm", "mlp_layer_type": "SwiGLU_FFN"},
        {"attn_pool_head": True, "attn_pool_special_tokens": True},
        {"attn_pool_head": True, "attn_pool_num_heads": 2, "class_token": False},
        {"rope_rot_type": "interleaved", "rope_grid_indexing": "xy", "rope_grid_offset": 1},
        {"rope_temperature": 10000.0, "layer_scale_init_value": 1e-5, "num_reg_tokens": 3},
        {"pre_norm": True, "norm_layer_eps": 1e-5, "attn_norm": True, "num_layers": 3},
        {"pos_embed_special_tokens": False, "post_norm": False, "mlp_dim": 256},
    ],
)
def test_any_config_of_the_published_networks_is_honoured(birder_file, config):
    path, net = birder_file(config=config)
    x = torch.randn(1, 3, 224, 224)
    assert relative_difference(load_model(path)[0](x), net(x)) < 1e-5


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"qk_norm": True}, "config has 'qk_norm': True.*known are .*attn_norm"),
        ({"mlp_layer_type": "SoftMoE_FFN"}, "'mlp_layer_type': 'SoftMoE_FFN'; known are FFN"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_named(birder_file, config, told):
    path, _ = birder_file()
    content = torch.load(path, weights_only=True)
    torch.save(content | {"config": config}, path)
    with pytest.raises(InputError, match=told):
        load_model(path)


def test_overrides(birder_file):
    path, net = birder_file()
    x = torch.randn(1, 3, 224, 224)
    headless, info = load_model(path, num_classes=0)
    assert info.num_classes == 3
    assert relative_difference(headless(x), net.embedding(x)) < 1e-5
    other, _ = load_model(path, num_classes=11)
    assert other(x).shape == (1, 11) and not other(x).any()
    strided, _ = load_model(path, patch_stride=32, window_size=3)
    assert strided.detection_features(x)["neck"].shape == (1, 192, 7, 7)


def test_a_network_without_classifier(birder_file):
    path, net = birder_file(classes={})
    model, info = load_model(path)
    x = torch.randn(1, 3, 224, 224)
    assert info.num_classes == 0 and relative_difference(model(x), net.embedding(x)) < 1e-5


@pytest.mark.parametrize(
    ("name", "network", "tag"),
    [
        ("rope_vit_reg4_b14_capi-imagenet21k.pt", "rope_vit_reg4_b14", "capi-imagenet21k"),
        ("rope_vit_reg4_b14.safetensors", "rope_vit_reg4_b14", None),
        ("rope_vit_reg4_b14-mine.v2.pt", "rope_vit_reg4_b14", "mine.v2"),
        ("rope_vit_reg4_b145.pt", None, None),
        ("model.pt", None, None),
        ("my_rope_vit_reg4_b14.pt", None, None),
    ],
)
def test_the_file_name_begins_with_the_network(name, network, tag):
    assert network_of_file_name(name) == (network, tag)


def test_every_published_name_begins_with_its_network():
    for name, entry in birders_weights().items():
        assert network_of_file_name(entry.file_name) == (entry.network, entry.tag), name


def test_another_name_needs_the_network_and_lists_those_that_fit(birder_file):
    path, net = birder_file()
    other = path.rename(path.with_name("model.pt"))
    with pytest.raises(InputError, match="give network='rope_vit_reg1_t16'"):
        load_model(other)
    model, info = load_model(other, network="rope_vit_reg1_t16")
    assert (info.network, info.tag) == ("rope_vit_reg1_t16", None)
    x = torch.randn(1, 3, 224, 224)
    assert relative_difference(model(x), net(x)) < 1e-5
    with pytest.raises(InputError, match="unknown network 'rope_vit_b15'; known are "):
        load_model(other, network="rope_vit_b15")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("rope_vit_reg1_s16_birds.pt", "_s16 at 224x224 px.*give network='rope_vit_reg1_t16'"),
        ("rope_vit_t16_birds.pt", "unexpected reg_tokens.*give network='rope_vit_reg1_t16'"),
    ],
)
def test_tensors_of_another_network_than_the_name_says(birder_file, name, told):
    path, _ = birder_file()
    with pytest.raises(InputError, match=told):
        load_model(path.rename(path.with_name(name)))


def test_tensors_of_no_network(birder_file):
    path, _ = birder_file()
    content = torch.load(path, weights_only=True)
    del content["state"]["encoder.block.3.norm1.weight"]
    torch.save(content, path)
    with pytest.raises(InputError, match=r"missing encoder.block.3.norm1.weight.*no known network"):
        load_model(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_writing_never_replaces_a_file_by_itself(birder_file, tmp_path, suffix):
    path, _ = birder_file()
    state, info = read_weights_file(path)
    target = tmp_path / f"rope_vit_reg1_t16_mine{suffix}"
    target.write_text("precious")
    with pytest.raises(InputError, match=r"is there already.*--force"):
        write_weights_file(target, state, info)
    assert target.read_text() == "precious"
    write_weights_file(target, state, info, force=True)
    assert read_weights_file(target)[1].num_classes == 3


def test_writing_is_all_or_nothing(tmp_path):
    target = tmp_path / "file.pt"
    target.write_text("old")
    with pytest.raises(RuntimeError), new_file(target, force=True) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["file.pt"]
    link = tmp_path / "link.pt"
    link.symlink_to(target)
    with new_file(link, force=True) as temporary:
        temporary.write_text("new")
    assert link.is_symlink() and target.read_text() == "new"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~umask


def test_writing_what_is_not_the_networks_tensors(birder_file, tmp_path):
    path, _ = birder_file()
    state, info = read_weights_file(path)
    with pytest.raises(InputError, match="not the tensors of rope_vit_reg1_t16: missing class_tok"):
        write_weights_file(
            tmp_path / "x.pt", {k: v for k, v in state.items() if k != "class_token"}, info
        )
    with pytest.raises(InputError, match=r"must end in \.pt or \.safetensors"):
        write_weights_file(tmp_path / "x.pth", state, info)
    assert os.listdir(tmp_path) == [path.name]


def test_a_view_is_written_without_the_rest_of_its_storage(birder_file, tmp_path):
    path, _ = birder_file()
    state, info = read_weights_file(path)
    large = torch.zeros(1000, *state["class_token"].shape)
    state["class_token"] = large[3]
    write_weights_file(tmp_path / "rope_vit_reg1_t16_view.pt", state, info)
    size = (tmp_path / "rope_vit_reg1_t16_view.pt").stat().st_size
    assert size < path.stat().st_size + large.nbytes / 2


def test_metadata_that_is_no_json(birder_file):
    path, _ = birder_file(suffix=".safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata() | {"signature": "{"}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata)
    with pytest.raises(InputError, match="'signature' is not JSON"):
        load_model(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", birders_weights())
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("config", [None, {"pt_grid_size": [16, 16]}])
def test_birders_file_of_every_published_network(birder_file, name, suffix, config):
    entry = published_weights()[name]
    path, net = birder_file(entry.network, size=entry.image_size, suffix=suffix, config=config)
    model, info = load_model(path)
    assert (info.network, info.image_size) == (entry.network, entry.image_size)
    net.set_dynamic_size()
    height, width = entry.image_size
    for size in ((height, width), (height - 2 * net.patch_size, width + 3 * net.patch_size)):
        x = torch.randn(1, 3, *size)
        with torch.inference_mode():
            neck = net.detection_features(x)["stage1"]
            assert relative_difference(model.detection_features(x)["neck"], neck) < 1e-5
            embedding = net.embedding(x)
            assert relative_difference(model.embedding(x), embedding) < 1e-5
            assert relative_difference(model(x), net.classify(embedding)) < 1e-5
