"""Files that would run code, damaged files, files of something else: one clear line each."""

import os
import pickle

import numpy as np
import pytest
import torch
from bad_files import TRACE, broken_files, hostile_files
from safetensors.torch import save_file
from torch import nn

from rope_vit_det import load_model
from rope_vit_det.checkpoint.checkpointer import DetectorCheckpointer
from rope_vit_det.errors import InputError
from rope_vit_det.weights import read_weights_file
from rope_vit_det.weights.safe import load_pickle, load_torch_file


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The working directory, where hostile files would leave their trace."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def _read(path):
    """By the reader of its kind: a model's for `.pt` and `.safetensors`, else a detector's."""
    if path.suffix in (".pt", ".safetensors"):
        return load_model(path, network="rope_vit_reg1_t16")
    return DetectorCheckpointer(nn.Linear(2, 2)).load(str(path))


def _line(path) -> str:
    with pytest.raises(InputError) as error:
        _read(path)
    line = str(error.value)
    assert "\n" not in line and str(path) in line, line
    return line


def test_files_that_would_run_code_are_refused_by_name(work, tmp_path):
    files = hostile_files(tmp_path)
    assert len(files) > 100
    for path, told in files.items():
        line = _line(path)
        assert "is refused" in line and told in line, (path.name, line)
        # The reader of detector checkpoints takes any of them, whatever it is called.
        with pytest.raises(InputError, match="is refused"):
            DetectorCheckpointer(nn.Linear(2, 2)).load(str(path))
    assert not os.path.exists(TRACE)


def test_the_hostile_files_are_hostile(work, tmp_path):
    """Else the test before proves nothing."""
    path = next(p for p in hostile_files(tmp_path) if p.name == "os-value-4.pkl")
    pickle.loads(path.read_bytes())
    assert os.path.exists(TRACE)


def test_torchs_switch_for_unsafe_loading_changes_nothing(work, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for path in hostile_files(tmp_path):
        if path.suffix in (".pth", ".pt") and path.name.startswith("os-"):
            assert "is refused" in _line(path)
    assert not os.path.exists(TRACE)


def test_damaged_files(birder_file, work, tmp_path):
    whole = {suffix: birder_file(suffix=suffix)[0] for suffix in (".pt", ".safetensors")}
    whole[".pth"] = tmp_path / "detector.pth"
    torch.save({"model": nn.Linear(2, 2).state_dict()}, whole[".pth"])
    whole[".pkl"] = tmp_path / "detector.pkl"
    whole[".pkl"].write_bytes(pickle.dumps({"weight": np.ones((2, 2)), "bias": np.ones(2)}))
    for path in whole.values():
        _read(path)
    for path, told in broken_files(work, whole).items():
        assert told in _line(path), path.name


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: [1, 2], "no 'state'"),
        (lambda c: c["state"], "no 'state'"),
        (lambda c: {"model": c["state"]}, "no 'state'; it looks like a Detectron2 checkpoint"),
        (lambda c: c | {"state": {}}, "it holds no dict of tensors"),
        (lambda c: c | {"state": {"class_token": 1}}, "its 'class_token' is a int, not a tensor"),
        (lambda c: {k: v for k, v in c.items() if k != "signature"}, "no 'signature'"),
        (lambda c: {k: v for k, v in c.items() if k != "rgb_stats"}, "no 'rgb_stats'"),
        (lambda c: c | {"rgb_stats": {}}, "not what birder writes"),
        (lambda c: c | {"signature": {"inputs": []}}, "not what birder writes"),
        (lambda c: c | {"class_to_idx": [1]}, "not what birder writes"),
        (lambda c: c | {"task": "object_detection"}, "a network for object_detection"),
        (lambda c: _with_input(c, [0, 1, 9, 9]), "images of 1 channels"),
        (lambda c: _with_input(c, [0, 3, 9, 9]), "multiples of the patch size 16"),
    ],
)
def test_files_of_something_else(birder_file, change, told):
    path, _ = birder_file()
    torch.save(change(torch.load(path, weights_only=True)), path)
    assert told in _line(path)


def _with_input(content, shape):
    return content | {"signature": content["signature"] | {"inputs": [{"data_shape": shape}]}}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(birder_file, tmp_path, value):
    path, _ = birder_file()
    content = torch.load(path, weights_only=True)
    content["state"]["encoder.block.7.attn.proj.weight"][3, 4] = value
    torch.save(content, path)
    assert "tensor encoder.block.7.attn.proj.weight has NaN or infinite" in _line(path)


def test_a_safetensors_file_of_another_project(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    assert "no weights file of birder's: it has no 'signature'" in _line(path)


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([1, 2], "no checkpoint: it holds a list"),
        ({"model": [1]}, "no checkpoint: it holds no dict of tensors"),
        ({"model": {"weight": "text"}}, "its 'weight' is a str, not a tensor"),
        ({"weight": np.array([np.nan])}, "tensor weight has NaN values"),
    ],
)
def test_detector_checkpoints_of_something_else(tmp_path, suffix, content, told):
    path = tmp_path / f"detector{suffix}"
    if suffix == ".pkl":
        if isinstance(content, dict) and "model" in content:
            content = content | {"__author__": "somebody"}
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    assert told in _line(path)


def test_what_detectron2_saves_beside_the_weights_still_loads(tmp_path):
    """Numpy's scalars and arrays, in the protocols that are about."""
    content = {
        "model": {"weight": np.arange(4.0).reshape(2, 2), "bias": torch.ones(2)},
        "iteration": np.int64(7),
        "best": np.float32(0.5),
        "lr": [np.float64(1e-4)],
        "flags": np.array([True, False]),
        "half": np.ones(3, np.float16),
        "text": np.array(["a", "bc"]),
    }
    torch.save(content, tmp_path / "x.pth")
    assert load_torch_file(tmp_path / "x.pth")["iteration"] == 7
    checkpointer = DetectorCheckpointer(linear := nn.Linear(2, 2))
    rest = checkpointer.load(str(tmp_path / "x.pth"))
    assert rest["best"] == 0.5 and linear.weight[1, 1] == 3
    del content["model"]["bias"]
    for protocol in range(6):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol))
        read = load_pickle(tmp_path / "x.pkl")
        assert read["iteration"] == 7 and np.array_equal(read["model"]["weight"], [[0, 1], [2, 3]])
        assert read["text"].tolist() == ["a", "bc"]


def test_a_pickle_of_python_2_is_read(tmp_path):
    # {"w": numpy.array([1., 2.], dtype=float32)}, as Caffe2's zoo wrote it
    text = (
        b"\x80\x02}q\x00U\x01wq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03"
        b"K\x00\x85q\x04U\x01bq\x05\x87q\x06Rq\x07(K\x01K\x02\x85q\x08cnumpy\ndtype\nq\tU\x02f4q\n"
        b"K\x00K\x01\x87q\x0bRq\x0c(K\x03U\x01<q\rNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0e"
        b"b\x89U\x08\x00\x00\x80?\x00\x00\x00@q\x0ftq\x10bs."
    )
    (tmp_path / "old.pkl").write_bytes(text)
    assert load_pickle(tmp_path / "old.pkl")["w"].tolist() == [1.0, 2.0]


def test_a_failed_load_does_not_spoil_the_next(tmp_path):
    torch.save({"model": nn.Linear(2, 2).state_dict()}, tmp_path / "good.pth")
    (tmp_path / "bad.pth").write_bytes(b"")
    checkpointer = DetectorCheckpointer(nn.Linear(2, 2))
    with pytest.raises(InputError):
        checkpointer.load(str(tmp_path / "bad.pth"))
    checkpointer.load(str(tmp_path / "good.pth"))


def test_read_weights_file_says_no_such_file(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.pt: no such file"):
        read_weights_file(tmp_path / "nowhere.pt")


def test_a_file_cannot_tell_numpy_that_numbers_are_pointers(tmp_path):
    numbers = np.arange(8.0)
    content = pickle.dumps({"model": {"weight": numbers}, "__author__": "us"}, 2)
    flags = b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK%ct"  # end of a pickled dtype: size, alignment
    assert flags % 0 in content
    for flag in (1, 2, 4, 63):
        (tmp_path / "x.pkl").write_bytes(content.replace(flags % 0, flags % flag))
        array = load_pickle(tmp_path / "x.pkl")["model"]["weight"]
        assert array.dtype == numbers.dtype and not array.dtype.hasobject
        assert np.array_equal(array, numbers)


def test_arrays_that_were_read_are_saved_as_numpys(tmp_path):
    torch.save({"best": np.ones(2)}, tmp_path / "x.pth")
    read = load_torch_file(tmp_path / "x.pth")
    assert type(pickle.loads(pickle.dumps(read))["best"]) is np.ndarray
