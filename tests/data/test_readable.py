"""Images that cannot be read end a run by name, or are skipped, counted and listed."""

import logging

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from rope_vit_det import add_rope_vit_config
from rope_vit_det.data.loader import build_test_loader, build_train_loader
from rope_vit_det.data.readable import ReadableMapper, readable_records
from rope_vit_det.errors import InputError

SIZE = (64, 48)


@pytest.fixture
def cfg(tmp_path):
    """Six images, of which number 1 ends early and number 4 is missing."""
    records = []
    for i in range(6):
        path = tmp_path / f"{i}.jpg"
        Image.effect_noise(SIZE, 60).convert("RGB").save(path)
        box = {"bbox": [5, 5, 20, 20], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
        width, height = SIZE
        records.append(
            {"file_name": str(path), "image_id": i, "height": height, "width": width}
            | {"annotations": [box]}
        )
    whole = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "4.jpg").unlink()
    DatasetCatalog.register("partly", lambda: records)
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    cfg.DATASETS.TRAIN = ("partly",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SEED = 1
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    yield cfg
    DatasetCatalog.remove("partly")
    MetadataCatalog.remove("partly")


def test_by_default_the_image_is_named(cfg, tmp_path):
    for loader in (build_train_loader(cfg), build_test_loader(cfg, "partly")):
        with pytest.raises(InputError, match=r"[14]\.jpg cannot be read: .*SKIP_UNREADABLE"):
            for _, _batch in zip(range(9), loader, strict=False):
                pass


def test_with_the_switch_they_are_skipped_counted_and_listed(cfg, tmp_path, caplog):
    cfg.DATALOADER.SKIP_UNREADABLE = True
    with caplog.at_level(logging.WARNING):
        stream = iter(build_train_loader(cfg))
    seen = {sample["image_id"] for _ in range(12) for sample in next(stream)}
    assert seen == {0, 2, 3, 5}
    assert "Skipping 2 of 6 images of partly" in caplog.text
    first, second = (tmp_path / "out" / "skipped_images_partly.txt").read_text().splitlines()
    assert first.startswith(f"{tmp_path / '1.jpg'}: ") and "truncated" in first
    assert second.startswith(f"{tmp_path / '4.jpg'}: ")
    tested = [x["image_id"] for batch in build_test_loader(cfg, "partly") for x in batch]
    assert tested == [0, 2, 3, 5]


def test_a_dataset_without_a_readable_image_is_refused(cfg, tmp_path):
    cfg.DATALOADER.SKIP_UNREADABLE = True
    for path in tmp_path.glob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="not one image of partly"):
        build_train_loader(cfg)


def test_other_errors_of_a_mapper_stay_what_they_are(cfg):
    del DatasetCatalog.get("partly")[0]["annotations"][0]["bbox_mode"]
    with pytest.raises(KeyError, match="bbox_mode"):
        for _, _batch in zip(range(20), build_train_loader(cfg), strict=False):
            pass


@pytest.mark.parametrize(
    "record", [{"index": 3}, {"file_name": None}, {"file_name": "s3://b/3.jpg"}]
)
def test_an_image_that_is_no_file_here_is_its_mappers_to_judge(record, tmp_path):
    def mapper(record):
        raise ValueError("tile 3 of the archive is broken")

    with pytest.raises(ValueError, match=r"^tile 3 of the archive is broken$"):
        ReadableMapper(mapper)(record)
    assert readable_records([record], ("elsewhere",), str(tmp_path)) == [record]
    assert not list(tmp_path.iterdir())
