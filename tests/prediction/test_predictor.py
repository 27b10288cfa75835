"""The predictor against Detectron2's own, whatever it is given."""

import io
import shutil

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image

import rope_vit_det
from rope_vit_det.data.classes import to_coco_results
from rope_vit_det.errors import InputError
from rope_vit_det.evaluation.slicing import find_in_slices
from rope_vit_det.layers.lora import merge_state
from rope_vit_det.utils.image_files import read_rgb
from rope_vit_det.visualization.predictions import draw_picture
from rope_vit_det.weights.convert import convert

THRESHOLD = 0.2


@pytest.fixture(scope="module")
def predictor(trained_folder):
    return rope_vit_det.Predictor(trained_folder, threshold=THRESHOLD, device="cpu")


@pytest.fixture(scope="module")
def photos(small_demo_dataset):
    return sorted((small_demo_dataset / "val").glob("*.jpg"))


def assert_same(ours: Instances, theirs: Instances):
    assert ours.image_size == theirs.image_size and len(ours) == len(theirs)
    torch.testing.assert_close(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
    torch.testing.assert_close(ours.scores, theirs.scores)
    assert torch.equal(ours.pred_classes, theirs.pred_classes)
    # Rounding, which the lines above allow, takes a probability over the threshold now and then.
    assert (ours.pred_masks != theirs.pred_masks).float().mean() < 1e-5


def test_results_equal_detectron2s_whatever_the_form_of_the_image(predictor, photos):
    oracle = DefaultPredictor(predictor.cfg)
    path = photos[0]
    bgr = cv2.imread(str(path))
    theirs = oracle(bgr)["instances"]
    assert len(theirs) > 0
    for image in (path, Image.open(path), np.ascontiguousarray(bgr[:, :, ::-1])):
        assert_same(predictor(image), theirs)
    assert_same(predictor(bgr, channel_order="BGR"), theirs)


def test_a_folder_with_adapters_is_the_merged_detector(trained_folder, photos, tmp_path):
    adapted, merged = tmp_path / "adapted", tmp_path / "merged"
    for folder in (adapted, merged):
        shutil.copytree(trained_folder, folder)
    base = str(trained_folder / "model_final.pth")
    cfg = rope_vit_det.Predictor(trained_folder, device="cpu").cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROPE_VIT.LORA.RANK = 4
    (adapted / "config.yaml").write_text(cfg.dump())
    model = build_model(cfg)
    DetectionCheckpointer(model).load(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(std=0.05)
    checkpoint, state = torch.load(base, weights_only=True), model.state_dict()
    torch.save(checkpoint | {"model": state}, adapted / "model_final.pth")
    torch.save(checkpoint | {"model": merge_state(state)}, merged / "model_final.pth")
    convert(adapted / "model_final.pth", tmp_path / "adapters.pth", base=base)
    oracle = DefaultPredictor(rope_vit_det.Predictor(merged, threshold=THRESHOLD).cfg)
    theirs = oracle(cv2.imread(str(photos[0])))["instances"]
    assert len(theirs) > 0
    for weights in (None, tmp_path / "adapters.pth"):
        ours = rope_vit_det.Predictor(adapted, weights, threshold=THRESHOLD, device="cpu")
        assert_same(ours(photos[0]), theirs)


@pytest.mark.parametrize(
    ("mode", "orientation"), [("RGB", 6), ("RGBA", 3), ("LA", 1), ("P", 8), ("CMYK", 5), ("1", 2)]
)
def test_path_image_open_file_and_array_get_one_answer(
    predictor, photos, tmp_path, mode, orientation
):
    kind = {"CMYK": "jpg", "RGBA": "tiff"}.get(mode, "png")
    path = tmp_path / f"photo.{kind}"
    exif = Image.Exif()
    exif[274] = orientation
    Image.open(photos[0]).convert(mode).save(path, exif=exif)
    want = predictor(path)
    sides = Image.open(photos[0]).size
    assert want.image_size == (sides if orientation > 4 else sides[::-1])
    lazy, loaded = Image.open(path), Image.open(path)
    loaded.load()
    before = loaded.tobytes()
    with path.open("rb") as file:
        for image in (lazy, loaded, file, io.BytesIO(path.read_bytes()), read_rgb(path)):
            assert_same(predictor(image), want)
    assert loaded.mode == mode and loaded.tobytes() == before  # the user's own stays


def test_what_has_no_answer_has_a_reason(predictor, photos, tmp_path):
    deep, real = tmp_path / "deep.png", tmp_path / "real.tiff"
    Image.fromarray(np.full((40, 50), 40000, np.uint16)).save(deep)
    Image.fromarray(np.full((40, 50), 0.5, np.float32)).save(real)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(photos[0].read_bytes()[:1500])
    closed = Image.open(photos[0])
    closed.close()
    for path in (deep, real, cut):
        for image in (path, Image.open(path), path.open("rb"), io.BytesIO(path.read_bytes())):
            with pytest.raises(InputError, match=r"more than 8 bits|truncated") as error:
                predictor(image)
            if not isinstance(image, io.BytesIO):
                assert path.name in str(error.value)
    text = (tmp_path / "words.txt").open("w+")
    for image, words in [
        (closed, "photo|jpg"),
        (text, r"words\.txt"),
        (io.StringIO("text"), "image 1"),
        (np.zeros((40, 50, 3), np.uint16), "uint16"),
        (np.zeros((40, 50), np.uint8), r"\(40, 50\)"),
        (np.zeros((40, 50, 4), np.uint8), r"\(40, 50, 4\)"),
        (torch.zeros(3, 40, 50), "Tensor"),
        (None, "NoneType"),
        (np.zeros((0, 5, 3), np.uint8), "5x0 px"),
        (np.zeros((5, 0, 3), np.uint8), "0x5 px"),
        (Image.new("RGB", (0, 5)), "0x5 px"),
        (np.zeros((3000, 1, 3), np.uint8), "1x3000 px: nothing is left.*128 px"),
        (Image.new("RGB", (3000, 1)), "3000x1 px: nothing is left"),
    ]:
        with pytest.raises(InputError, match=words) as error:
            predictor(image)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="image 2 of those given"):
        predictor.predict([np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), np.uint8)])


def test_a_result_does_not_depend_on_the_rest_of_the_batch(predictor, photos):
    together = predictor.predict(photos)
    ahead = [predictor.prepare(read_rgb(path), str(path)) for path in photos]
    assert all(each["image"].dtype == torch.uint8 for each in ahead)
    for found, other in zip(predictor.predict(ahead), together, strict=True):
        assert_same(found, other)
    image = Image.open(photos[0])
    assert_same(*predictor.predict([image, image]))
    for path, found in zip(photos, together, strict=True):
        alone = predictor(path)
        assert len(found) == len(alone)
        torch.testing.assert_close(found.scores, alone.scores, atol=1e-4, rtol=0)


def test_tta_and_bf16_find_something(trained_folder, photos):
    one = rope_vit_det.Predictor(
        trained_folder, threshold=THRESHOLD, device="cpu", tta=True, bf16=True
    )
    found = one(photos[0])
    assert len(found) > 0 and found.scores.min() >= THRESHOLD
    assert found.pred_masks.shape[1:] == cv2.imread(str(photos[0])).shape[:2]


def test_checkpoints_that_do_not_fit_are_refused(trained_folder, tmp_path):
    checkpoint = torch.load(trained_folder / "model_final.pth")
    nameless = tmp_path / "nameless.pth"
    torch.save({"model": checkpoint["model"]}, nameless)
    with pytest.raises(InputError, match=r"nameless\.pth does not hold the names.*--categories"):
        rope_vit_det.Predictor(trained_folder, nameless, device="cpu")
    categories = tmp_path / "train.json"
    categories.write_text('{"categories": [{"id": 7, "name": "a"}, {"id": 3, "name": "b"}]}')
    with pytest.raises(InputError, match=r"train\.json has 2 categories, .*NUM_CLASSES is 4"):
        rope_vit_det.Predictor(trained_folder, nameless, device="cpu", categories=categories)
    headless = tmp_path / "headless.pth"
    state = {k: v for k, v in checkpoint["model"].items() if "box_predictor" not in k}
    torch.save({**checkpoint, "model": state}, headless)
    with pytest.raises(InputError, match=r"headless\.pth.* 4 tensors .*box_predictor"):
        rope_vit_det.Predictor(trained_folder, headless, device="cpu")
    with pytest.raises(InputError, match=r"has no config\.yaml"):
        rope_vit_det.Predictor(tmp_path)
    lazy = tmp_path / "lazy.yaml"
    lazy.write_text("model:\n  _target_: torch.nn.Linear\n")
    with pytest.raises(InputError, match=r"lazy\.yaml is a LazyConfig"):
        rope_vit_det.Predictor(lazy, nameless)


def test_supervision_gets_boxes_masks_and_class_names(predictor, photos):
    pytest.importorskip("supervision")
    found = predictor(photos[0])
    detections = predictor.to_supervision(found)
    np.testing.assert_array_equal(detections.xyxy, found.pred_boxes.tensor.numpy())
    np.testing.assert_array_equal(detections.mask, found.pred_masks.numpy())
    names = [predictor.classes["names"][i] for i in found.pred_classes]
    assert list(detections.data["class_name"]) == names


class SquareDetector:
    """Finds the bounding box of what is red, green or blue; has what slicing uses."""

    threshold = 0.5
    device = torch.device("cpu")

    def __init__(self, cfg):
        self.cfg = cfg
        self.classes = {"names": ["red", "green", "blue"], "ids": [1, 2, 3]}
        self.sizes = []

    def __call__(self, image):
        self.sizes.append(image.shape[:2])
        masks = [image[:, :, c] > 200 for c in range(3)]
        present = [c for c in range(3) if masks[c].any()]
        found = Instances(image.shape[:2])
        boxes = [cv2.boundingRect(masks[c].astype(np.uint8)) for c in present]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in boxes]
        found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        found.scores = torch.full((len(present),), 0.9)
        found.pred_classes = torch.tensor(present, dtype=torch.int64)
        masks = [torch.from_numpy(masks[c]) for c in present]
        empty = torch.zeros(0, *image.shape[:2], dtype=torch.bool)
        found.pred_masks = torch.stack(masks) if masks else empty
        return found


def test_slices_are_merged_in_the_coordinates_of_the_whole_image(predictor):
    image = np.zeros((220, 300, 3), np.uint8)
    image[150:190, 10:30, 0] = 255
    image[40:60, 90:150, 2] = 255  # across the border of two slices
    detector = SquareDetector(predictor.cfg)
    found = find_in_slices(image, detector, side=128, overlap=0.2)
    order = found.pred_classes.argsort()
    assert found.pred_classes[order].tolist() == [0, 2]
    boxes = found.pred_boxes.tensor[order].tolist()
    assert boxes == [[10, 150, 30, 190], [90, 40, 150, 60]]
    assert (128, 128) in detector.sizes and (220, 300) in detector.sizes
    for mask, channel in zip(found.pred_masks[order], (0, 2), strict=True):
        wanted = torch.from_numpy(image[:, :, channel] > 0)
        assert (mask & wanted).sum() / (mask | wanted).sum() > 0.9
    nothing = find_in_slices(np.zeros_like(image), detector, side=128, overlap=0.2)
    assert len(nothing) == 0 and nothing.pred_masks.shape == (0, 220, 300)


class DotDetector(SquareDetector):
    """Masks of one pixel, and of none; keypoints in the corners."""

    def __call__(self, image):
        found = super().__call__(image)
        corners = found.pred_boxes.tensor.reshape(-1, 2, 2)
        found.pred_keypoints = torch.cat((corners, torch.ones(len(found), 2, 1)), dim=2)
        return found


def test_small_masks_and_keypoints_survive_slicing(predictor):
    image = np.zeros((500, 400, 3), np.uint8)
    image[450, 300, 0] = 255
    image[100:102, 90:93, 1] = 255
    found = find_in_slices(image, DotDetector(predictor.cfg), side=128, overlap=0.2)
    order = found.pred_classes.argsort()
    boxes = found.pred_boxes.tensor[order]
    assert boxes.tolist() == [[300, 450, 301, 451], [90, 100, 93, 102]]
    assert [int(mask.sum()) for mask in found.pred_masks[order]] == [1, 6]
    assert torch.equal(found.pred_keypoints[order][:, :, :2].reshape(-1, 4), boxes)


def test_a_large_image_is_looked_at_whole_but_reduced(predictor):
    image = np.zeros((3000, 2000, 3), np.uint8)
    image[300:2700, 500:1500, 2] = 255
    detector = SquareDetector(predictor.cfg)
    found = find_in_slices(image, detector, side=1000, overlap=0.2)
    assert max(map(max, detector.sizes)) == 1333
    largest = int(found.pred_boxes.area().argmax())
    box = found.pred_boxes.tensor[largest].tolist()
    np.testing.assert_allclose(box, [500, 300, 1500, 2700], atol=2)
    assert (found.pred_masks[largest].numpy() != (image[:, :, 2] > 0)).mean() < 1e-3
    results = to_coco_results(found, 5, [1, 2, 3])
    for result, mask in zip(results, found.pred_masks, strict=True):
        assert result["category_id"] == 3
        assert mask_util.area(result["segmentation"]) == mask.sum()
    picture = draw_picture(image, found, predictor.metadata)
    assert picture.shape == (1600, 1067, 3)


def test_nothing_is_compiled_unless_it_is_asked_for(trained_folder, tmp_path):
    """A detector of a recipe, whose first images would wait for the compiler on a GPU."""
    folder = shutil.copytree(trained_folder, tmp_path / "compiles")
    file = folder / "config.yaml"
    text = file.read_text()
    assert "COMPILE: false" in text
    file.write_text(text.replace("COMPILE: false", "COMPILE: true"))
    opts = ("MODEL.ROPE_VIT.COMPILE", "True")
    for source, given, expected in ((folder, (), False), (trained_folder, opts, True)):
        predictor = rope_vit_det.Predictor(source, device="cpu", opts=given)
        assert predictor.cfg.MODEL.ROPE_VIT.COMPILE is expected
