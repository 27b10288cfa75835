"""Tiles against the photograph: what they show, and what their annotations say of it."""

import json
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image
from pycocotools.coco import COCO
from sahi.slicing import get_slice_bboxes
from shapely import Polygon

from rope_vit_det.data.rle_masks import RLEMasks, as_rle, box_of, encode_part
from rope_vit_det.data.tiles import cut_annotation, slice_datasets, windows
from rope_vit_det.errors import InputError

SIZE = (150, 190)
CUT = {"side": 64, "overlap": 0.25, "min_area": 0.3}


def polygon_of(box):
    x0, y0, x1, y1 = box
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def make_dataset(folder: Path, seed: int = 0, limit: int = 60) -> str:
    """Boxes, polygons (concave, of two parts, crossing themselves), RLE, crowds and keypoints."""
    rng = np.random.default_rng(seed)
    height, width = SIZE
    folder.mkdir()
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    exif = Image.Exif()
    exif[274] = 3
    Image.fromarray(pixels[::-1, ::-1]).save(folder / "photo.png", exif=exif)
    annotations = []
    for number in range(1, limit + 1):
        low = rng.integers(0, (width - 40, height - 40)).astype(float)
        high = low + rng.integers(3, 40, 2)
        box = (*low, *high)
        each = {"id": number, "image_id": 7, "category_id": 3 + number % 2, "iscrowd": 0}
        kind = number % 6
        if kind == 1:
            each["segmentation"] = [polygon_of(box)]
        elif kind == 2:
            each["segmentation"] = [(rng.uniform(low, high, (7, 2))).flatten().tolist()]
        elif kind == 3:
            middle = (low + high) / 2
            each["segmentation"] = [polygon_of((*low, *middle)), polygon_of((*middle, *high)), [1]]
        elif kind in (4, 5):
            x0, y0, x1, y1 = map(int, box)
            mask = np.zeros(SIZE, np.uint8, order="F")
            mask[y0:y1, x0:x1] = rng.random((y1 - y0, x1 - x0)) < 0.7
            mask[y0, x0] = 1
            each["segmentation"] = as_rle(mask_util.encode(mask))
            each["iscrowd"] = int(kind == 5)
            if kind == 5:  # counts as a list
                flat = mask.flatten("F")
                edges = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
                counts = np.diff([0, *edges, flat.size]).tolist()
                each["segmentation"] = {"size": list(SIZE), "counts": counts}
        if kind == 0:
            points = np.concatenate([rng.uniform(low, high, (4, 2)), [[2], [1], [0], [2]]], axis=1)
            each["keypoints"] = points.flatten().tolist()
        each["bbox"] = [*low, *(high - low)]
        each["area"] = float(np.prod(high - low))
        each["attributes"] = {"number": number}
        annotations.append(each)
    image = {"id": 7, "file_name": "photo.png", "height": height, "width": width, "license": 4}
    categories = [{"id": 3, "name": "a"}, {"id": 4, "name": "b"}]
    coco = {"images": [image], "annotations": annotations, "categories": categories}
    (folder / "coco.json").write_text(json.dumps(coco))
    return str(folder / "coco.json")


@pytest.fixture
def registered(tmp_path):
    names = []

    def register(folder: str, name: str, seed: int = 0, copy_of: str = "") -> str:
        json_file = make_dataset(tmp_path / folder, seed)
        if copy_of:
            photo = (tmp_path / copy_of / "photo.png").read_bytes()
            (tmp_path / folder / "photo.png").write_bytes(photo)
        register_coco_instances(name, {}, json_file, str(tmp_path / folder))
        names.append(name)
        return json_file

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def mask_of(annotation, size):
    mask = annotation["segmentation"]
    if isinstance(mask, dict):
        return mask_util.decode(as_rle(mask))
    parts = [part for part in mask if len(part) >= 6]
    return mask_util.decode(mask_util.merge(mask_util.frPyObjects(parts, *size)))


def test_tiles_show_and_say_what_the_photograph_does(registered, tmp_path):
    truth = json.loads(Path(registered("photos", "tiles_a")).read_text())
    limit = Image.MAX_IMAGE_PIXELS
    (line,) = slice_datasets(["tiles_a"], str(tmp_path / "out"), **CUT)
    assert limit == Image.MAX_IMAGE_PIXELS
    coco = COCO(str(tmp_path / "out" / "tiles_a.json"))
    assert coco.dataset["categories"] == truth["categories"]
    photo = np.asarray(Image.open(tmp_path / "photos" / "photo.png"))[::-1, ::-1]
    assert len(coco.imgs) == 12 and sorted(coco.anns) == list(range(1, len(coco.anns) + 1))
    seen, shown = np.zeros(SIZE, bool), set()
    for image in coco.dataset["images"]:
        (x0, y0), width, height = image["offset"], image["width"], image["height"]
        x1, y1 = x0 + width, y0 + height
        assert (width, height) == (64, 64) and image["license"] == 4
        tile = np.asarray(Image.open(tmp_path / "out" / "tiles_a" / image["file_name"]))
        np.testing.assert_array_equal(tile, photo[y0:y1, x0:x1])
        seen[y0:y1, x0:x1] = True
        there = {each["attributes"]["number"]: each for each in coco.imgToAnns[image["id"]]}
        shown |= set(there)
        for old in truth["annotations"]:
            new = there.get(old["id"])
            left, top, w, h = old["bbox"]
            in_tile = np.clip(
                [left - x0, top - y0, left + w - x0, top + h - y0], 0, [width, height] * 2
            )
            if "segmentation" in old:
                whole = mask_of(old, SIZE)
                want = whole[y0:y1, x0:x1]
                share = want.sum() / whole.sum()
            else:
                share = np.prod(in_tile[2:] - in_tile[:2]) / (w * h)
            if abs(share - CUT["min_area"]) > 0.05 or old["iscrowd"]:
                least = 0 if old["iscrowd"] else CUT["min_area"]
                assert (new is not None) == (share > least), (old, share)
            if new is None:
                continue
            assert (new["category_id"], new["iscrowd"]) == (old["category_id"], old["iscrowd"])
            x, y, w, h = new["bbox"]
            assert x >= -1e-6 and y >= -1e-6 and x + w <= width + 1e-6 and y + h <= height + 1e-6
            if "segmentation" not in old:
                np.testing.assert_allclose([x, y, x + w, y + h], in_tile, atol=1e-6)
                assert new["area"] == pytest.approx(old["area"] * share)
                points, olds = (np.reshape(e["keypoints"], (-1, 3)) for e in (new, old))
                inside = (
                    (olds[:, 2] > 0)
                    & (olds[:, :2] >= (x0, y0)).all(1)
                    & (olds[:, :2] < (x1, y1)).all(1)
                )
                np.testing.assert_allclose(points[inside] + (x0, y0, 0), olds[inside])
                assert not points[~inside].any() and new["num_keypoints"] == inside.sum()
                continue
            got = mask_of(new, (height, width))
            if isinstance(old["segmentation"], dict):
                np.testing.assert_array_equal(got, want)
            else:  # pycocotools rounds the corners that a cut makes
                assert isinstance(new["segmentation"], list)
                assert (got != want).sum() <= 0.1 * want.sum() + 4, (old, (x0, y0))
            if 1 - share < 1e-9:
                assert new["area"] in (old["area"], got.sum())
            else:
                assert new["area"] == got.sum()
    assert seen.all()
    lost = len(truth["annotations"]) - len(shown)
    assert ("; " in line) == (lost > 0) and f"12 tiles of 1 images, {len(coco.anns)}" in line


@pytest.mark.parametrize("order", [1, -1])
def test_holes_stay_holes(order):
    hole, other = [(55, 30), (55, 60), (80, 60), (80, 30)], [(60, 65), (60, 75), (70, 75), (70, 65)]
    ring = [(10, 10), (90, 10), (90, 90), (10, 90), (10, 10)]
    for each in (hole, other):
        ring += [*each[::order], each[::order][0], (10, 10)]
    polygon = np.ravel(ring).tolist()
    whole = mask_of({"segmentation": [polygon]}, (100, 100))
    assert whole.sum() == 80 * 80 - 25 * 30 - 10 * 10
    annotation = {"bbox": [10, 10, 80, 80], "segmentation": [polygon], "area": float(whole.sum())}
    tiles = [(40, 20, 100, 80), (0, 0, 60, 60), (57, 33, 72, 77), (56, 31, 59, 59)]
    tiles += [(x, y, x + 50, y + 50) for x in range(0, 60, 10) for y in range(0, 60, 10)]
    for x0, y0, x1, y1 in tiles:
        part = cut_annotation(annotation, (x0, y0, x1, y1), (100, 100), 0.01)
        wanted = whole[y0:y1, x0:x1]
        if part is None:
            assert wanted.sum() < 0.01 * whole.sum()
            continue
        assert (mask_of(part, wanted.shape) == wanted).all() and part["area"] == wanted.sum()
        # Readers that count how often a point is gone round, as Detectron2's crops, see the same.
        shapes = [Polygon(np.reshape(each, (-1, 2))).buffer(0) for each in part["segmentation"]]
        assert sum(shape.area for shape in shapes) == pytest.approx(wanted.sum())


def test_one_photograph_is_never_on_both_sides(registered, tmp_path):
    registered("train", "tiles_train", 0)
    registered("val", "tiles_val", 1, copy_of="train")
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"val.*photo\.png.*same photograph.*tiles_train"):
        slice_datasets(["tiles_train", "tiles_val"], str(out), **CUT)
    assert not out.exists()
    slice_datasets(["tiles_train"], str(out), **CUT)
    with pytest.raises(InputError, match=r"same photograph as photo\.png of 'tiles_train'"):
        slice_datasets(["tiles_val"], str(out), **CUT)
    with pytest.raises(InputError, match="holds tiles of 'tiles_train' already"):
        slice_datasets(["tiles_train"], str(out), **CUT)


def test_datasets_without_objects_to_learn_from_are_cut(registered, tmp_path):
    json_file = Path(registered("photos", "tiles_empty"))
    coco = json.loads(json_file.read_text())
    crowds = [each for each in coco["annotations"] if each["iscrowd"]]
    for number, annotations in enumerate([crowds, []]):
        json_file.write_text(json.dumps(coco | {"annotations": annotations}))
        out = tmp_path / f"out{number}"
        slice_datasets(["tiles_empty"], str(out), **CUT)
        cut = json.loads((out / "tiles_empty.json").read_text())
        assert len(cut["images"]) == len(list((out / "tiles_empty").iterdir())) == 12
        whole = [mask_of(each, SIZE) for each in annotations]
        shown = [w[y : y + 64, x : x + 64].any() for w in whole
                 for x, y in (each["offset"] for each in cut["images"])]  # fmt: skip
        assert len(cut["annotations"]) == sum(shown)


def test_other_files_may_lie_where_tiles_do(registered, tmp_path):
    registered("photos", "tiles_beside")
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.json").write_text('{"iteration": 1}\n{"iteration": 2}\n')
    for name, content in (("results", "[1]"), ("list", "{}"), ("odd", '{"images": 5}')):
        (out / f"{name}.json").write_text(content)
    slice_datasets(["tiles_beside"], str(out), **CUT)
    assert (out / "tiles_beside.json").is_file()


def test_what_cannot_be_cut_is_refused_and_leaves_nothing(registered, tmp_path):
    json_file = Path(registered("photos", "tiles_bad"))
    out = tmp_path / "out"
    for change, words in [
        ({"side": 0}, "--size"),
        ({"overlap": 1.0}, "--overlap"),
        ({"min_area": 0}, "--min-area"),
    ]:
        with pytest.raises(InputError, match=words):
            slice_datasets(["tiles_bad"], str(out), **CUT | change)
    with pytest.raises(InputError, match="no dataset is registered as 'nothing'"):
        slice_datasets(["nothing"], str(out), **CUT)
    good = json_file.read_text()
    coco = json.loads(good)
    coco["images"][0]["width"] += 1
    coco["annotations"] = [each for each in coco["annotations"] if "counts" not in str(each)]
    json_file.write_text(json.dumps(coco))
    with pytest.raises(InputError, match=r"photo\.png has 190x150 px, .* says 191x150"):
        slice_datasets(["tiles_bad"], str(out), **CUT)
    json_file.write_text(good.replace('"category_id": 3', '"category_id": 9'))
    with pytest.raises(InputError, match=r"cannot be cut: .*category"):
        slice_datasets(["tiles_bad"], str(out), **CUT)
    assert not [path for path in out.rglob("*") if path.is_file()]


def test_windows_are_sahis():
    rng = np.random.default_rng(0)
    for _ in range(200):
        size, side = rng.integers(1, 300, 2).tolist(), int(rng.integers(1, 100))
        overlap = float(rng.choice([0, 0.2, 0.5, 0.9]))
        ratios = {"overlap_height_ratio": overlap, "overlap_width_ratio": overlap}
        theirs = get_slice_bboxes(*size, side, side, False, **ratios)
        assert windows(tuple(size), side, overlap) == list(dict.fromkeys(map(tuple, theirs)))


def test_a_part_is_encoded_as_the_whole_is():
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = rng.integers(1, 30, 2)
        h, w = rng.integers(1, height + 1), rng.integers(1, width + 1)
        top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        part = rng.random((h, w)) < rng.choice([0, 0.3, 0.7, 1])
        whole = np.zeros((height, width), np.uint8, order="F")
        whole[top : top + h, left : left + w] = part
        rle = encode_part(part, left, top, (height, width))
        assert rle == as_rle(mask_util.encode(whole))
        y, x = np.nonzero(whole)
        box = (x.min(), y.min(), x.max() + 1, y.max() + 1) if len(x) else (0, 0, 0, 0)
        assert box_of(rle) == box
        masks = RLEMasks([rle, rle], (int(height), int(width)))
        assert (np.asarray(masks) == whole).all() and (masks[1].numpy() == whole).all()
        assert len(masks[[True, False]]) == 1
        double = masks.resized((2 * height, 2 * width))
        grown = whole.repeat(2, axis=0).repeat(2, axis=1)
        assert (np.asarray(double)[0] != grown).mean() < 0.35
