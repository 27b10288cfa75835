"""Checkpoints of adapters and heads alone, against the whole ones that they were made of."""

import copy
import shutil

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_backbone
from torch import nn

from rope_vit_det import use_rope_vit
from rope_vit_det.checkpoint.checkpointer import DetectorCheckpointer
from rope_vit_det.errors import InputError
from rope_vit_det.weights.convert import convert
from rope_vit_det.weights.detector import read_detector
from rope_vit_det.weights.hub import cache_folder

NETWORK = "rope_vit_reg1_t16"
CLASSES = {"names": ["bird"], "ids": [1]}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def train(detector_cfg, tmp_path, monkeypatch):
    """Has LoRA train from some weights; gives the model, and where its checkpoint is."""
    monkeypatch.chdir(tmp_path)

    def train(weights, *, rank=2):
        use_rope_vit(detector_cfg, weights)
        detector_cfg.MODEL.ROPE_VIT.NAME = NETWORK
        detector_cfg.MODEL.ROPE_VIT.LORA.RANK = rank
        model = nn.Module()
        model.backbone = build_backbone(detector_cfg)
        model.head = nn.Linear(3, 3)
        DetectorCheckpointer(model).load(detector_cfg.MODEL.WEIGHTS)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.02)
        saver = DetectorCheckpointer(model, str(tmp_path / "run"), classes=CLASSES)
        (tmp_path / "run").mkdir(exist_ok=True)
        saver.save("model_final")
        (tmp_path / "run" / "config.yaml").write_text(detector_cfg.dump())
        return model, tmp_path / "run" / "model_final.pth"

    return train


def copy_with_noise(model):
    other = copy.deepcopy(model)
    for key, value in other.state_dict().items():
        if not key.endswith("lora_scale"):  # the config's, not learned
            value.add_(1)
    return other


def test_with_its_base_it_is_the_whole_detector(birder_file, train, tmp_path):
    base = birder_file()[0]
    convert(base, tmp_path / f"{NETWORK}.safetensors")
    convert(base, tmp_path / "backbone.pth")
    model, path = train(str(base))
    whole = model.state_dict()
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    for name in (str(base), f"birder:{NETWORK}.safetensors", "backbone.pth"):
        (line,) = convert(path, tmp_path / "adapters.pth", base=name, force=True)
        alone = torch.load(tmp_path / "adapters.pth", weights_only=True)
        kept = alone["model"].keys()
        assert learned <= kept <= {key for key in whole if "net" not in key or "lora" in key}
        assert f"{len(kept)} tensors of adapters and heads" in line and f"of {name} (" in line
        assert alone["classes"] == CLASSES and alone.keys() == {"model", "classes"}
        other = copy_with_noise(model)
        DetectorCheckpointer(other, whole=True).load("adapters.pth")
        assert equal(other.state_dict(), whole)

    # In any script.
    for load in (
        lambda model: DetectionCheckpointer(model).load("adapters.pth"),
        lambda model: model.load_state_dict(alone["model"]),
    ):
        other = copy_with_noise(model)
        load(other)
        assert equal(other.state_dict(), whole)

    ours = read_detector(tmp_path / "adapters.pth", config_file=path.with_name("config.yaml"))
    assert equal(ours[0], read_detector(path)[0])


def test_published_weights_are_named_by_their_name(published, train, cache, tmp_path):
    entry, content = published
    (cache_folder("weights") / entry.file_name).write_bytes(content)
    model, path = train(entry.name)
    (line,) = convert(path, tmp_path / "adapters.pth", base=entry.name)
    assert line.endswith(f"are those of birder://{entry.name} (sha256 {entry.sha256})")
    other = copy_with_noise(model)
    DetectorCheckpointer(other, whole=True).load("adapters.pth")
    assert equal(other.state_dict(), model.state_dict())


def test_adapters_over_adapters(birder_file, train, tmp_path):
    base = str(birder_file()[0])
    _, path = train(base)
    convert(path, tmp_path / "first.pth", base=base)
    model, path = train("first.pth")
    convert(path, tmp_path / "second.pth", base="first.pth")
    other = copy_with_noise(model)
    DetectorCheckpointer(other, whole=True).load("second.pth")
    assert equal(other.state_dict(), model.state_dict())


def test_another_base_is_refused_and_a_moved_one_found(birder_file, train, tmp_path, monkeypatch):
    base = birder_file()[0]
    model, path = train(str(base))
    adapters = tmp_path / "adapters.pth"
    convert(path, adapters, base=str(base))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(base, elsewhere)
    load = DetectorCheckpointer(copy_with_noise(model), whole=True).load
    with pytest.raises(
        InputError, match=rf"^MODEL\.WEIGHTS {adapters}: {base}, to which .* no such file; put it"
    ):
        load(str(adapters))
    monkeypatch.chdir(elsewhere)
    load(str(adapters))

    birder_file(tag="others")[0].rename(base)
    with pytest.raises(InputError, match=rf"belong to {base} with sha256 \w+, and {base} has \w"):
        load(str(adapters))
    with pytest.raises(InputError, match="sha256"):
        read_detector(adapters, config_file=path.with_name("config.yaml"))


def test_what_it_cannot_be_written_of(birder_file, train, tmp_path):
    base = str(birder_file()[0])
    birder_file(tag="others")[0].rename(tmp_path / "other.pt")
    shutil.copy(train(base, rank=0)[1], tmp_path / "plain.pth")
    _, path = train(base)
    for source, output, options, message in (
        (
            "plain.pth",
            "a.pth",
            {},
            r"plain\.pth has no adapters: MODEL\.ROPE_VIT\.LORA\.RANK was 0",
        ),
        (path, "a.pth", {"base": "other.pt"}, r"not trained from other\.pt: backbone\.net\.\S+ is"),
        (
            path,
            "a.pth",
            {"base": "none.pth"},
            r"none\.pth, to which these adapters belong: no such",
        ),
        (path, "a.pth", {"network": NETWORK}, "no other option"),
        (path, "a.pt", {}, r"from \.pth to \.pth"),
    ):
        with pytest.raises(InputError, match=message):
            convert(source, output, **{"base": base} | options)
        assert not (tmp_path / output).exists()
