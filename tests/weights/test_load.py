"""Weights in shards, in another dtype, and how much memory that takes."""

import os
import subprocess
import sys

import pytest
import torch
from detectron2.modeling import build_model
from helpers import move_off_initial_values, relative_difference
from safetensors.torch import load_file, save_file

from rope_vit_det import create_model, load_model
from rope_vit_det.backbone import create_backbone
from rope_vit_det.checkpoint.checkpointer import DetectorCheckpointer
from rope_vit_det.errors import InputError
from rope_vit_det.models import VARIANTS
from rope_vit_det.weights import detectron2_format, write_weights_file
from rope_vit_det.weights.info import WeightsInfo

SEVEN_B = "vit_7b_patch16_dinov3"


def write_shards(folder, *, depth, width, shard):
    """The network in Hugging Face's layout and files, by its own class; the path of the index."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DINOv3ViTConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=width // 32,
        num_register_tokens=4,
        use_gated_mlp=True,
        hidden_act="silu",
        query_bias=False,
        value_bias=False,
    )
    model = transformers.DINOv3ViTModel(config)
    model.save_pretrained(folder, max_shard_size=shard)
    return model, folder / "model.safetensors.index.json"


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """A network of 64 channels in shards: transformers' model, and the address of the index."""
    sizes = dict(num_layers=2, hidden_dim=64, num_heads=2, mlp_dim=128)
    monkeypatch.setitem(VARIANTS, SEVEN_B, VARIANTS[SEVEN_B] | sizes)
    oracle, index = write_shards(tmp_path, depth=2, width=64, shard="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    return oracle.eval(), f"timm:{index}"


@pytest.fixture
def frozen_cfg(detector_cfg):
    detector_cfg.MODEL.ROPE_VIT.NAME = SEVEN_B
    detector_cfg.MODEL.ROPE_VIT.FREEZE_BLOCKS = -1
    detector_cfg.MODEL.ROPE_VIT.DTYPE = "bfloat16"
    detector_cfg.MODEL.FPN.OUT_CHANNELS = 32
    return detector_cfg


def test_shards_are_one_network(shards):
    oracle, url = shards
    model, info = load_model(url)
    assert info.network == SEVEN_B
    x = torch.randn(2, 3, 96, 160)
    with torch.inference_mode():
        pooled = model.embedding(x, pooling="class_token")
        assert relative_difference(pooled, oracle(x).pooler_output) < 1e-5


def test_a_network_in_bf16_is_the_other_one_rounded(shards, tmp_path):
    model, _ = load_model(shards[1], dtype=torch.bfloat16)
    rounded = load_model(shards[1])[0].bfloat16().state_dict()
    assert all(torch.equal(t, rounded[key]) for key, t in model.state_dict().items())
    own = create_model("rope_vit_t14")
    info = WeightsInfo("rope_vit_t14", None, 0, {}, (224, 224), (0.5,) * 3, (0.5,) * 3)
    for suffix in ("pt", "safetensors"):
        path = tmp_path / f"rope_vit_t14_mine.{suffix}"
        write_weights_file(path, own.state_dict(), info)
        birders, _ = load_model(path, dtype=torch.bfloat16)
        assert {p.dtype for p in birders.parameters()} == {torch.bfloat16}


def test_a_loaded_network_does_not_change_with_its_file(shards, tmp_path):
    model, _ = load_model(shards[1])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for path in tmp_path.glob("*.safetensors"):
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda index: index.write_text("[]"), "index.json is damaged"),
        (lambda index: index.write_text('{"weight_map": {"a": "../a"}}'), "index.json is damaged"),
        (lambda index: next(index.parent.glob("*.safetensors")).unlink(), "no such file"),
        (lambda index: next(index.parent.glob("*.safetensors")).write_text("x"), "is damaged"),
    ],
)
def test_damaged_shards_are_named(shards, tmp_path, spoil, message):
    spoil(tmp_path / "model.safetensors.index.json")
    with pytest.raises(InputError, match=message):
        load_model(shards[1])


def test_a_shard_with_nans_is_refused(shards, tmp_path):
    path = next(p for p in tmp_path.glob("*.safetensors") if "layer.1.norm1.bias" in load_file(p))
    save_file(load_file(path) | {"layer.1.norm1.bias": torch.full((64,), torch.nan)}, path)
    with pytest.raises(InputError, match=r"tensor layer\.1\.norm1\.bias has NaN"):
        load_model(shards[1])


def test_a_frozen_network_in_bf16_under_a_detector(frozen_cfg, shards, cache, tmp_path):
    model = build_model(frozen_cfg).eval()
    net = model.backbone.net
    assert not any(parameter.any() for parameter in net.parameters())
    DetectorCheckpointer(model, str(tmp_path)).load(shards[1])
    loaded, _ = load_model(shards[1])
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        neck, exact = net(images)["neck"], loaded.detection_features(images)["neck"]
    assert neck.dtype == torch.float32
    assert relative_difference(neck, exact) < 3e-2
    for precision in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            features = model.backbone(images)
        sum(y.float().sum() for y in features.values()).backward()
    for name, parameter in model.backbone.named_parameters():
        frozen = name.startswith("net.")
        assert parameter.dtype == (torch.bfloat16 if frozen else torch.float32)
        assert (parameter.grad is None) == frozen, name

    # Its own checkpoint, whole, into a fresh detector and into one in float32.
    DetectorCheckpointer(model, str(tmp_path)).save("model")
    for dtype in ("bfloat16", "float32"):
        frozen_cfg.MODEL.ROPE_VIT.DTYPE = dtype
        again = build_model(frozen_cfg)
        DetectorCheckpointer(again, whole=True).load(str(tmp_path / "model.pth"))
        state = again.state_dict()
        assert all(torch.equal(state[key].to(t), t) for key, t in model.state_dict().items())
        assert state["backbone.net.class_token"].dtype == getattr(torch, dtype)


def test_tensors_of_another_shape_are_an_error_in_bf16_too():
    net = create_backbone("rope_vit_t14", freeze_blocks=-1, dtype="bfloat16", image_size=280)
    other = create_backbone("rope_vit_t14")
    with pytest.raises(RuntimeError, match="size mismatch for pos_embedding"):
        net.load_state_dict(other.state_dict())


def test_a_kernel_at_another_stride_is_resampled_in_bf16():
    plain = move_off_initial_values(create_backbone("rope_vit_t14"))
    net = create_backbone("rope_vit_t14", freeze_blocks=-1, dtype="bfloat16")
    net.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        assert relative_difference(net(x)["neck"], plain(x)["neck"]) < 3e-2


def test_a_shard_that_is_replaced_is_converted_anew(shards, cache, tmp_path):
    first = detectron2_format.detectron2_checkpoint(shards[1])
    assert detectron2_format.detectron2_checkpoint(shards[1]) == first
    assert detectron2_format.detectron2_checkpoint(shards[1], torch.bfloat16) != first
    shard = next(tmp_path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes())
    assert detectron2_format.detectron2_checkpoint(shards[1]) != first


# The tensors of the real network are larger than what glibc ever keeps for later.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
# In a fresh process: what loading takes beyond the interpreter, and a small load before.
LOAD = """
import sys
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from rope_vit_det import add_rope_vit_config, load_model
from rope_vit_det.checkpoint.checkpointer import DetectorCheckpointer
from rope_vit_det.models import VARIANTS
from rope_vit_det.utils.memory import process_peak_mib

NAME = "vit_7b_patch16_dinov3"

def load(url, depth, width, how):
    sizes = dict(num_layers=depth, hidden_dim=width, num_heads=width // 32, mlp_dim=2 * width)
    VARIANTS[NAME] |= sizes
    if how == "load_model":
        return load_model(url, dtype=torch.bfloat16)[0]
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_rope_vit_backbone"
    cfg.MODEL.ROPE_VIT.NAME, cfg.MODEL.ROPE_VIT.DTYPE = NAME, "bfloat16"
    cfg.MODEL.ROPE_VIT.FREEZE_BLOCKS = -1
    model = torch.nn.Module()
    model.backbone = build_backbone(cfg)
    DetectorCheckpointer(model).load(url)
    return model

small, large, depth, width, how = sys.argv[1:]
load(small, 1, 64, how)
before = process_peak_mib()
net = load(large, int(depth), int(width), how)
peak = process_peak_mib() - before
print(peak / (sum(p.nbytes for p in net.parameters()) / 2**20))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["load_model", "detector"])
def test_loading_shards_in_bf16_takes_the_memory_of_the_weights(how, tmp_path):
    """At most 1.1 times as much, of a network of 7B's depth that is an eighth as wide."""
    depth, width = 40, 512
    _, small = write_shards(tmp_path / "small", depth=1, width=64, shard="50KB")
    _, large = write_shards(tmp_path / "large", depth=depth, width=width, shard="50MB")
    arguments = [f"timm:{small}", f"timm:{large}", str(depth), str(width), how]
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | ONE_THREAD | {"HF_HOME": str(tmp_path / "home")},
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert 0.9 < float(answer.stdout.split()[-1]) <= 1.1
