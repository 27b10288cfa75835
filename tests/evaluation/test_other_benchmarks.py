"""Pascal VOC, Cityscapes and LVIS: zoo config, overlay and evaluation on folders laid out alike."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH = 96, 160
BOX = (20, 30, 80, 70)  # left, top, right, bottom of the one object of every image
SMALL = (
    *("MODEL.ROPE_VIT.NAME", "rope_vit_reg4_demo16", "MODEL.WEIGHTS", ""),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "1", "TEST.EVAL_PERIOD", "0"),
    *("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96"),
    *("INPUT.CROP.ENABLED", "False", "INPUT.LSJ.IMAGE_SIZE", "96"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "MODEL.RPN.POST_NMS_TOPK_TEST", "10"),
    *("DATALOADER.NUM_WORKERS", "0", "SOLVER.REFERENCE_WORLD_SIZE", "0", "OUTPUT_DIR", "out"),
)


@pytest.fixture
def run(tmp_path):
    """Trains for a step and evaluates on the datasets in tmp_path; returns what it printed."""

    def run(*arguments, expected=0):
        overlay = ROOT / "configs" / "backbones" / "rope_vit_reg4_b14.yaml"
        files = [part for name in arguments[0] for part in ("--config-file", name)]
        command = [ROOT / "tools" / "train_net.py", *files, "--config-file", overlay, *SMALL]
        python_path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        answer = subprocess.run(
            [sys.executable, "-W", "ignore", *map(str, command), *arguments[1:]],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"DETECTRON2_DATASETS": str(tmp_path), "PYTHONPATH": python_path},
        )
        assert answer.returncode == expected, answer.stdout[-2000:] + answer.stderr[-3000:]
        return answer.stdout if expected == 0 else answer.stderr.strip().splitlines()[-1]

    return run


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    cv2.imwrite(str(path), pixels)


def result_of(log: str, task: str) -> list[str]:
    """The last line of numbers that Detectron2 prints of a task."""
    return re.findall(rf"copypaste: Task: {task}\n.*copypaste: .*\n.*copypaste: (.*)\n", log)[-1:]


@pytest.mark.slow
def test_pascal_voc(run, tmp_path):
    for year, split in ((2007, "trainval"), (2007, "test"), (2012, "trainval")):
        root = tmp_path / f"VOC{year}"
        names = [f"{split}_{number}" for number in range(2)]
        for name in names:
            image(root / "JPEGImages" / f"{name}.jpg")
            tree = ElementTree.fromstring(
                f"<annotation><size><width>{WIDTH}</width><height>{HEIGHT}</height></size><object>"
                "<name>dog</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult>"
                "<bndbox>" + "".join(
                    f"<{tag}>{value}</{tag}>"
                    for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), BOX, strict=True)
                ) + "</bndbox></object></annotation>"
            )  # fmt: skip
            (root / "Annotations").mkdir(exist_ok=True)
            ElementTree.ElementTree(tree).write(root / "Annotations" / f"{name}.xml")
        lists = root / "ImageSets" / "Main"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text("\n".join(names))
    log = run(["PascalVOC-Detection/faster_rcnn_R_50_FPN.yaml"])
    assert "AP,AP50,AP75" in log and result_of(log, "bbox")


@pytest.fixture
def cityscapes(tmp_path):
    pytest.importorskip("cityscapesscripts", reason="pip install cityscapesscripts")
    left, top, right, bottom = BOX
    polygon = [[left, top], [right, top], [right, bottom], [left, bottom]]
    for split in ("train", "val"):
        for number in range(2):
            name = f"town_{number:06}_000019"
            image(tmp_path / f"cityscapes/leftImg8bit/{split}/town/{name}_leftImg8bit.png")
            truth = tmp_path / f"cityscapes/gtFine/{split}/town"
            truth.mkdir(parents=True, exist_ok=True)
            objects = [{"label": "car", "polygon": polygon}]
            (truth / f"{name}_gtFine_polygons.json").write_text(
                json.dumps({"imgHeight": HEIGHT, "imgWidth": WIDTH, "objects": objects})
            )
            # road and car, by id, by training id, and by instance
            for kind, road, car in (
                ("labelIds", 7, 26), ("labelTrainIds", 0, 13), ("instanceIds", 7, 26000)
            ):  # fmt: skip
                labels = np.full((HEIGHT, WIDTH), road, np.uint16 if car > 255 else np.uint8)
                labels[top:bottom, left:right] = car
                cv2.imwrite(str(truth / f"{name}_gtFine_{kind}.png"), labels)


is_new = np.lib.NumpyVersion(np.__version__) >= "2.3.0"
old_numpy = pytest.mark.skipif(
    is_new, reason="cityscapesScripts 2.3.0 does not run on it: pip install 'numpy<2.3'"
)


@pytest.mark.skipif(not is_new, reason="of NumPy 2.3 or newer")
@pytest.mark.slow
def test_cityscapes_is_refused_where_its_scripts_would_fail(run, cityscapes):
    line = run(["Cityscapes/mask_rcnn_R_50_FPN.yaml"], expected=2)
    assert "pip install 'numpy<2.3'" in line


@old_numpy
@pytest.mark.slow
def test_cityscapes_instances(run, cityscapes):
    log = run(["Cityscapes/mask_rcnn_R_50_FPN.yaml"])
    assert result_of(log, "segm")


@old_numpy
@pytest.mark.slow
def test_cityscapes_semantic_segmentation(run, cityscapes):
    log = run(
        ["Misc/semantic_R_50_FPN_1x.yaml"],
        *("DATASETS.TRAIN", "('cityscapes_fine_sem_seg_train',)"),
        *("DATASETS.TEST", "('cityscapes_fine_sem_seg_val',)"),
        *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "19"),
    )
    assert result_of(log, "sem_seg")


@pytest.mark.slow
def test_lvis(run, tmp_path):
    pytest.importorskip("lvis", reason="Detectron2 reads LVIS with it: pip install --no-deps lvis")
    left, top, right, bottom = BOX
    polygon = [left, top, right, top, right, bottom, left, bottom]
    categories = [
        {"id": i, "name": f"c{i}", "frequency": "rcf"[i % 3], "image_count": 1, "synset": "x"}
        for i in range(1, 1204)
    ]
    for split in ("train", "val"):
        images, annotations = [], []
        for i in range(1, 3):
            image(tmp_path / f"coco/{split}2017/{i:012}.jpg")
            images.append(
                {"id": i, "height": HEIGHT, "width": WIDTH, "neg_category_ids": [4],
                 "not_exhaustive_category_ids": [], "coco_url": f"http://x/{split}2017/{i:012}.jpg"}
            )  # fmt: skip
            box = [left, top, right - left, bottom - top]
            annotations.append(
                {"id": i, "image_id": i, "category_id": 1 + i, "bbox": box,
                 "area": box[2] * box[3], "segmentation": [polygon]}
            )  # fmt: skip
        (tmp_path / "lvis").mkdir(exist_ok=True)
        content = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / "lvis" / f"lvis_v1_{split}.json").write_text(json.dumps(content))
    recipe = "LVISv1-InstanceSegmentation/mask_rcnn_rope_vit_reg4_b14_100ep_lsj.yaml"
    log = run([ROOT / "configs" / recipe])
    assert "AP,AP50,AP75,APs,APm,APl,APr,APc,APf" in log and result_of(log, "segm")
