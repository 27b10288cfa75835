"""The stream of samples: dealt out as Detectron2 deals it to processes, whoever computes it."""

from itertools import islice

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.datasets import register_coco_instances
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm

from rope_vit_det import add_rope_vit_config
from rope_vit_det.data.loader import build_seeded_loader, build_train_loader
from rope_vit_det.errors import InputError


@pytest.fixture
def cfg(small_demo_dataset):
    json_file = small_demo_dataset / "annotations" / "instances_train.json"
    register_coco_instances("stream", {}, str(json_file), str(small_demo_dataset / "train"))
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    cfg.DATASETS.TRAIN = ("stream",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TRAIN = (64, 80, 96)
    cfg.SEED = 5
    cfg.SOLVER.IMS_PER_BATCH = 4
    yield cfg
    DatasetCatalog.remove("stream")
    MetadataCatalog.remove("stream")


def _take(cfg, count):
    stream = iter(build_train_loader(cfg))
    return [next(stream) for _ in range(count)]


def _same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert [x["image_id"] for x in batch] == [x["image_id"] for x in other]
        for x, y in zip(batch, other, strict=True):
            assert torch.equal(x["image"], y["image"])
            assert torch.equal(x["instances"].gt_boxes.tensor, y["instances"].gt_boxes.tensor)


def _as_rank(monkeypatch, rank, world):
    monkeypatch.setattr(comm, "get_rank", lambda: rank)
    monkeypatch.setattr(comm, "get_world_size", lambda: world)
    monkeypatch.setattr(comm, "all_gather", lambda data, group=None: [data] * world)


@pytest.mark.parametrize("grouping", [True, False])
def test_processes_and_accumulation_see_the_same_micro_batches(cfg, monkeypatch, grouping):
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    cfg.SOLVER.ACCUMULATE = 2
    alone = _take(cfg, 12)
    assert all(len(batch) == 2 for batch in alone)
    cfg.SOLVER.ACCUMULATE = 1
    for rank in (0, 1):
        _as_rank(monkeypatch, rank, 2)
        _same(_take(cfg, 6), alone[rank::2])


@pytest.mark.parametrize("grouping", [True, False])
def test_the_order_is_that_of_detectron2s_sampler_and_grouping(cfg, grouping):
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    loader = build_train_loader(cfg)
    stream = iter(loader)
    ours = [[x["image_id"] for x in next(stream)] for _ in range(6)]

    dataset = DatasetCatalog.get("stream")
    sampler = TrainingSampler(len(dataset), seed=loader.batch_sampler.sampler._seed)
    samples = (dataset[i] for i in sampler)
    if grouping:
        grouped = iter(AspectRatioGroupedDataset(samples, 4))
    else:
        grouped = ([next(samples) for _ in range(4)] for _ in range(6))
    assert ours == [[x["image_id"] for x in next(grouped)] for _ in range(6)]


@pytest.mark.parametrize("images", [0, 1, 3])
def test_a_batch_that_the_processes_cannot_share_is_refused_as_by_detectron2(monkeypatch, images):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr("detectron2.data.build.get_world_size", lambda: 2)
    records = [{"file_name": "a.jpg", "annotations": []}]
    given = {"mapper": dict, "total_batch_size": images, "sampler": TrainingSampler(1, seed=0)}
    with pytest.raises(AssertionError, match="divisible"):
        build_detection_train_loader(records, **given)
    with pytest.raises(InputError, match=f"total_batch_size .* {images}, .* divide by 2"):
        build_seeded_loader(records, **given, seed=0)


@pytest.mark.parametrize("start", [0, 3])
def test_loader_workers_change_nothing_and_a_loader_starts_anywhere(cfg, start):
    alone = _take(cfg, 6)[start:]
    cfg.DATALOADER.NUM_WORKERS = 2
    loader = build_train_loader(cfg)
    loader.batch_sampler.start = start
    stream = iter(loader)
    _same([next(stream) for _ in alone], alone)


def test_a_mapper_that_gives_nothing_is_asked_for_another_sample(cfg):
    loader = build_train_loader(cfg)
    plain = loader.dataset.mapper
    loader.dataset.mapper = lambda record: None if record["image_id"] < 5 else plain(record)
    taken = [list(islice(loader, 4)) for _ in range(2)]
    _same(*taken)
    assert {x["image_id"] for batch in taken[0] for x in batch} == {5, 6, 7, 8}


def test_the_mapper_may_give_nothing_for_a_record_without_a_file(caplog):
    records = [{"index": index, "annotations": []} for index in range(3)]

    def mapper(record):
        return record if record["index"] != 1 else None

    loader = build_seeded_loader(records, mapper=mapper, total_batch_size=2, seed=0)
    seen = {sample["index"] for batch in islice(loader, 6) for sample in batch}
    assert seen == {0, 2}
    assert "no sample for record 1" in caplog.text


def test_another_seed_gives_another_order_and_other_sizes(cfg):
    first = _take(cfg, 4)
    cfg.SEED = 6
    second = _take(cfg, 4)
    ids = [[x["image_id"] for batch in batches for x in batch] for batches in (first, second)]
    assert ids[0] != ids[1]
    sizes = {tuple(x["image"].shape) for batch in first for x in batch}
    assert len(sizes) > 3  # augmentation is not the same for all


def test_other_peoples_dicts_are_cleaned():
    def record(*objects):
        boxes = {"bbox": [1, 2, 30, 40], "bbox_mode": 0, "category_id": 0}
        objects = [{**boxes, **each} for each in objects]
        return {"file_name": "a.jpg", "image_id": 1, "height": 60.0, "annotations": objects}

    def mapper(record):
        return record

    square = [1.0, 2.0, 30.0, 2.0, 30.0, 40.0, 1.0, 40.0]
    records = [
        record({"segmentation": [[5, 5]], "keypoints": []}, {"segmentation": [[5, 5], square]}),
        record({"segmentation": [square], "keypoints": [3, 4, 2]}),
    ]
    for with_masks, count in ((True, 1), (False, 2)):
        mapper.use_instance_mask = with_masks
        loader = build_seeded_loader(records, mapper=mapper, total_batch_size=2, seed=0)
        for sample in next(iter(loader)):
            assert repr(sample["height"]) == "60"
            given = sample["annotations"]
            if len(given) == count:  # of the first, with an object that has no mask
                assert given[-1]["segmentation"] == [square]
                assert all(each["keypoints"] in ([0, 0, 0], [3, 4, 2]) for each in given)
