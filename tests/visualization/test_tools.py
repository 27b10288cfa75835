"""tools/visualize_data.py and tools/visualize_results.py."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BitMasks, Boxes, Instances
from PIL import Image

from rope_vit_det.errors import InputError
from rope_vit_det.evaluation.matching import ImageMatches
from rope_vit_det.visualization import mistakes, samples
from rope_vit_det.visualization import worst_images as results
from rope_vit_det.visualization.colours import class_colours, class_metadata

CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"


def test_the_worst_images_come_first_each_in_a_picture(known_results, tmp_path, capsys):
    truth = {"val_json": str(known_results.json_file), "val_images": str(known_results.images)}
    results.run(str(known_results.results_file), str(tmp_path), number=3, **truth)
    counts = known_results.counts
    f1 = {i: 2 * t / (2 * t + f + m) for i, (t, f, m) in counts.items()}
    worst = sorted(counts, key=lambda i: (f1[i], -sum(counts[i][1:])))[:3]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"{rank:03d}_{i - 1:06d}.png" for rank, i in enumerate(worst, start=1)]
    (tmp_path / "mine.png").touch()
    results.run(str(known_results.results_file), str(tmp_path), number=3, **truth)  # the same again
    with pytest.raises(InputError, match=f"holds pictures of an earlier run .{names[2]}"):
        results.run(str(known_results.results_file), str(tmp_path), number=2, **truth)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "mine.png"]
    found, false, missed = (sum(each) for each in zip(*counts.values(), strict=True))
    told = capsys.readouterr().out
    assert f"{found} objects found, {missed} missed, {false} false detections" in told


def test_colours_say_what_is_found_false_and_missed(known_results):
    image = np.full((100, 640, 3), 128, np.uint8)
    entry = {"category_id": 1, "score": 0.9}
    places = {"found": 50, "false": 250, "missed": 450}
    boxes = {kind: [{**entry, "bbox": [x, 30, 100, 50]}] for kind, x in places.items()}
    matches = ImageMatches({"file_name": "a.jpg"}, **boxes)
    drawn = mistakes.draw_mistakes(image, matches, {1: "disc"}, masks=False)
    assert drawn.shape[0] > 100 and drawn.shape[1] == 640  # the line of counts
    colours = {"found": mistakes.FOUND, "false": mistakes.FALSE, "missed": mistakes.MISSED}
    for kind, x in places.items():
        part = drawn[25:85, x - 5 : x + 105].reshape(-1, 3).astype(int)
        distance = {k: np.abs(part - c).max(axis=1).min() for k, c in colours.items()}
        assert distance[kind] < 90 and min(distance, key=distance.get) == kind


@pytest.mark.parametrize(("number", "is_named"), [(25, True), (26, False)])
def test_names_do_not_hide_a_crowd(number, is_named):
    image = np.full((200, 300, 3), 128, np.uint8)
    entries = [{"category_id": 1, "bbox": [10 * i, 60, 8, 8]} for i in range(number)]
    matches = ImageMatches({"file_name": "a.jpg"}, missed=entries, found=entries)
    one, other = (
        mistakes.draw_mistakes(image, matches, {1: name}, masks=False) for name in ("disc", "tree")
    )
    assert np.array_equal(one, other) != is_named


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "name the ground truth"),
        ({"dataset": ""}, "name the ground truth"),
        ({"dataset": "nothing"}, "no dataset is registered as 'nothing'"),
        ({"val_json": "gone.json", "val_images": "."}, r"gone\.json: No such file"),
        ({"dataset": "x", "val_json": "gone.json"}, "one of them"),
        ({"dataset": "x", "number": 0}, "--number is 1 or more"),
    ],
)
def test_bad_input_of_visualize_results(known_results, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        results.run(str(known_results.results_file), str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def arguments(dataset, output, *opts):
    return argparse.Namespace(
        config_file=[str(CONFIG)],
        output_dir=str(output),
        number=2,
        train_json=str(dataset / "annotations" / "instances_train.json"),
        train_images=str(dataset / "train"),
        opts=["INPUT.MIN_SIZE_TRAIN", "(64,)", "OUTPUT_DIR", str(output / "run"), *opts],
    )


def test_data_are_drawn_as_the_loader_feeds_them(small_demo_dataset, tmp_path):
    lsj = ("INPUT.LSJ.ENABLED", "True", "INPUT.LSJ.IMAGE_SIZE", "96")
    samples.run(arguments(small_demo_dataset, tmp_path, *lsj))
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 2 and (tmp_path / "sheet.jpg").is_file()
    # The size after the augmentation, not that of the file.
    assert all(Image.open(path).size == (96, 96) for path in pictures)
    (tmp_path / "002_of_an_earlier_run.png").touch()
    with pytest.raises(InputError, match=r"earlier run .*002_of"):
        samples.run(arguments(small_demo_dataset, tmp_path, *lsj))


def test_a_sample_is_drawn_in_the_right_channel_order_with_its_mask(detector_cfg):
    mask = torch.zeros(1, 80, 80, dtype=torch.bool)
    mask[0, 40:70, 40:70] = True
    target = Instances((80, 80))
    target.gt_boxes, target.gt_classes = (
        Boxes(torch.tensor([[40.0, 40, 70, 70]])),
        torch.tensor([1]),
    )
    target.gt_masks = BitMasks(mask)
    image = torch.zeros(3, 80, 80, dtype=torch.uint8)
    image[0] = 200
    metadata = class_metadata(["disc", "crate"])
    colour = np.array(class_colours(2)[1])
    for order, shown in (("RGB", (200, 0, 0)), ("BGR", (0, 0, 200))):
        detector_cfg.INPUT.FORMAT = order
        drawn = samples.draw_sample({"image": image, "instances": target}, detector_cfg, metadata)
        np.testing.assert_allclose(drawn[10, 10], shown, atol=3)
        # Half mask, half image.
        np.testing.assert_allclose(drawn[60, 60], (colour + shown) / 2, atol=12)


def test_a_dataset_of_pixel_maps_has_no_objects_to_draw(tmp_path):
    Image.new("RGB", (96, 64)).save(tmp_path / "a.jpg")
    Image.new("L", (96, 64)).save(tmp_path / "a.png")
    record = {"file_name": str(tmp_path / "a.jpg"), "sem_seg_file_name": str(tmp_path / "a.png")}
    DatasetCatalog.register("pixel_maps", lambda: [record])
    MetadataCatalog.get("pixel_maps").set(stuff_classes=["grass"], evaluator_type="sem_seg")
    args = arguments(tmp_path, tmp_path / "out", "MODEL.META_ARCHITECTURE", "SemanticSegmentor")
    args.train_json = args.train_images = None
    args.opts += ["DATASETS.TRAIN", "('pixel_maps',)"]
    try:
        with pytest.raises(InputError, match=r"'pixel_maps' has no objects to draw.*thing_classes"):
            samples.run(args)
        MetadataCatalog.get("pixel_maps").thing_classes = ["disc"]
        with pytest.raises(InputError, match="SemanticSegmentor is fed no instances to draw"):
            samples.run(args)
    finally:
        DatasetCatalog.remove("pixel_maps")
        MetadataCatalog.remove("pixel_maps")


def test_an_empty_dataset_is_refused(small_demo_dataset, tmp_path):
    empty = tmp_path / "empty.json"
    empty.write_text('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}')
    args = arguments(small_demo_dataset, tmp_path)
    args.train_json = str(empty)
    with pytest.raises(InputError, match=r"empty\.json has faults that stop .*no images at all"):
        samples.run(args)
    assert not list(tmp_path.glob("*.png"))
