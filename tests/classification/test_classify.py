"""Classes and embeddings of image files against birder's own preprocessing and inference."""

import csv
import dataclasses
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from birder.common import fs_ops
from birder.data.transforms.classification import inference_preset
from birder.inference.classification import infer_image
from birder.model_registry import registry
from birder.net import rope_vit  # noqa: F401  (registers the networks)
from birder.net.base import get_signature
from helpers import BIRDS, RGB_STATS, move_off_initial_values
from PIL import Image

from rope_vit_det.classification import classification_transform
from rope_vit_det.classification.classify_files import run
from rope_vit_det.errors import InputError
from rope_vit_det.utils.image_files import find_images
from rope_vit_det.weights import read_weights_file, write_weights_file

NETWORK = "rope_vit_reg1_t16"
TOOL = Path(__file__).parents[2] / "tools" / "classify.py"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file that birder wrote."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    net = move_off_initial_values(registry.net_factory(NETWORK, len(BIRDS), 3, size=(224, 224)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fs_ops.settings, "MODELS_DIR", folder)
        signature = get_signature((1, 3, 224, 224), len(BIRDS))
        fs_ops.checkpoint_model(NETWORK, 1, net, signature, BIRDS, RGB_STATS, *(None,) * 4)
    return (folder / f"{NETWORK}_1.pt").rename(folder / f"{NETWORK}_birds.pt")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "deep").mkdir()
    rng = np.random.default_rng(0)
    for name, size, mode in (
        ("a.jpg", (301, 187), "RGB"),
        ("b.PNG", (90, 400), "RGB"),
        ("deep/grey.png", (64, 64), "L"),
        ("deep/alpha.webp", (120, 130), "RGBA"),
    ):
        pixels = rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
        Image.fromarray(pixels, "RGBA").convert(mode).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def birder_results(weights, image, *, size=None, config=None):
    net, info = fs_ops.load_model(
        torch.device("cpu"), NETWORK, path=weights, config=config, new_size=size, inference=True
    )
    transform = inference_preset(size or (224, 224), info.rgb_stats)
    with torch.inference_mode():
        return infer_image(net, Image.open(image).convert("RGB"), transform, return_embedding=True)


@pytest.mark.parametrize("size", [(224, 224), (336, 210)])
def test_preprocessing_equals_birders(photos, size):
    ours = classification_transform(size, RGB_STATS["mean"], RGB_STATS["std"])
    theirs = inference_preset(size, RGB_STATS)
    for path in find_images([photos]):
        image = Image.open(path).convert("RGB")
        assert torch.equal(ours(image), theirs(image)), path


@pytest.mark.parametrize(
    ("size", "config", "suffix"),
    [
        (None, None, ".csv"),
        (None, None, ".npz"),
        ((336, 336), {"pt_grid_size": (14, 14)}, ".csv"),
        ((160, 256), None, ".npz"),
    ],
)
def test_probabilities_and_embeddings_equal_birders(
    weights, photos, tmp_path, size, config, suffix
):
    options = dict(size=size, batch_size=3)
    if config:
        options["model_config"] = '{"pt_grid_size": [14, 14]}'
    for embeddings in (False, True):
        output = str(tmp_path / f"out{suffix}")
        assert (
            run(str(weights), [str(photos)], output=output, embeddings=embeddings, **options) == 0
        )
        paths, values = _read(output, embeddings)
        assert paths == find_images([photos]) and len(paths) == 4
        for path, value in zip(paths, values, strict=True):
            probabilities, embedding = birder_results(weights, path, size=size, config=config)
            if embeddings:
                np.testing.assert_allclose(value, embedding[0], atol=1e-5 * abs(embedding).max())
            else:
                expected = sorted(zip(probabilities[0], BIRDS, strict=True), reverse=True)
                assert [name for name, _ in value] == [name for _, name in expected]
                np.testing.assert_allclose(
                    [p for _, p in value], [p for p, _ in expected], atol=1e-5
                )


def _read(output, embeddings):
    if output.endswith(".npz"):
        arrays = np.load(output)
        paths = list(arrays["paths"])
        if embeddings:
            return paths, arrays["embeddings"]
        pairs = zip(arrays["classes"], arrays["probabilities"], strict=True)
        return paths, [list(zip(*pair, strict=True)) for pair in pairs]
    with open(output, newline="") as file:
        _, *rows = csv.reader(file)
    paths = [row[0] for row in rows]
    if embeddings:
        return paths, np.array([[float(x) for x in row[1:]] for row in rows])
    return paths, [list(zip(row[1::2], map(float, row[2::2]), strict=True)) for row in rows]


def test_an_unreadable_image_is_named_and_the_rest_goes_on(weights, photos, tmp_path, capsys):
    (tmp_path / "cut.jpg").write_bytes((photos / "a.jpg").read_bytes()[:900])
    (tmp_path / "empty.png").touch()
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(tmp_path / "deep.tif")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    inputs = [str(tmp_path), str(photos / "a.jpg")]
    output = tmp_path / "out.csv"
    assert run(str(weights), inputs, output=str(output), batch_size=2) == 1
    told = capsys.readouterr().err
    for name in ("cut.jpg", "empty.png", "deep.tif", "gone.jpg"):
        assert f"unreadable: {tmp_path / name}: " in told
    assert "4 of 5 images unreadable" in told
    assert [row[0] for row in csv.reader(output.open())] == ["image", str(photos / "a.jpg")]
    with pytest.raises(InputError, match=r"none of the 4 images could be read.*cut\.jpg"):
        run(str(weights), [str(tmp_path)], output=str(tmp_path / "none.csv"))
    assert not list(tmp_path.glob("*none.csv*"))


def test_images_folders_and_patterns(photos, tmp_path):
    def names(*inputs):
        return [Path(path).name for path in find_images(inputs)]

    assert names(photos) == ["a.jpg", "b.PNG", "alpha.webp", "grey.png"]
    assert names(photos / "b.PNG", photos / "a.jpg", f"{photos}/*") == [
        "b.PNG",
        "a.jpg",
        "alpha.webp",
        "grey.png",
    ]
    assert names(f"{photos}/**/*.png") == ["grey.png"]
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(photos)
    assert len(find_images([tmp_path])) == 4
    (tmp_path / "[1].jpg").write_bytes((photos / "a.jpg").read_bytes())
    assert names(tmp_path / "[1].jpg") == ["[1].jpg"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no images given"),
        (["nowhere"], "nowhere: no such file or folder"),
        (["{empty}"], "brings no image"),
        (["{empty}/*.jpg"], "brings no image"),
        (["{photos}", "--size", "225"], "multiples of the patch size 16"),
        (["{photos}", "--model-config", "{{"], "is not JSON"),
        (["{photos}", "--model-config", '{{"qk_norm": true}}'], "qk_norm"),
        (["{photos}", "--batch-size", "0"], "batch size"),
        (["{photos}", "--device", "cuda:99"], "cuda:99 cannot be used"),
        (["{photos}", "--embeddings", "--top-k", "3"], "--top-k is of classes"),
        (["{photos}", "--output", "out.txt"], "must end in"),
        (["{photos}", "--output", "{photos}/a.jpg/out.csv"], "a.jpg is no folder"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2(
    weights, photos, tmp_path, monkeypatch, capsys, arguments, message
):
    arguments = [text.format(photos=photos, empty=tmp_path) for text in arguments]
    monkeypatch.setattr(sys, "argv", ["classify.py", str(weights), *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOL), run_name="__main__")
    told = capsys.readouterr()
    line = told.err.strip().splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("error: ") and message in line
    assert told.out == ""


def test_weights_without_classifier_give_embeddings_only(weights, photos, tmp_path):
    state, info = read_weights_file(weights)
    state = {k: v for k, v in state.items() if not k.startswith("classifier")}
    path = tmp_path / f"{NETWORK}_headless.pt"
    write_weights_file(path, state, dataclasses.replace(info, num_classes=0, class_to_idx={}))
    with pytest.raises(InputError, match="no classifier"):
        run(str(path), [str(photos)])
    assert run(str(path), [str(photos)], embeddings=True, output=str(tmp_path / "e.npz")) == 0
    assert np.load(tmp_path / "e.npz")["embeddings"].shape == (4, 192)


@pytest.mark.slow
def test_the_tool_in_a_process_of_its_own(weights, photos):
    answer = subprocess.run(
        [sys.executable, TOOL, weights, photos, "--top-k", "2"], capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    header, *rows = csv.reader(answer.stdout.splitlines())
    assert header == ["image", "class_1", "probability_1", "class_2", "probability_2"]
    assert len(rows) == 4 and {row[1] for row in rows} <= set(BIRDS)
