"""The training loader: one stream of samples, dealt out to the micro-batches of all processes.

A step of training consists of `world size x SOLVER.ACCUMULATE` micro-batches. Detectron2 deals its
endless stream of samples out to processes; here it is dealt to micro-batches, so that two processes
and one process that accumulates over two see the same micro-batches. The augmentation of a sample
depends on the seed and its position in the stream alone, whatever the processes, loader workers or
aspect ratios.
"""

from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    MapDataset,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from ..seeding import Purpose, seed_all
from .large_scale_jitter import build_train_mapper
from .readable import ReadableMapper, readable_records


class StreamSampler(Sampler):
    """The samples of this process's micro-batches, as (position in the stream, index)."""

    def __init__(self, sampler: Sampler, slots: range, num_slots: int) -> None:
        """
        Args:
            sampler: one of Detectron2's training samplers.
            slots: the micro-batches of a step that this process computes.
            num_slots: the micro-batches of a step, of all processes.
        """
        self.sampler = sampler
        self.slots = slots
        self.num_slots = num_slots

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # Detectron2's own __iter__ is this stream, strided by rank and world size.
        for position, index in enumerate(self.sampler._infinite_indices()):
            if position % self.num_slots in self.slots:
                yield position, index


class SeededDataset(Dataset):
    """A mapped dataset whose samples get their random state from their position in the stream."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, where: tuple[int, int]) -> tuple[int, dict]:
        position, index = where
        seed_all(self.seed, Purpose.SAMPLE, position)
        return position, self.dataset[index]


class MicroBatches:
    """An endless iterable of micro-batches: lists of mapped dataset dicts, slot after slot."""

    def __init__(
        self,
        loader: DataLoader,
        *,
        batch_size: int,
        slots: range,
        num_slots: int,
        aspect_ratio_grouping: bool,
    ) -> None:
        """
        Args:
            loader: of (position, sample), in the order of the stream.
            batch_size: images of a micro-batch.
            slots: the micro-batches of a step that this process computes.
            num_slots: the micro-batches of a step, of all processes.
            aspect_ratio_grouping: put only wide, or only other images into a micro-batch, for less
                padding (as Detectron2's `AspectRatioGroupedDataset`).
        """
        self.loader = loader
        self.batch_size = batch_size
        self.slots = slots
        self.num_slots = num_slots
        self.aspect_ratio_grouping = aspect_ratio_grouping

    def __iter__(self) -> Iterator[list[dict]]:
        stream = iter(self.loader)
        filling = defaultdict(list)
        whole = {slot: deque() for slot in self.slots}
        while True:
            for slot in self.slots:
                while not whole[slot]:
                    position, sample = next(stream)
                    target = position % self.num_slots
                    wide = self.aspect_ratio_grouping and sample["width"] > sample["height"]
                    bucket = filling[target, wide]
                    bucket.append(sample)
                    if len(bucket) == self.batch_size:
                        whole[target].append(filling.pop((target, wide)))
                yield whole[slot].popleft()


def build_train_loader(cfg: CfgNode) -> MicroBatches:
    """The loader of DATASETS.TRAIN.

    A micro-batch has `SOLVER.IMS_PER_BATCH / (world size x SOLVER.ACCUMULATE)` images.

    Args:
        cfg: a full config, SEED set.
    """
    parts = _train_parts(cfg)
    if cfg.DATALOADER.SKIP_UNREADABLE:
        records = readable_records(parts["dataset"], cfg.DATASETS.TRAIN, cfg.OUTPUT_DIR)
        parts = _train_parts(cfg, dataset=records)
    accumulate = cfg.SOLVER.ACCUMULATE
    num_slots = comm.get_world_size() * accumulate
    slots = range(comm.get_rank() * accumulate, (comm.get_rank() + 1) * accumulate)
    dataset = MapDataset(DatasetFromList(parts["dataset"], copy=False), parts["mapper"])
    loader = DataLoader(
        SeededDataset(dataset, cfg.SEED),
        batch_size=None,
        sampler=StreamSampler(parts["sampler"], slots, num_slots),
        num_workers=parts["num_workers"],
    )
    return MicroBatches(
        loader,
        batch_size=parts["total_batch_size"] // num_slots,
        slots=slots,
        num_slots=num_slots,
        aspect_ratio_grouping=parts["aspect_ratio_grouping"],
    )


def build_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """Detectron2's loader of a dataset to evaluate on."""
    parts = build_detection_test_loader.from_config(cfg, dataset_name)
    records = parts["dataset"]
    if cfg.DATALOADER.SKIP_UNREADABLE:
        records = readable_records(records, (dataset_name,), cfg.OUTPUT_DIR)
    return build_detection_test_loader(
        records, mapper=ReadableMapper(parts["mapper"]), num_workers=parts["num_workers"]
    )


def _train_parts(cfg: CfgNode, dataset: list[dict] | None = None) -> dict[str, Any]:
    # Samplers draw their seed from NumPy, and share that of rank 0.
    seed_all(cfg.SEED, Purpose.ORDER)
    mapper = ReadableMapper(build_train_mapper(cfg))
    return build_detection_train_loader.from_config(cfg, mapper=mapper, dataset=dataset)
