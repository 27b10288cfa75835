"""Faulty weights and checkpoints."""

import copy
import os
import pickle
from functools import cache
from pathlib import Path

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn

from rope_vit_det import add_rope_vit_config
from rope_vit_det.config.run_config import merge_from_yaml

from .case import HANDLED, OWN, REFUSED, Case, World
from .configs import TRACE

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
QKV = "backbone.net.encoder.block.2.attn.qkv.weight"
SCORES = "roi_heads.box_predictor.cls_score.weight"


@cache
def _detector() -> dict[str, torch.Tensor]:
    """Random weights of the detector that the runs of the corpus have."""
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    merge_from_yaml(cfg, str(DEMO))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    return build_model(cfg).state_dict()


class _Runs:
    def __reduce__(self) -> tuple:
        return os.mkdir, (TRACE,)


def _use(name: str, write, *, flags: tuple[str, ...] = (), opts: tuple[str, ...] = ()):
    def spoil(world: World) -> None:
        write(world.folder / name)
        world.opts += ["MODEL.WEIGHTS", name, *opts]
        world.flags += flags

    return spoil


def _torch(content):
    return lambda path: torch.save(content() if callable(content) else content, path)


def _bytes(content: bytes):
    return lambda path: path.write_bytes(content)


def _changed(change):
    """The good weights, changed."""

    def write(path: Path) -> None:
        state = copy.deepcopy(dict(_detector()))
        change(state)
        torch.save({"model": state}, path)

    return write


def _cut(path: Path) -> None:
    torch.save({"model": _detector()}, path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _resume(tag: str, write=None):
    def spoil(world: World) -> None:
        (world.folder / "out").mkdir()
        (world.folder / "out" / "last_checkpoint").write_text(tag)
        if write:
            write(world.folder / "out" / tag)
        world.flags.append("--resume")

    return spoil


def _case(name: str, how: str, spoil, *says: str) -> Case:
    return Case(name, how, spoil, REFUSED, says, (OWN,))


def _file(name: str, how: str, file: str, write, *says: str, **options) -> Case:
    return _case(name, how, _use(file, write, **options), "MODEL.WEIGHTS", file, *says)


def _address(name: str, address: str, *says: str) -> Case:
    spoil = _use(address, lambda path: None)
    return _case(name, f"MODEL.WEIGHTS {address}", spoil, address, *says)


def _drop(*keys: str):
    return _changed(lambda state: [state.pop(key) for key in keys])


CASES = [
    _file("missing weights", "a path that does not exist", "no.pth", lambda path: None,
          "no such file"),
    _file("weights in a folder", "a folder", "folder.pth", Path.mkdir, "a folder, not a file"),
    _file("empty weights", "a file of no bytes", "w.pth", _bytes(b""), "is empty"),
    _file("truncated weights", "cut in the middle", "w.pth", _cut, "is damaged"),
    _file("a pointer of Git LFS", "a text of three lines", "w.pth",
          _bytes(b"version https://git-lfs.github.com/spec/v1\n"), "is damaged"),
    _file("noise as weights", "5,000 random bytes", "w.pth",
          _bytes(np.random.default_rng(0).bytes(5000)), "is damaged"),
    _file("a list as a checkpoint", "torch.save of a list", "w.pth", _torch([1, 2]),
          "no checkpoint"),
    _file("texts as tensors", "a checkpoint whose tensor is a text", "w.pth",
          _torch({"model": {"weight": "text"}}), "not a tensor"),
    _file("weights that execute", "torch.save of a call of os.mkdir", "w.pth",
          _torch({"model": {"a": _Runs()}}), "is refused", "posix.mkdir"),
    _file("pickle that executes", "a .pkl with a call of os.mkdir", "w.pkl",
          _bytes(pickle.dumps({"model": {"a": _Runs()}, "__author__": "x"})), "is refused",
          "posix.mkdir"),
    _file("a module as weights", "torch.save of a whole module", "w.pth",
          lambda path: torch.save({"model": nn.Linear(2, 2)}, path), "is refused", "Linear"),
    _file("weights with NaN", "one NaN in the backbone", "w.pth",
          _changed(lambda state: state[QKV].view(-1)[5].fill_(float("nan"))), QKV, "NaN"),
    _file("another network", "the demo's weights under MODEL.ROPE_VIT.NAME rope_vit_s16", "w.pth",
          _changed(lambda state: None), "backbone.net.", "MODEL.ROPE_VIT.NAME",
          opts=("MODEL.ROPE_VIT.NAME", "rope_vit_s16")),
    _file("a hole in the backbone", "one of its tensors is missing", "w.pth", _drop(QKV), QKV),
    _file("a ResNet", "Caffe2's blobs of an R-50", "R-50.pkl",
          _bytes(pickle.dumps({"conv1_w": np.zeros((64, 3, 7, 7), np.float32)})), "none of the"),
    _address("the zoo's ResNet", "detectron2://ImageNetPretrained/MSRA/R-50.pkl", "no RoPE ViT"),
    _address("a web server that is not there", "http://127.0.0.1:9/w.pth", "cannot be downloaded"),
    _address("an unknown kind of address", "foo://w.pth", "nothing that reads foo://"),
    _address("unknown published weights", "birder://rope_vit_reg4_b41", "no weights are published"),
    _file("a damaged safetensors file", "a header of 2^60 bytes", "rope_vit_t16_x.safetensors",
          _bytes((2**60).to_bytes(8, "little") + b"{}" * 50), "is damaged"),
    _file("evaluation without a head", "--eval-only with the backbone's weights alone", "w.pth",
          _changed(lambda state: [state.pop(k) for k in list(state) if k.startswith("roi_")]),
          "lacks", "roi_heads.", flags=("--eval-only",)),
    _file("evaluation of another head", "--eval-only with scores of another shape", "w.pth",
          _changed(lambda state: state.update({SCORES: torch.zeros(9, 9)})), SCORES,
          "has shape (9, 9)", flags=("--eval-only",)),
    _case("resuming from nothing", "--resume with an empty last_checkpoint", _resume(""),
          "no checkpoint to resume from"),
    _case("resuming from what is gone", "--resume, and last_checkpoint names a missing file",
          _resume("model_0000009.pth"), "no checkpoint to resume from", "model_0000009.pth"),
    _case("resuming from damage", "--resume, and the only checkpoint is cut in the middle",
          _resume("model_0000009.pth", _cut), "no checkpoint to resume from", "damaged"),
    _case("resuming without a head", "--resume, and a tensor of the head is missing",
          _resume("model_0000009.pth", _drop(SCORES)), "lacks", SCORES),
    Case("the backbone's weights alone", "a training that starts from a backbone",
         _use("w.pth", _changed(lambda state: [
             state.pop(k) for k in list(state) if k.startswith("roi_")])), HANDLED, (), (OWN,)),
    Case("the head of another number of classes", "a training that starts from another dataset's",
         _use("w.pth", _changed(lambda state: state.update({SCORES: torch.zeros(9, 9)}))), HANDLED,
         ("incompatible", SCORES), (OWN,)),
]  # fmt: skip
