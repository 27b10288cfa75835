"""Conversion of weights, with birder, Detectron2 and timm as oracles."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bad_files import TRACE, hostile_files
from birder.common import fs_ops
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall, LazyConfig
from detectron2.modeling import build_backbone
from helpers import BIRDS, RGB_STATS, move_off_initial_values, relative_difference
from omegaconf import OmegaConf
from timm.layers import resample_patch_embed

from rope_vit_det import create_backbone, create_model, load_model, use_rope_vit
from rope_vit_det.errors import InputError
from rope_vit_det.models import VARIANTS
from rope_vit_det.weights import read_weights_file
from rope_vit_det.weights.convert import convert
from rope_vit_det.weights.info import parse_config

TOOL = Path(__file__).parents[2] / "tools" / "convert_weights.py"
NETWORK = "rope_vit_reg1_t16"


def _birders(path, network=NETWORK):
    """A file in birder's own hands: the network, and what birder reads beside it."""
    return fs_ops.load_model(
        torch.device("cpu"), network, path=path, inference=True, st=path.suffix == ".safetensors"
    )


def _states_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def detector(detector_cfg, birder_file, tmp_path):
    """A trained detector's checkpoint in the folder of its run; its model; what it began from."""
    path, _ = birder_file(size=(256, 256), config={"pt_grid_size": [14, 14]})
    use_rope_vit(detector_cfg, str(path))
    model = torch.nn.Module()
    model.backbone = build_backbone(detector_cfg)
    folder = tmp_path / "run"
    checkpointer = DetectionCheckpointer(model, str(folder))
    checkpointer.load(detector_cfg.MODEL.WEIGHTS)
    move_off_initial_values(model)
    folder.mkdir()
    checkpointer.save("model_final")
    (folder / "config.yaml").write_text(detector_cfg.dump())
    return folder / "model_final.pth", model, path


@pytest.mark.parametrize("config", [None, {"pt_grid_size": [16, 16]}])
@pytest.mark.parametrize(("old", "new"), [(".pt", ".safetensors"), (".safetensors", ".pt")])
def test_birders_two_formats(birder_file, tmp_path, old, new, config):
    path, net = birder_file(suffix=old, config=config)
    written = tmp_path / f"{NETWORK}_x{new}"
    convert(path, written)
    loaded, told = _birders(written)
    assert _states_equal(loaded.state_dict(), net.state_dict())
    assert told.class_to_idx == BIRDS and told.custom_config == config
    assert {key: tuple(value) for key, value in told.rgb_stats.items()} == RGB_STATS


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_to_detectron2_and_back(birder_file, detector_cfg, tmp_path, suffix):
    path, net = birder_file(suffix=suffix, config={"pt_grid_size": [16, 16]})
    convert(path, tmp_path / "backbone.pth")
    use_rope_vit(detector_cfg, str(path))
    model = torch.nn.Module()
    model.backbone = build_backbone(detector_cfg)
    DetectionCheckpointer(model.eval()).load(str(tmp_path / "backbone.pth"))
    x = torch.randn(1, 3, 224, 224)
    theirs = net.detection_features(x)["stage1"]
    assert relative_difference(model.backbone.net(x)["neck"], theirs) < 1e-5

    back = tmp_path / f"{NETWORK}_back.pt"
    convert(tmp_path / "backbone.pth", back, head_from=str(path))
    loaded, told = _birders(back)
    assert _states_equal(loaded.state_dict(), net.state_dict())
    assert told.class_to_idx == BIRDS and told.custom_config == {"pt_grid_size": [16, 16]}


@pytest.mark.parametrize("config_file", [True, False])
def test_a_detectors_backbone_with_a_head(detector, tmp_path, config_file):
    path, model, origin = detector
    if not config_file:
        path.with_name("config.yaml").unlink()
    written = tmp_path / f"{NETWORK}_detector.pt"
    (summary, note) = convert(path, written, head_from=str(origin))
    assert "256x256 px" in summary and "3 classes" in summary and str(origin) in note
    loaded, told = _birders(written)
    trained, head = model.backbone.net.state_dict(), read_weights_file(origin)[0]
    assert _states_equal(loaded.state_dict(), head | trained)
    assert told.class_to_idx == BIRDS and told.custom_config == {"pt_grid_size": [14, 14]}
    assert {key: tuple(value) for key, value in told.rgb_stats.items()} == RGB_STATS
    x = torch.randn(1, 3, 256, 256)
    neck = loaded.detection_features(x)["stage1"]
    assert relative_difference(model.eval().backbone.net(x)["neck"], neck) < 1e-5


def test_a_detectors_backbone_without_a_head(detector, tmp_path):
    path, model, _ = detector
    written = tmp_path / f"{NETWORK}_detector.safetensors"
    summary, note = convert(path, written)
    assert "no classes" in summary and "a final norm of weight 1 and bias 0, no classes" in note
    loaded, told = _birders(written)
    assert told.class_to_idx == {}
    assert told.rgb_stats["mean"] == pytest.approx(RGB_STATS["mean"])
    assert told.custom_config == {"pt_grid_size": [14, 14]}
    x = torch.randn(1, 3, 256, 256)
    neck = model.eval().backbone.net(x)["neck"]
    assert relative_difference(loaded.detection_features(x)["stage1"], neck) < 1e-5
    ours, info = load_model(written)
    assert info.num_classes == 0
    assert relative_difference(ours(x), loaded(x)) < 1e-5


def test_fresh_pooling_is_said_and_bgr_turned_round(tmp_path, monkeypatch):
    network = "rope_vit_reg8_so150m_p14_swiglu_rms_ap"
    monkeypatch.setitem(VARIANTS, network, VARIANTS[network] | {"num_layers": 1})
    model = torch.nn.Module()
    model.backbone = torch.nn.Module()
    model.backbone.net = create_backbone(network, patch_stride=14)
    (tmp_path / "config.yaml").write_text(
        f"MODEL: {{ROPE_VIT: {{NAME: {network}, IMAGE_SIZE: null, PT_GRID_SIZE: null}}, "
        "PIXEL_MEAN: [100, 110, 120], PIXEL_STD: [50, 55, 60]}\nINPUT: {FORMAT: BGR}\n"
    )
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    written = tmp_path / f"{network}_x.pt"
    note = convert(tmp_path / "model.pth", written)[1]
    assert "a final norm of weight 1 and bias 0, random attention pooling, no classes" in note
    info = read_weights_file(written)[1]
    assert info.rgb_mean == pytest.approx([120 / 255, 110 / 255, 100 / 255], abs=1e-6)
    assert info.rgb_std == pytest.approx([60 / 255, 55 / 255, 50 / 255], abs=1e-6)


def test_the_config_of_a_lazy_run(tmp_path):
    net = LazyCall(create_backbone)(name=NETWORK, image_size=[192, 160], pt_grid_size="count")
    model = LazyCall(torch.nn.Module)(
        backbone=LazyCall(torch.nn.Module)(net=net),
        pixel_mean=[10.0, 20.0, 30.0],
        pixel_std=[40.0, 50.0, 60.0],
        input_format="RGB",
    )
    LazyConfig.save(OmegaConf.create({"model": model}), str(tmp_path / "config.yaml"))
    state = create_model(NETWORK, image_size=(192, 160)).state_dict()
    state = {f"backbone.net.{key}": value for key, value in state.items() if key[:5] != "norm."}
    torch.save({"model": state}, tmp_path / "model.pth")
    convert(tmp_path / "model.pth", tmp_path / f"{NETWORK}_x.pt")
    info = read_weights_file(tmp_path / f"{NETWORK}_x.pt")[1]
    assert info.image_size == (192, 160)
    assert info.rgb_mean == pytest.approx([10 / 255, 20 / 255, 30 / 255], abs=1e-6)


@pytest.mark.parametrize(
    ("network", "size", "becomes", "config"),
    [
        ("rope_vit_reg1_t14", (224, 168), "rope_vit_reg1_t16", {}),
        ("rope_vit_s14_swiglu_avg", (224, 224), "rope_vit_s14_swiglu_avg", {"patch_size": 16}),
    ],
)
def test_patches_resampled_for_good(birder_file, tmp_path, network, size, becomes, config):
    path, net = birder_file(network, size=size, config={"num_layers": 2})
    written = tmp_path / f"{becomes}_p16.pt"
    convert(path, written, patch_size=16)
    loaded, told = _birders(written, becomes)
    assert told.custom_config == {"num_layers": 2, **config}
    assert tuple(told.signature["inputs"][0]["data_shape"][2:]) == (
        size[0] // 14 * 16,
        size[1] // 14 * 16,
    )
    theirs = resample_patch_embed(net.conv_proj.weight.detach(), [16, 16])
    assert relative_difference(loaded.conv_proj.weight, theirs) < 1e-5

    strided, _ = load_model(path, patch_stride=16)
    loaded.set_dynamic_size()
    for height, width in ((256, 192), (320, 224)):
        x = torch.randn(1, 3, height, width)
        assert relative_difference(strided(x), loaded(x)) < 1e-5
        neck = loaded.detection_features(x)["stage1"]
        assert relative_difference(strided.detection_features(x)["neck"], neck) < 1e-5


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".pth"])
def test_an_added_config(birder_file, detector_cfg, tmp_path, suffix):
    path, net = birder_file()
    written = tmp_path / f"{NETWORK}_grid{suffix}"
    convert(path, written, add_config={"pt_grid_size": [16, 16]})
    if suffix == ".pth":
        convert(str(written), written.with_suffix(".pt"), head_from=str(path))
        written = written.with_suffix(".pt")
    x = torch.randn(1, 3, 224, 224)
    theirs, told = _birders(written)
    assert told.custom_config == {"pt_grid_size": [16, 16]}
    assert relative_difference(load_model(written)[0](x), theirs(x)) < 1e-5
    assert relative_difference(theirs(x), net(x)) > 1e-4


def test_the_same_bytes_every_time(birder_file, tmp_path):
    path, _ = birder_file()
    for suffix in (".pt", ".pth"):
        one, two = tmp_path / f"{NETWORK}_1{suffix}", tmp_path / f"{NETWORK}_2{suffix}"
        convert(path, one)
        convert(path, two)
        assert one.read_bytes() == two.read_bytes()


def test_nothing_is_replaced_unless_forced(birder_file, tmp_path):
    path, net = birder_file()
    for suffix in (".pt", ".safetensors", ".pth"):
        there = tmp_path / f"{NETWORK}_there{suffix}"
        there.write_text("precious")
        with pytest.raises(InputError, match=r"is there already; .* --force"):
            convert(path, there)
        assert there.read_text() == "precious"
        convert(path, there, force=True)
        assert there.stat().st_size > 1e6
    assert not list(tmp_path.glob(".*"))
    # A file may be converted onto itself.
    convert(path, path, add_config={"pt_grid_size": [16, 16]}, force=True)
    assert _states_equal(_birders(path)[0].state_dict(), net.state_dict())


def _refused(match, *args, **kwargs):
    with pytest.raises(InputError, match=match) as error:
        convert(*args, **kwargs)
    assert "\n" not in str(error.value)


def test_what_cannot_be_is_refused(birder_file, detector, tmp_path):
    path, _ = birder_file()
    checkpoint, _, origin = detector
    out = tmp_path / "out" / f"{NETWORK}_x.pt"
    _refused("must end in .pt, .safetensors .birder's. or .pth", str(path), "x.bin")
    _refused("no such file", str(tmp_path / "nowhere.pth"), out)
    _refused("no such file", checkpoint, out, head_from="nowhere.pt")
    _refused("no weights are published as", checkpoint, out, head_from="nowhere")
    _refused("No such file", checkpoint, out, config_file="nowhere.yaml")
    nothing = tmp_path / "nothing.yaml"
    nothing.write_text("MODEL: 3")
    _refused("no config of a run with a RoPE ViT", checkpoint, out, config_file=nothing)
    _refused("--head-from is for detectors", path, out, head_from=str(path))
    _refused("let the name begin with rope_vit_reg1_t16", str(path), tmp_path / "rope_vit_s14.pt")
    _refused("config has 'qk_norm'", path, out, add_config={"qk_norm": True})
    _refused("missing encoder.block.12", path, out, add_config={"num_layers": 20})
    _refused("patch size must be 1 pixel or more", path, out, patch_size=0)
    _refused("is a rope_vit_reg1_t16, not a rope_vit_s14", checkpoint, out, network="rope_vit_s14")
    other, _ = birder_file("rope_vit_t16")
    _refused("is a rope_vit_t16, and .* a rope_vit_reg1_t16", checkpoint, out, head_from=str(other))
    alone = checkpoint.rename(tmp_path / "alone.pth")
    _refused("does not say which network", str(alone), out)
    larger = torch.load(alone)
    larger["model"]["backbone.net.class_token"][:] = float("nan")
    torch.save(larger, alone)
    _refused("tensor class_token has NaN", str(alone), out, head_from=str(origin))
    torch.save({"model": {"weight": torch.ones(2)}}, alone)
    _refused("no checkpoint of a RoPE ViT detector", str(alone), out)
    assert not out.parent.exists()


def test_hostile_files(birder_file, detector, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint, _, _ = detector
    out = tmp_path / f"{NETWORK}_out.pt"
    files = hostile_files(tmp_path)
    hostile = [p for p in files if p.suffix != ".pkl" and p.stem.startswith(("os-", "script"))]
    for path in hostile:
        _refused("is refused", path, out)
        _refused("is refused", checkpoint, out, head_from=str(path))
    checkpoint.with_name("config.yaml").write_text(
        f"MODEL: {{ROPE_VIT: {{NAME: !!python/object/apply:os.mkdir [{TRACE}]}}}}\n"
    )
    _refused("no config of a run", checkpoint, out)
    assert hostile and not (tmp_path / TRACE).exists() and not out.exists()


CONVERT = """
import sys
from rope_vit_det.weights.convert import convert
from rope_vit_det.weights.detectron2_format import detectron2_checkpoint

print(detectron2_checkpoint("birder:" + sys.argv[1]))
for output in sys.argv[2:]:
    convert(sys.argv[1], output, force=True)
"""


@pytest.mark.slow
def test_two_processes_at_once_end_with_whole_files(birder_file, tmp_path):
    path, net = birder_file()
    outputs = [tmp_path / f"{NETWORK}_out{suffix}" for suffix in (".pt", ".safetensors", ".pth")]
    command = [sys.executable, "-W", "ignore", "-c", CONVERT, path, *outputs]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    cached = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(cached) == 1
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.rglob("*.tmp"))
    for written in outputs[:2]:
        assert _states_equal(_birders(written)[0].state_dict(), net.state_dict())
    theirs = {f"backbone.net.{key}": value for key, value in net.state_dict().items()}
    for written in (outputs[2], cached.pop()):
        loaded = torch.load(written, weights_only=True)["model"]
        assert len(loaded) == 149 and all(torch.equal(loaded[key], theirs[key]) for key in loaded)


def test_the_command_line(birder_file, tmp_path, monkeypatch, capsys):
    path, net = birder_file()
    written = tmp_path / f"{NETWORK}_x.safetensors"
    config = ["--add-config", '{"pt_grid_size": [16, 16]}']
    monkeypatch.setattr("sys.argv", [str(TOOL), str(path), str(written), *config])
    runpy.run_path(str(TOOL), run_name="__main__")
    summary = capsys.readouterr().out
    assert summary.startswith(f"wrote {written}: {NETWORK}, 224x224 px, config")
    assert _states_equal(_birders(written)[0].state_dict(), net.state_dict())
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(TOOL), run_name="__main__")
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"error: {written} is there already")


@pytest.mark.parametrize("text", ["{", "[1]", "16"])
def test_a_config_that_is_no_json_object(text):
    with pytest.raises(InputError, match=r"--add-config .* is not (JSON|a JSON object)"):
        parse_config(text, "--add-config")
