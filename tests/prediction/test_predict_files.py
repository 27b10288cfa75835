"""tools/predict.py: what it writes, and what it refuses."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFile
from pycocotools.coco import COCO

import rope_vit_det
from rope_vit_det.errors import InputError
from rope_vit_det.prediction.predict_files import run
from rope_vit_det.utils.image_files import any_number_of_pixels

TOOL = Path(__file__).parents[2] / "tools" / "predict.py"
LOW = {"confidence_threshold": 0.2, "device": "cpu"}


@pytest.fixture(scope="module")
def photos(small_demo_dataset, tmp_path_factory):
    """Two folders with an image of the same name in each."""
    folder = tmp_path_factory.mktemp("photos")
    for i, path in enumerate(sorted((small_demo_dataset / "val").glob("*.jpg"))[:3]):
        (folder / f"{i % 2}").mkdir(exist_ok=True)
        shutil.copy(path, folder / f"{i % 2}" / f"{i // 2}.jpg")
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 5, (96, 64))
    rng = np.random.default_rng(0)
    for _ in range(5):
        writer.write(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))
    writer.release()
    return str(path)


def test_pictures_and_files_of_what_the_predictor_finds(trained_folder, photos, tmp_path):
    out, json_file = tmp_path / "drawn", tmp_path / "found.json"
    options = {"batch_size": 2, "classes": ["crate"], **LOW}
    options |= {"yolo": str(tmp_path / "yolo"), "label_studio": str(tmp_path / "tasks.json")}
    run(str(trained_folder), [str(photos)], output=str(out), json_file=str(json_file), **options)
    drawn = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*"))
    assert drawn == ["0/0.png", "0/1.png", "1/0.png"]
    coco = COCO(json_file)
    predictor = rope_vit_det.Predictor(trained_folder, threshold=0.2, device="cpu")
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    for image, task in zip(coco.dataset["images"], tasks, strict=True):
        assert task["data"]["image"] == "/data/local-files/?d=" + image["file_name"][1:]
        number = len(coco.imgToAnns[image["id"]])
        assert len(task["predictions"][0]["result"]) == number
        labels = tmp_path / "yolo/labels" / Path(image["file_name"]).relative_to(photos)
        rows = labels.with_suffix(".txt").read_text().splitlines()
        assert [row.split()[0] for row in rows] == ["1"] * number
    assert [each["file_name"] for each in coco.dataset["images"]] == sorted(
        map(str, photos.rglob("*.jpg"))
    )
    for image in coco.dataset["images"]:
        found = predictor(image["file_name"])
        assert found.image_size == (image["height"], image["width"])
        annotations = coco.imgToAnns[image["id"]]
        ids = [i + 1 for i in found.pred_classes.tolist() if i == 1]
        assert [each["category_id"] for each in annotations] == ids
        scores = [s for s, i in zip(found.scores, found.pred_classes, strict=True) if i == 1]
        np.testing.assert_allclose([each["score"] for each in annotations], scores, atol=1e-4)
        assert all(coco.annToMask(each).shape == found.image_size for each in annotations)
    assert coco.anns


def test_a_video_becomes_a_video(trained_folder, video, tmp_path):
    json_file = tmp_path / "found.json"
    run(
        str(trained_folder),
        [video],
        output=str(tmp_path),
        json_file=str(json_file),
        batch_size=2,
        device="cpu",
    )
    capture = cv2.VideoCapture(str(tmp_path / "clip.mp4"))
    frames = []
    while (frame := capture.read())[0]:
        frames.append(frame[1])
    assert len(frames) == 5 and frames[0].shape == (64, 96, 3)
    assert capture.get(cv2.CAP_PROP_FPS) == 5
    images = json.loads(json_file.read_text())["images"]
    assert [each["frame"] for each in images] == [0, 1, 2, 3, 4]
    assert sorted(tmp_path.iterdir()) == [tmp_path / "clip.mp4", json_file]


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (["nowhere.jpg"], {}, r"nowhere\.jpg: no such file or folder"),
        (["nowhere.mp4"], {}, r"nowhere\.mp4: no such file"),
        (["empty.mp4"], {}, r"empty\.mp4 is no video, or one without a frame"),
        (["noise.mp4"], {}, r"noise\.mp4 is no video"),
        (["noise.mp4", "good.png"], {}, r"noise\.mp4 is a video: name it alone"),
        (["cut.jpg", "good.png"], {}, r"cut\.jpg: .*truncated"),
        (["deep.png", "cut.jpg"], {}, r"deep\.png: .*8 bits.*\(2 of 2 images cannot be read\)"),
        ([""], {}, "no such file or folder"),
        (["noise.mp4"], {"yolo": "y"}, r"noise\.mp4 is a video: --yolo and --label-studio"),
        (["noise.mp4"], {"label_studio": "y"}, r"noise\.mp4 is a video: --yolo and"),
        (["good.png", "good.jpg"], {"yolo": "y"}, r"good\.png: another image has this name"),
        (["good.png"], {"yolo": "good.png/x"}, r"good\.png is no folder"),
        (["good.png"], {"output": "."}, r"good\.png is one of the inputs"),
        (["short.mp4"], {"output": "."}, r"short\.mp4 is one of the inputs"),
        (["good.png"], {"output": None, "json_file": "good.png"}, r"--json: good\.png is one of"),
        (["good.png"], {"label_studio": "link.png"}, r"--label-studio: link\.png is one of the"),
        (["good.png"], {"json_file": "a.json", "label_studio": "./a.json"}, "what --json writes"),
        (["good.png"], {"output": "a", "json_file": "a/good.png"}, "is what --output writes"),
        (["good.png"], {"yolo": "a", "json_file": "a/data.yaml"}, "is what --yolo writes"),
        (["good.png", "good.jpg", "good.jpg.jpg"], {}, r"good\.jpg\.png is what --output writes"),
        (["good.png"], {"json_file": "a.pth", "weights": "a.pth"}, r"a\.pth is one of the inputs"),
        (["good.png"], {"output": "good.png/x"}, r"good\.png is no folder"),
        (["good.png"], {"output": None}, "nothing would be written"),
        (["good.png"], {"batch_size": 0}, "batch size must be 1 or more"),
        (["good.png"], {"slice_side": 4}, "32 pixels or more"),
        (["good.png"], {"confidence_threshold": 50}, "from 0 to 1"),
        (["good.png"], {"device": "abacus"}, "device abacus cannot be used"),
        (["good.png"], {"classes": ["stra"]}, r"no class 'stra'; there is star"),
        (["good.png"], {"weights": "gone.pth"}, r"gone\.pth: no such file"),
        (["good.png"], {"opts": ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.9"]},
         r"MODEL\.ROI_HEADS\.SCORE_THRESH_TEST .* give --confidence-threshold"),
        (["good.png"], {"opts": ["MODEL.DEVICE", "cpu"]}, r"MODEL\.DEVICE .* give --device"),
        (["good.png"], {"opts": ["TEST.AUG.ENABLED", "True"]}, "give --tta"),
        (["good.png"], {"opts": ["VERSION", "2", "TEST.SLICE.SIZE", "64"]}, "give --slice"),
        (["good.png"], {"opts": ["MODEL.WEIGHTS", "a"], "weights": "b"}, "--weights is given too"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(
    trained_folder, photos, video, tmp_path, monkeypatch, inputs, options, message
):
    monkeypatch.chdir(tmp_path)
    Path("link.png").symlink_to("good.png")
    for name in ("good.png", "good.jpg", "good.jpg.jpg"):
        Image.new("RGB", (40, 30)).save(name)
    Path("cut.jpg").write_bytes((photos / "0" / "0.jpg").read_bytes()[:2000])
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save("deep.png")
    Path("noise.mp4").write_bytes(b"noise" * 100)
    writer = cv2.VideoWriter("empty.mp4", cv2.VideoWriter_fourcc(*"mp4v"), 5, (96, 64))
    writer.release()
    shutil.copy(video, "short.mp4")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message) as error:
        run(str(trained_folder), inputs, **{"output": "out", "device": "cpu"} | options)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("batch_size", [1, 4])
def test_images_of_which_nothing_is_left_are_named_and_the_rest_is_predicted(
    trained_folder, photos, tmp_path, capsys, batch_size
):
    good = sorted(photos.rglob("*.jpg"))[:2]
    Image.new("RGB", (1, 3000)).save(tmp_path / "thin.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)).save(
        tmp_path / "broken.png"
    )
    broken = bytearray((tmp_path / "broken.png").read_bytes())
    broken[len(broken) // 2 : len(broken) // 2 + 20] = bytes(20)  # only decoding finds it
    (tmp_path / "broken.png").write_bytes(broken)
    inputs = [str(tmp_path / "thin.png"), str(tmp_path / "broken.png"), *map(str, good)]
    options = {"json_file": str(tmp_path / "found.json"), "batch_size": batch_size}
    options |= {"device": "cpu", "confidence_threshold": 0.9}  # drawing takes time
    out = tmp_path / "out"
    assert run(str(trained_folder), inputs, output=str(out), **options) == 1
    lines = capsys.readouterr().err.splitlines()
    (thin,) = [line for line in lines if "thin.png" in line]
    assert "thin.png: 1x3000 px: nothing is left" in thin and "INPUT.MAX_SIZE_TEST" in thin
    assert sum("broken.png" in line for line in lines) == 1
    assert lines[-1].startswith(f"2 of {len(inputs)} images left out")
    images = json.loads((tmp_path / "found.json").read_text())["images"]
    assert [each["file_name"] for each in images] == list(map(str, good))
    assert len(list(out.rglob("*.png"))) == len(good)
    (tmp_path / "found.json").unlink()
    with pytest.raises(InputError, match=r"none of the 1 images can be used.*thin\.png"):
        run(str(trained_folder), inputs[:1], **options)
    assert not (tmp_path / "found.json").exists()


@pytest.mark.parametrize("drawn", [".", "drawn"])
def test_what_was_drawn_is_not_taken_for_a_photograph(trained_folder, photos, tmp_path, drawn):
    shutil.copy(photos / "0" / "0.jpg", tmp_path)
    arguments = (str(trained_folder), [str(tmp_path)])
    output = str(tmp_path / drawn)
    assert run(*arguments, output=output, device="cpu") == 0
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"0\.png is one of the inputs"):
        run(*arguments, output=output, device="cpu")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_image_is_decoded_once(trained_folder, photos, tmp_path, monkeypatch):
    paths = sorted(map(str, photos.rglob("*.jpg")))
    for kind in ("png", "bmp"):
        path = str(tmp_path / f"photo.{kind}")
        Image.open(paths[0]).save(path)
        paths.append(path)
    decoded = []
    load = ImageFile.ImageFile.load

    def counting_load(image):
        if image.tile:  # what is still to be decoded
            decoded.append(image.filename)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counting_load)
    assert run(str(trained_folder), paths, json_file=str(tmp_path / "found.json"), **LOW) == 0
    assert sorted(decoded) == sorted(paths)


def test_beyond_pillows_limit_there_is_slicing(trained_folder, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9000)  # at twice as many it refuses
    path = str(next(photos.rglob("*.jpg")))
    options = {"json_file": str(tmp_path / "found.json"), "yolo": str(tmp_path), **LOW}
    with pytest.raises(InputError, match=r"decompression bomb.*--slice"):
        run(str(trained_folder), [path], **options)
    assert run(str(trained_folder), [path], slice_side=128, **options) == 0
    assert Image.MAX_IMAGE_PIXELS == 9000
    coco = COCO(options["json_file"])
    (image,) = coco.dataset["images"]
    assert coco.anns
    predictor = rope_vit_det.Predictor(trained_folder, threshold=0.2, device="cpu", slice_side=128)
    assert len(predictor(path)) == len(coco.anns)
    rows = (tmp_path / "labels" / Path(path).name).with_suffix(".txt").read_text().splitlines()
    assert len(rows) == len(coco.anns) and all(len(row.split()) > 6 for row in rows)
    for each in coco.dataset["annotations"]:
        assert coco.annToMask(each).shape == (image["height"], image["width"])
        assert each["area"] == coco.annToMask(each).sum()


@pytest.mark.slow
def test_a_large_image_with_masks_stays_within_4_gib(trained_folder, tmp_path):
    pixels = np.zeros((20_000, 20_000, 3), np.uint8)
    rng = np.random.default_rng(0)
    for x, y in rng.integers(0, 19_900, (300, 2)):
        pixels[y : y + 60, x : x + 80] = rng.integers(60, 255, 3)
    path = tmp_path / "large.png"
    with any_number_of_pixels(True):
        Image.fromarray(pixels).save(path, compress_level=1)
    del pixels
    options = ["--slice", "2048", "--confidence-threshold", "0", "--device", "cpu"]
    command = [sys.executable, TOOL, "--config-file", trained_folder, "--input", path, *options]
    command += ["--json", tmp_path / "found.json", "--opts", "TEST.DETECTIONS_PER_IMAGE", "10"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    subprocess.run(list(map(str, command)), check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert before < peak < 4 * 2**20  # KiB
    found = json.loads((tmp_path / "found.json").read_text())["annotations"]
    assert len(found) >= 300
    assert all(each["segmentation"]["size"] == [20_000, 20_000] for each in found)


@pytest.mark.slow
def test_the_command_line(trained_folder, photos, tmp_path):
    def tool(*arguments):
        command = [sys.executable, "-W", "ignore", TOOL, "--config-file", trained_folder]
        return subprocess.run(
            [*map(str, command), *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path
        )

    answer = tool("--input", photos, "--json", "found.json", "--opts", "INPUT.MIN_SIZE_TEST", "96")
    assert answer.returncode == 0, answer.stderr
    assert "images/s" in answer.stdout and (tmp_path / "found.json").is_file()
    answer = tool("--input", "nothing.jpg", "--json", "other.json")
    assert answer.returncode == 2
    assert answer.stderr == "error: nothing.jpg: no such file or folder\n"
    assert not (tmp_path / "other.json").exists()
