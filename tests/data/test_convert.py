"""YOLO and Pascal VOC folders, written here by hand from COCO annotations, and converted back."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("supervision", reason="supervision converts: pip install supervision")
SHORT = (
    *("SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "2", "TEST.EVAL_PERIOD", "0"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
)


def run(folder, tool, *arguments, expected=0):
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "tools" / tool, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert answer.returncode == expected, answer.stdout[-2000:] + answer.stderr[-3000:]
    return answer.stdout if expected == 0 else answer.stderr.strip().splitlines()[-1]


def read(path):
    """Width, height and [(class, x, y, w, h)] by image file; the classes by id; annotations."""
    coco = json.loads(Path(path).read_text())
    names = {each["id"]: each["name"] for each in coco["categories"]}
    files = {each["id"]: each["file_name"] for each in coco["images"]}
    sizes = {each["file_name"]: (each["width"], each["height"]) for each in coco["images"]}
    boxes = {name: [] for name in files.values()}
    for each in coco["annotations"]:
        boxes[files[each["image_id"]]].append((names[each["category_id"]], *each["bbox"]))
    return sizes, {name: sorted(found) for name, found in boxes.items()}, names, coco


@pytest.fixture
def data(small_demo_dataset):
    """Image folder, sizes, boxes and class names of both splits; crowds, which neither has, out."""
    found = {}
    for split in ("train", "val"):
        path = small_demo_dataset / "annotations" / f"instances_{split}.json"
        sizes, boxes, names, _ = read(path)
        found[split] = small_demo_dataset / split, sizes, boxes
    return found, [names[i] for i in sorted(names)]


def assert_same(path, sizes, boxes, classes, tolerance):
    found_sizes, found, names, coco = read(path)
    assert found_sizes == sizes
    assert [names[i] for i in sorted(names)] == classes and sorted(names)[0] == 1
    assert all(each["iscrowd"] == 0 for each in coco["annotations"])
    for name, wanted in boxes.items():
        assert len(found[name]) == len(wanted)
        for a, b in zip(found[name], wanted, strict=True):
            assert a[0] == b[0] and a[1:] == pytest.approx(b[1:], abs=tolerance)


def yolo_box(classes, size, box):
    name, x, y, w, h = box
    values = ((x + w / 2) / size[0], (y + h / 2) / size[1], w / size[0], h / size[1])
    return f"{classes.index(name)} " + " ".join(f"{value:.6f}" for value in values)


@pytest.mark.slow
def test_yolo(data, tmp_path):
    splits, classes = data
    classes = [*classes[::-1], "unseen"]  # ids follow the file, not the alphabet
    (tmp_path / "data.yaml").write_text(f"names: {classes}\n")
    options = ["--names", "data.yaml"]
    for split, (images, sizes, boxes) in splits.items():
        labels = tmp_path / split
        labels.mkdir()
        for name, found in list(boxes.items())[1:]:  # the first image has no file
            lines = [yolo_box(classes, sizes[name], box) for box in found]
            (labels / name).with_suffix(".txt").write_text("\n".join(lines))
        boxes[next(iter(boxes))] = []
        options += ["--split", f"{split}.json", images, labels]
    (tmp_path / "val" / "gone.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    log = run(tmp_path, "convert_to_coco.py", *options)
    assert "val: 1 .txt files without an image: gone.txt" in log
    for split, (_, sizes, boxes) in splits.items():
        assert_same(tmp_path / f"{split}.json", sizes, boxes, classes, tolerance=0.01)
    log = run(
        *(tmp_path, "train_net.py", "--config-file", ROOT / "configs" / "demo.yaml"),
        *("--train-json", "train.json", "--train-images", splits["train"][0]),
        *("--val-json", "val.json", "--val-images", splits["val"][0]),
        *("MODEL.MASK_ON", "False", "OUTPUT_DIR", "out", *SHORT),
    )
    assert "train.json: 8 images (1 without annotations)" in log
    assert "1 categories without an annotation: category 5 (unseen)" in log


@pytest.mark.slow
def test_yolo_polygons_become_masks(data, tmp_path):
    """One polygon, and one whose parts hang together by a line, as exporters join parts."""
    (images, sizes, _) = data[0]["train"]
    name, (width, height) = next(iter(sizes.items()))
    square = [10, 10, 40, 10, 40, 40, 10, 40]
    left, right = [50, 40, 50, 10, 60, 10, 60, 20], [80, 20, 80, 10, 90, 10, 90, 40, 80, 40, 80, 20]
    joined = [*left, *right, 60, 20, 60, 40]
    (tmp_path / "labels").mkdir()
    sides = (width, height) * 20
    lines = [
        "0 " + " ".join(f"{value / side:.6f}" for value, side in zip(polygon, sides, strict=False))
        for polygon in (square, joined)
    ]
    (tmp_path / "labels" / name).with_suffix(".txt").write_text("\n".join(lines))
    (tmp_path / "data.yaml").write_text("names: {0: thing}\n")
    options = ("--names", "data.yaml", "--split", "a.json", images, "labels")
    run(tmp_path, "convert_to_coco.py", *options)
    annotations = read(tmp_path / "a.json")[3]["annotations"]
    assert [each["iscrowd"] for each in annotations] == [0, 0]
    assert annotations[0]["bbox"] == pytest.approx([10, 10, 30, 30], abs=1)
    assert annotations[0]["area"] == pytest.approx(900, rel=0.1)
    assert annotations[1]["bbox"] == pytest.approx([50, 10, 40, 30], abs=1)
    assert all(isinstance(part, list) for each in annotations for part in each["segmentation"])


@pytest.mark.slow
def test_pascal_voc(data, tmp_path):
    splits, _ = data
    options, classes = [], set()
    for split, (images, _, boxes) in splits.items():
        folder = tmp_path / split
        folder.mkdir()
        for name, found in boxes.items():
            if split == "val":  # lacks a class that the other has
                found[:] = [box for box in found if box[0] != "star"]
            root = ElementTree.Element("annotation")
            for label, x, y, w, h in found[::-1]:
                classes.add(label)
                thing = ElementTree.SubElement(root, "object")
                ElementTree.SubElement(thing, "name").text = label
                box = ElementTree.SubElement(thing, "bndbox")
                # the devkit's pixels are counted from 1, the last one included
                corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
                for key, value in corners.items():
                    ElementTree.SubElement(box, key).text = str(round(value))
            ElementTree.ElementTree(root).write((folder / name).with_suffix(".xml"))
        options += ["--split", f"{split}.json", images, folder]
    run(tmp_path, "convert_to_coco.py", *options)
    for split, (_, sizes, boxes) in splits.items():
        found = read(tmp_path / f"{split}.json")
        assert found[0] == sizes
        assert list(found[2].values()) == sorted(classes)
        for name, wanted in boxes.items():
            rounded = sorted((n, *map(round, rest)) for n, *rest in wanted)
            assert len(found[1][name]) == len(rounded)
            for a, b in zip(found[1][name], rounded, strict=True):
                assert a[0] == b[0] and a[1:] == pytest.approx(b[1:], abs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--split", "a.json", "nowhere", "."), "nowhere: no such file or folder"),
        (("--split", "a.json", ".", "."), ". has no .xml files"),
        (("--names", "names.yaml", "--split", "a.json", ".", "."), ".: .*x.txt"),
    ],
)
def test_what_cannot_be_converted(tmp_path, options, message, monkeypatch):
    from rope_vit_det.data.convert import convert_to_coco
    from rope_vit_det.errors import InputError

    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.yaml").write_text("names: [a]\n")
    (tmp_path / "x.txt").write_text("this is no label\n")
    import cv2
    import numpy as np

    cv2.imwrite("x.png", np.zeros((9, 9, 3), np.uint8))
    names = options[1] if options[0] == "--names" else None
    with pytest.raises(InputError, match=message):
        convert_to_coco([options[-3:]], names=names)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        ("{0: a, 1: b}", None),
        ("{1: b, '0': a}", None),
        ("[a, b]", None),
        ("{1: a, 2: b}", 0),
        ("{0: a, 2: b}", 1),
        ("{a: a, b: b}", 0),
    ],
)
def test_classes_keep_the_numbers_of_the_labels(tmp_path, names, missing):
    from PIL import Image

    from rope_vit_det.data.convert import convert_to_coco
    from rope_vit_det.errors import InputError

    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("1 0.5 0.5 0.2 0.2\n")
    (tmp_path / "data.yaml").write_text(f"names: {names}\n")
    split = (str(tmp_path / "a.json"), str(tmp_path), str(tmp_path))
    if missing is None:
        convert_to_coco([split], names=str(tmp_path / "data.yaml"))
        assert [each[0] for each in read(tmp_path / "a.json")[1]["a.png"]] == ["b"]
        return
    with pytest.raises(InputError, match=f"data.yaml: names has no {missing}, "):
        convert_to_coco([split], names=str(tmp_path / "data.yaml"))


def _voc(folder, name, size, box):
    """A file of the devkit's layout; size None: without one."""
    root = ElementTree.Element("annotation")
    for tag, values in (("size", size), ("object/bndbox", box)):
        parent = root
        for part in tag.split("/") if values else ():
            parent = ElementTree.SubElement(parent, part)
        for key, value in (values or {}).items():
            ElementTree.SubElement(parent, key).text = str(value)
    ElementTree.SubElement(root.find("object"), "name").text = "thing"
    ElementTree.ElementTree(root).write(folder / f"{name}.xml")


def _png():
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "png")
    return file.getvalue()


PNG = _png()  # 40x30
BOX = {"xmin": 11, "ymin": 6, "xmax": 30, "ymax": 20}


@pytest.mark.parametrize(
    ("size", "orientation", "message"),
    [
        ((40, 30), 1, None),
        (None, 1, None),
        ((0, 0), 1, None),
        ((30, 40), 6, None),  # annotated as it is read
        ((40, 30), 6, "turn it to 30x40.*remove the tag Orientation"),
        ((30, 40), 1, "a.xml is for an image of 30x40, and .*a.jpg has 40x30"),
        ((80, 60), 1, "a.xml is for an image of 80x60"),
        ((80, 60), 8, "a.xml is for an image of 80x60, and .*a.jpg has 30x40"),
    ],
)
def test_voc_is_held_to_the_image_as_it_is_read(tmp_path, size, orientation, message):
    from PIL import Image

    from rope_vit_det.data.convert import convert_to_coco
    from rope_vit_det.errors import InputError

    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    _voc(tmp_path, "a", size and dict(zip(("width", "height"), size, strict=True)), BOX)
    split = (str(tmp_path / "a.json"), str(tmp_path), str(tmp_path))
    if message:
        with pytest.raises(InputError, match=message):
            convert_to_coco([split])
        assert not (tmp_path / "a.json").exists()
        return
    lines = convert_to_coco([split])
    assert any("1 images are turned by their EXIF" in line for line in lines) == (orientation != 1)
    sizes, boxes, _, _ = read(tmp_path / "a.json")
    assert sizes["a.jpg"] == ((30, 40) if orientation == 6 else (40, 30))
    assert boxes["a.jpg"] == [("thing", 10, 5, 20, 15)]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("data.yaml", b"names: [thing\n", "expected ',' or ']'"),
        ("data.yaml", "names: [café]\n".encode("latin-1"), "'utf-8' codec can't decode"),
        ("data.yaml", None, "Is a directory"),
        ("a.txt", b"0 0.5 0.5 0.2 0.2 \xff", "'utf-8' codec can't decode"),
        ("a.txt", None, "Is a directory"),
        ("a.png", PNG[:20], "Truncated"),
        ("b.png", PNG[:20], "Truncated"),  # without annotations
        ("b.png", b"no image", "no image"),
        ("a.xml", b"<annotation>", "no element found"),
        ("a.xml", b"<annotation><object/></annotation>", "Missing 'name'"),
        (
            "a.xml",
            b"<annotation><object><name>thing</name></object></annotation>",
            "Missing bndbox",
        ),
    ],
)
def test_the_file_that_cannot_be_read_is_named(tmp_path, file, content, message):
    from rope_vit_det.data.convert import convert_to_coco
    from rope_vit_det.errors import InputError

    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "data.yaml").write_text("names: [thing]\n")
    _voc(tmp_path, "a", None, BOX)
    (tmp_path / file).unlink(missing_ok=True)
    if content is None:
        (tmp_path / file).mkdir()
    else:
        (tmp_path / file).write_bytes(content)
    split = (str(tmp_path / "a.json"), str(tmp_path), str(tmp_path))
    names = None if file == "a.xml" else str(tmp_path / "data.yaml")
    with pytest.raises(InputError) as caught:
        convert_to_coco([split], names=names)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / file}: ") and message in said and "\n" not in said


@pytest.mark.parametrize(
    ("images", "labels", "refused"),
    [
        (["a.png", "sub/b.png"], ["a.txt", "sub/b.txt"], "images: 1 files .*images/sub a --split"),
        (["sub/a.png", "sub/b.png"], ["sub/a.txt", "sub/b.txt"], "images: 2 files .*/images/sub"),
        (["a.png", "b.png"], ["a.txt", "sub/deep/b.txt"], "labels: 1 files .*/labels/sub/deep"),
        (["a.png"], ["sub/a.txt"], "labels: 1 files .*/labels/sub"),
        (["a.png"], ["a.txt", "sub/LICENSE.txt"], None),  # of no image
        (["a.png", "sub/c.txt"], ["a.txt", "sub/c.png"], None),
    ],
)
def test_files_in_folders_below_are_not_lost(tmp_path, images, labels, refused):
    from rope_vit_det.data.convert import convert_to_coco
    from rope_vit_det.errors import InputError

    (tmp_path / "data.yaml").write_text("names: [thing]\n")
    for folder, files in (("images", images), ("labels", labels)):
        for file in files:
            path = tmp_path / folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(PNG if path.suffix == ".png" else b"0 0.5 0.5 0.2 0.2\n")
    split = tuple(str(tmp_path / name) for name in ("a.json", "images", "labels"))
    if refused is None:
        convert_to_coco([split], names=str(tmp_path / "data.yaml"))
        return
    with pytest.raises(InputError, match=refused):
        convert_to_coco([split], names=str(tmp_path / "data.yaml"))


def test_labels_beside_images_below_the_labels_folder(tmp_path):
    """That folder is named, but for its images."""
    from rope_vit_det.data.convert import convert_to_coco
    from rope_vit_det.errors import InputError

    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(PNG)
    _voc(tmp_path / "images", "a", None, BOX)
    _voc(tmp_path, "other", None, BOX)
    with pytest.raises(InputError, match=r"1 files .*/images a --split"):
        convert_to_coco([(f"{tmp_path}/out.json", f"{tmp_path}/images", str(tmp_path))])


def test_a_folder_below_with_a_split_of_its_own(tmp_path):
    from rope_vit_det.data.convert import convert_to_coco

    (tmp_path / "val").mkdir()
    for folder in (tmp_path, tmp_path / "val"):
        (folder / "a.png").write_bytes(PNG)
        _voc(folder, "a", None, BOX)
    (tmp_path / "b.png").write_bytes(PNG)  # without annotations here
    _voc(tmp_path / "val", "b", None, BOX)
    folders = (str(tmp_path), str(tmp_path / "val"))
    convert_to_coco([(f"{folder}/out.json", folder, folder) for folder in folders])
    assert {name: len(found) for name, found in read(tmp_path / "out.json")[1].items()} == {
        "a.png": 1,
        "b.png": 0,
    }


def test_images_larger_than_pillows_limit(tmp_path, monkeypatch):
    """slice_coco.py cuts them, by the JSON file."""
    from PIL import Image

    from rope_vit_det.data.convert import convert_to_coco

    (tmp_path / "a.png").write_bytes(PNG)
    _voc(tmp_path, "a", None, BOX)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 30 // 3)
    convert_to_coco([(str(tmp_path / "a.json"), str(tmp_path), str(tmp_path))])
    assert read(tmp_path / "a.json")[0] == {"a.png": (40, 30)}


def test_an_output_is_found_wanting_before_the_work(tmp_path):
    from rope_vit_det.data.convert import convert_to_coco
    from rope_vit_det.errors import InputError

    (tmp_path / "folder.json").mkdir()
    split = (str(tmp_path / "folder.json"), "nowhere", "nowhere")
    with pytest.raises(InputError, match=r"/folder\.json is a folder$"):
        convert_to_coco([split])
    # The first would be lost.
    same = [
        (str(tmp_path / name), "nowhere", "nowhere") for name in ("a.json", "folder.json/../a.json")
    ]
    with pytest.raises(InputError, match=r"two --split write .*/a\.json: give each a file"):
        convert_to_coco(same)


def test_one_folder_of_images_in_two_splits(tmp_path):
    from rope_vit_det.data.convert import convert_to_coco
    from rope_vit_det.errors import InputError

    (tmp_path / "a.png").write_bytes(PNG)
    _voc(tmp_path, "a", None, BOX)
    splits = [(str(tmp_path / name), str(tmp_path), str(tmp_path)) for name in ("1.json", "2.json")]
    with pytest.raises(InputError, match="two --split have the same folder of images"):
        convert_to_coco(splits)


@pytest.mark.filterwarnings("ignore:Skipping COCO polygon segmentation")
def test_a_box_beside_a_polygon_has_its_area(tmp_path):
    """The evaluation goes by it: 0 would be a small object."""
    from rope_vit_det.data.convert import convert_to_coco

    thing = "<name>thing</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"
    corners = "<x1>1</x1><y1>1</y1><x2>9</x2><y2>1</y2><x3>9</x3><y3>9</y3><x4>1</x4><y4>9</y4>"
    boxes = [thing.format(*box) + "</bndbox>" for box in ((1, 1, 9, 9), (11, 6, 30, 20))]
    (tmp_path / "a.xml").write_text(
        f"<annotation><object>{boxes[0]}<polygon>{corners}</polygon></object>"
        f"<object>{boxes[1]}</object></annotation>"
    )
    (tmp_path / "a.png").write_bytes(PNG)
    convert_to_coco([(str(tmp_path / "a.json"), str(tmp_path), str(tmp_path))])
    polygon, box = read(tmp_path / "a.json")[3]["annotations"]
    assert polygon["segmentation"] and polygon["area"] == 9 * 9  # pixels 0 to 8, borders included
    assert not box["segmentation"] and box["area"] == 20 * 15


def _pose_row(box, points, depth):
    (x, y), (w, h) = box
    values = [(x + px * w, y + py * h, 2)[:depth] for px, py in points]
    return " ".join(map(str, ("0", x, y, w, h, *(v for point in values for v in point))))


POINTS = [(-0.3, -0.4), (0.3, -0.4), (0.0, 0.1), (0.2, 0.45)]
BOXES = [((0.3, 0.4), (0.3, 0.5)), ((0.7, 0.6), (0.2, 0.3))]
CENTRED = "0 " + " ".join(map(str, (0.42, 0.42, 0.5, 0.4, 0.52, 0.5, 0.44, 0.5)))


@pytest.mark.parametrize(
    ("rows", "refused"),
    [
        ([_pose_row(box, POINTS, 3) for box in BOXES], True),
        ([_pose_row(box, POINTS, 2) for box in BOXES], True),
        ([_pose_row(box, POINTS[:3], 3) for box in BOXES], True),  # an odd number of values
        ([CENTRED, CENTRED], False),  # polygons, though all points lie in a "box"
        (["0 0.1 0.1 0.9 0.1 0.9 0.9 0.1 0.9", "0 0.2 0.2 0.4 0.2 0.4 0.5"], False),
    ],
)
def test_keypoints_are_not_read_as_polygons(tmp_path, rows, refused):
    from PIL import Image

    from rope_vit_det.data.convert import convert_to_coco
    from rope_vit_det.errors import InputError

    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("\n".join(rows))
    (tmp_path / "data.yaml").write_text("names: [thing]\n")
    split = (str(tmp_path / "a.json"), str(tmp_path), str(tmp_path))
    if not refused:
        convert_to_coco([split], names=str(tmp_path / "data.yaml"))
        assert len(read(tmp_path / "a.json")[3]["annotations"]) == 2
        return
    with pytest.raises(InputError, match="add kpt_shape"):
        convert_to_coco([split], names=str(tmp_path / "data.yaml"))
    depth = 2 if (len(rows[0].split()) - 5) % 3 else 3
    points = (len(rows[0].split()) - 5) // depth
    for shape, message in ((f"[{points}, {depth}]", None), ("[9, 3]", "kpt_shape in .*correct")):
        (tmp_path / "data.yaml").write_text(f"names: [thing]\nkpt_shape: {shape}\n")
        if message and points != 3:  # an odd number of values is no polygon either
            with pytest.raises(InputError, match=message):
                convert_to_coco([split], names=str(tmp_path / "data.yaml"))
        elif not message:
            convert_to_coco([split], names=str(tmp_path / "data.yaml"))
            found = read(tmp_path / "a.json")[1]["a.png"]
            wanted = [(200 * (x - w / 2), 100 * (y - h / 2), 200 * w, 100 * h)
                      for (x, y), (w, h) in BOXES]  # fmt: skip
            for (_, *box), oracle in zip(found, sorted(wanted), strict=True):
                assert box == pytest.approx(oracle, abs=0.01)
