"""Configs that would run code, and the one of Detectron2's own that may."""

import os
import runpy
import sys
from pathlib import Path

import pytest
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg

from rope_vit_det import add_rope_vit_config
from rope_vit_det.config import run_config
from rope_vit_det.config.run_config import merge_from_yaml
from rope_vit_det.errors import InputError

RETINANET = model_zoo.get_config_file("Base-RetinaNet.yaml")


@pytest.fixture
def cfg() -> CfgNode:
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    return cfg


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """The file that every malicious config below would create, and the folder it lies in."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists(), "the config was executed"


CALL = "!!python/object/apply:os.mkdir [ran]"
# The line that must be named comes first.
MALICIOUS = {
    "apply": (2, f"VERSION: 2\nSEED: {CALL}\n"),
    "apply, in full": (1, "SEED: !<tag:yaml.org,2002:python/object/apply:os.mkdir> [ran]\n"),
    "apply, escaped": (1, "SEED: !!python%2Fobject%2Fapply:os.mkdir [ran]\n"),
    "tag directive": (
        3,
        "%TAG ! tag:yaml.org,2002:python/\n---\nSEED: !object/apply:os.mkdir [ran]\n",
    ),
    "renamed !!": (
        4,
        "%TAG !! tag:yaml.org,2002:python/object/\n---\nVERSION: 2\nSEED: !!apply:os.mkdir [ran]\n",
    ),
    "new": (1, "SEED: !!python/object/new:os.mkdir [ran]\n"),
    "eval": (1, "SEED: !!python/object/apply:eval [\"__import__('os').mkdir('ran')\"]\n"),
    "name": (1, "OUTPUT_DIR: !!python/name:os.mkdir\n"),
    "module": (1, "OUTPUT_DIR: !!python/module:antigravity\n"),
    "tuple": (2, "INPUT:\n  MIN_SIZE_TRAIN: !!python/tuple [800]\n"),
    "as a key": (1, f"? {CALL}\n: 1\n"),
    "deep in a list": (3, f"INPUT:\n  MIN_SIZE_TRAIN:\n  - [1, {{a: {CALL}}}]\n"),
    "behind an anchor": (1, f"SEED: &x {CALL}\nVERSION: *x\n"),
    "behind a merge key": (1, f"<<: {{SEED: {CALL}}}\n"),
    "in a node that holds itself": (2, f"INPUT: &x\n  FORMAT: {CALL}\n  CROP: *x\n"),
    "as a base": (1, f"_BASE_: {CALL}\n"),
    "a tag of nobody": (1, "SEED: !seed 1\n"),
    "the whole document": (1, "!!python/object/apply:builtins.dict\nSEED: 1\n"),
    "over two lines": (2, "SEED:\n  !!python/object/apply:os.mkdir\n  - ran\n"),
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_a_tag_is_refused_by_file_and_line(cfg, planted, name):
    line, text = MALICIOUS[name]
    path = planted.with_name("evil.yaml")
    path.write_text(text)
    before = cfg.clone()
    with pytest.raises(InputError, match=f"^{path}:{line}: the tag .* is refused"):
        merge_from_yaml(cfg, str(path))
    assert cfg == before


@pytest.mark.parametrize(
    "base",
    [
        "other/evil.yaml",
        "{folder}/other/evil.yaml",
        "~/other/evil.yaml",
        "[fine.yaml, other/evil.yaml]",
    ],
)
def test_a_tag_in_a_base_is_refused_by_the_name_of_the_base(cfg, planted, monkeypatch, base):
    folder = planted.parent
    monkeypatch.setenv("HOME", str(folder))
    (folder / "other").mkdir()
    (folder / "other" / "evil.yaml").write_text(f"SEED: {CALL}\n")
    (folder / "fine.yaml").write_text("SEED: 3\n")
    (folder / "middle.yaml").write_text(f"_BASE_: {base.format(folder=folder)}\n")
    (folder / "top.yaml").write_text("_BASE_: middle.yaml\n")
    with pytest.raises(InputError, match=r"other/evil\.yaml:1: the tag .* is refused"):
        merge_from_yaml(cfg, str(folder / "top.yaml"))


def test_detectron2s_retinanet_loads_as_detectron2_loads_it(cfg, tmp_path):
    expected = cfg.clone()
    expected.merge_from_file(RETINANET)
    ours = tmp_path / "ours.yaml"
    ours.write_text(f"_BASE_: {RETINANET}\n")
    linked = tmp_path / "linked.yaml"
    linked.symlink_to(RETINANET)
    for path in (RETINANET, str(ours), str(linked)):
        merged = cfg.clone()
        merge_from_yaml(merged, path)
        assert merged == expected
        assert merged.MODEL.ANCHOR_GENERATOR.SIZES != cfg.MODEL.ANCHOR_GENERATOR.SIZES
        # Afterwards the config is a plain one again: Detectron2's own behaviour is untouched.
        assert merged.load_yaml_with_base == CfgNode.load_yaml_with_base


def test_every_config_of_the_model_zoo_loads_as_detectron2_loads_it(cfg):
    paths = sorted(Path(RETINANET).parent.glob("COCO-*/*.yaml"))
    assert len(paths) > 20
    for path in paths:
        expected, merged = cfg.clone(), cfg.clone()
        expected.merge_from_file(str(path))
        merge_from_yaml(merged, str(path))
        assert merged == expected, path


def test_a_copy_of_detectron2s_retinanet_is_refused(cfg, tmp_path):
    copy = tmp_path / "detectron2" / "Base-RetinaNet.yaml"
    copy.parent.mkdir()
    copy.write_text(Path(RETINANET).read_text())
    with pytest.raises(InputError, match=f"^{copy}:8: the tag '!!python/object/apply:eval'"):
        merge_from_yaml(cfg, str(copy))


def test_a_link_out_of_detectron2_is_refused(cfg, planted, monkeypatch):
    package = planted.with_name("detectron2")
    (package / "model_zoo" / "configs").mkdir(parents=True)
    evil = planted.with_name("evil.yaml")
    evil.write_text(f"SEED: {CALL}\n")
    link = package / "model_zoo" / "configs" / "link.yaml"
    link.symlink_to(evil)
    folders = tuple(f"{folder}{os.sep}" for folder in (package, package / "model_zoo" / "configs"))
    monkeypatch.setattr(run_config, "_detectron2_folders", lambda: folders)
    with pytest.raises(InputError, match=r"link\.yaml:1: the tag"):
        merge_from_yaml(cfg, str(link))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a config"),
        ("[1, 2]\n", "is not a config"),
        ("SEED: 1\nMODEL: [\n", r"bad\.yaml:3 is not yaml: expected the node content"),
        ("SEED: 1\n---\nSEED: 2\n", r"bad\.yaml:2 is not yaml"),
        ("SEED: \x00\n", "is not yaml: unacceptable character"),
        ("_BASE_: {a: 1}\n", r"bad\.yaml is not a config: .* in _BASE_ a path"),
        ("_BASE_: nowhere.yaml\n", r"nowhere\.yaml: No such file"),
        ("_BASE_: bad.yaml\n", "_BASE_ leads back to itself"),
        ("? [1]\n: 2\n", "unhashable key"),
        ("SEED: " + "[" * 3000 + "\n", "nests too deeply"),
    ],
)
def test_what_is_no_config_is_one_line(cfg, tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as refusal:
        merge_from_yaml(cfg, str(path))
    assert "\n" not in str(refusal.value)


def test_the_command_line_refuses_it_too(planted, capsys, monkeypatch):
    path = planted.with_name("evil.yaml")
    path.write_text(f"SEED: {CALL}\n")
    tool = Path(__file__).parents[2] / "tools" / "train_net.py"
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--config-file", str(path)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(tool), run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {path}:1: the tag")


def test_values_of_the_command_line_are_not_evaluated(planted, cfg):
    cfg.merge_from_list(["OUTPUT_DIR", "__import__('os').mkdir('ran')"])
    assert cfg.OUTPUT_DIR == "__import__('os').mkdir('ran')"
