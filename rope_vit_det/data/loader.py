"""The training loader: one stream of samples, dealt out to the micro-batches of all processes.

A step of training consists of `world size x SOLVER.ACCUMULATE` micro-batches. Detectron2 deals its
endless stream of samples out to processes; here it is dealt to micro-batches, so that two processes
and one process that accumulates over two see the same micro-batches. The augmentation of a sample
depends on the seed and its position in the stream alone, whatever the processes, loader workers or
aspect ratios. Which samples are in which micro-batch is known without reading an image, so that a
resumed run starts at its micro-batch at once.
"""

import logging
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data import transforms as T
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from ..detectron2_private import endless_indices
from ..distributed.launch import check_batch
from ..utils.seeding import Purpose, seed_all
from .coco_file import clean_records
from .large_scale_jitter import build_train_mapper
from .readable import ReadableMapper, readable_records
from .workers import ShieldedLoader

logger = logging.getLogger(__name__)

_Where = tuple[int, int]  # position in the stream, index in the dataset
_TRIES = 100


@dataclass(eq=False, kw_only=True)
class MicroBatchSampler(Sampler[list[_Where]]):
    """The samples of this process's micro-batches, one slot's after another's, without end.

    Attributes:
        sampler: one of Detectron2's training samplers.
        batch_size: images of a micro-batch.
        slots: the micro-batches of a step that this process computes.
        num_slots: the micro-batches of a step, of all processes.
        wide: for each image; puts only wide, or only other images into a micro-batch, for less
            padding (as Detectron2's `AspectRatioGroupedDataset`).
        start: micro-batches of this process to skip.
    """

    sampler: Sampler
    batch_size: int
    slots: range
    num_slots: int
    wide: Sequence[bool] | None = None
    start: int = 0

    def __iter__(self) -> Iterator[list[_Where]]:
        return islice(self._from_the_beginning(), self.start, None)

    def _from_the_beginning(self) -> Iterator[list[_Where]]:
        stream = self._own_part()
        filling = defaultdict(list)
        whole: dict[int, deque[list[_Where]]] = {slot: deque() for slot in self.slots}
        while True:
            for slot in self.slots:
                while not whole[slot]:
                    position, index = next(stream)
                    bucket = (position % self.num_slots, bool(self.wide and self.wide[index]))
                    filling[bucket].append((position, index))
                    if len(filling[bucket]) == self.batch_size:
                        whole[bucket[0]].append(filling.pop(bucket))
                yield whole[slot].popleft()

    def _own_part(self) -> Iterator[_Where]:
        stream = endless_indices(self.sampler)
        if stream is None:
            # One of the user's, that iterates over what is for this process.
            for number, index in enumerate(self.sampler):
                step, slot = divmod(number, len(self.slots))
                yield step * self.num_slots + self.slots[slot], index
            return
        # Detectron2's own __iter__ is this stream, strided by rank and world size.
        for position, index in enumerate(stream):
            if position % self.num_slots in self.slots:
                yield position, index


class SeededDataset(Dataset):
    """A mapped dataset whose samples get their random state from their position in the stream."""

    def __init__(self, dataset: Dataset, mapper: Callable[[dict], dict | None], seed: int) -> None:
        self.dataset = dataset
        self.mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # torch's Dataset does not promise it

    def __getitem__(self, where: _Where) -> dict:
        position, index = where
        seed_all(self.seed, Purpose.SAMPLE, position)
        # As Detectron2's MapDataset, another sample where the mapper gives none.
        for _ in range(_TRIES):
            record = self.dataset[index]
            name = record.get("file_name", f"record {index}")
            sample = self.mapper(record)
            if sample is not None:
                return sample
            logger.warning("The mapper gives no sample for %s", name)
            index = random.randrange(len(self))
        raise RuntimeError(f"the mapper gave no sample {_TRIES} times in a row")


def build_train_loader(
    cfg: CfgNode,
    *,
    mapper: Callable[[dict], dict | None] | None = None,
    sampler: Sampler | None = None,
) -> ShieldedLoader:
    """The loader of DATASETS.TRAIN.

    A micro-batch has `SOLVER.IMS_PER_BATCH / (world size x SOLVER.ACCUMULATE)` images.

    Args:
        cfg: a full config, SEED set.
        mapper: of one's own; None: what INPUT asks for.
        sampler: of one's own, without end, over what is for this process; None: DATALOADER's.

    Raises:
        InputError: a micro-batch would have no image, or a fraction of one.
    """
    mapper = ReadableMapper(mapper or build_train_mapper(cfg))
    build = partial(build_detection_train_loader.from_config, cfg, mapper=mapper, sampler=sampler)
    # Samplers draw their seed from NumPy, and share that of rank 0.
    seed_all(cfg.SEED, Purpose.ORDER)
    parts = build()
    if cfg.DATALOADER.SKIP_UNREADABLE:
        records = readable_records(parts["dataset"], cfg.DATASETS.TRAIN, cfg.OUTPUT_DIR)
        seed_all(cfg.SEED, Purpose.ORDER)
        parts = build(dataset=records)
    return build_seeded_loader(**parts, seed=cfg.SEED, accumulate=cfg.SOLVER.ACCUMULATE)


def build_seeded_loader(
    dataset: list[dict],
    *,
    mapper: Callable[[dict], dict | None],
    total_batch_size: int,
    seed: int,
    accumulate: int = 1,
    sampler: Sampler | None = None,
    aspect_ratio_grouping: bool = True,
    **kwargs: Any,
) -> ShieldedLoader:
    """Detectron2's `build_detection_train_loader` with this module's stream and random state.

    Args:
        dataset: dataset dicts, which are cleaned, see
            :func:`~rope_vit_det.data.coco_file.clean_records`; those without a width and height
            count as not wide.
        seed: of the samples' random state.
        accumulate: micro-batches of a process in a step.
        kwargs: of the :class:`DataLoader`.

    Returns:
        Endless, of micro-batches; its `batch_sampler` is a :class:`MicroBatchSampler`.

    Raises:
        InputError: a micro-batch would have no image, or a fraction of one.
    """
    num_slots = comm.get_world_size() * accumulate
    key, of = "total_batch_size (SOLVER.IMS_PER_BATCH)", "processes x micro-batches of each"
    check_batch(total_batch_size, num_slots, key=key, of=of)
    with_masks = getattr(getattr(mapper, "mapper", mapper), "use_instance_mask", False)
    dataset = clean_records(dataset, with_masks=with_masks)
    wide = [record.get("width", 0) > record.get("height", 0) for record in dataset]
    batches = MicroBatchSampler(
        sampler=TrainingSampler(len(dataset)) if sampler is None else sampler,
        batch_size=total_batch_size // num_slots,
        slots=range(comm.get_rank() * accumulate, (comm.get_rank() + 1) * accumulate),
        num_slots=num_slots,
        wide=wide if aspect_ratio_grouping else None,
    )
    samples = SeededDataset(DatasetFromList(dataset, copy=False), mapper, seed)
    options: dict[str, Any] = {"collate_fn": trivial_batch_collator, **kwargs}
    return ShieldedLoader(DataLoader(samples, batch_sampler=batches, **options))


def build_test_loader(cfg: CfgNode, dataset_name: str) -> ShieldedLoader:
    """Detectron2's loader of a dataset to evaluate on.

    With TEST.SLICE.ENABLED, images come as they are, and one at a time, without workers that would
    hold several of them.
    """
    parts = build_detection_test_loader.from_config(cfg, dataset_name)
    if cfg.TEST.SLICE.ENABLED:
        parts["mapper"].augmentations = T.AugmentationList([])
    records = clean_records(parts["dataset"])
    if cfg.DATALOADER.SKIP_UNREADABLE:
        records = readable_records(records, (dataset_name,), cfg.OUTPUT_DIR)
    mapper = ReadableMapper(parts["mapper"], any_size=cfg.TEST.SLICE.ENABLED)
    workers = 0 if cfg.TEST.SLICE.ENABLED else parts["num_workers"]
    return ShieldedLoader(build_detection_test_loader(records, mapper=mapper, num_workers=workers))
