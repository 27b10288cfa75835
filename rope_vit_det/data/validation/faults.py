"""What can be wrong with a dataset, and how it is reported."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...errors import some_of

# What each kind of fault is, of one and of several: those that stop a run, and the others.
_FATAL = {
    "malformed": "malformed entries",
    "no images": "no images at all",
    "no image": "images that the folder lacks",
    "unreadable image": "images that cannot be read",
    "other size": "images of another size than the JSON says",
    "too thin": "images so thin that nothing is left of them at the size of INPUT",
    "duplicate id": "duplicate ids",
    "unknown category": "annotations of a category that the JSON lacks",
    "ignored": 'annotations with "ignore", which Detectron2 does not know (use "iscrowd")',
    "no mask": "annotations without a mask (set MODEL.MASK_ON False to train boxes only)",
    "keypoints": "objects whose keypoints are not MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS",
    "RLE mask": "masks as RLE (set INPUT.MASK_FORMAT bitmask)",
    "no annotations": "no annotations at all",
    "nothing to learn": "no annotation that could be learned from",
}
_OTHERS = {
    "unknown image": "annotations of an image that the JSON lacks (not used)",
    "zero area": "objects of zero area (not learned from)",
    "outside": "boxes wholly outside their image (not learned from)",
    "partly outside": "boxes partly outside their image (cut off at its edge)",
    "bad polygon": "masks without a polygon of three points (not used)",
    "bad part": "parts of a mask that are no polygon of three points (left out)",
    "same file": "image entries that name a file again",
    "same name": "categories that bear another one's name",
    "empty category": "categories without an annotation",
    "skipped image": "images that cannot be read (skipped)",
}
# An annotation with one of these is not learned from.
UNUSED = frozenset({"unknown image", "zero area", "outside", "bad polygon"})


class Use(NamedTuple):
    """What a run does with a dataset, which decides what is a fault of it.

    Attributes:
        mask_format: INPUT.MASK_FORMAT where masks are learned.
        num_keypoints: of an object, where keypoints are learned.
        max_aspect: the longer side over the shorter one from which on nothing is left of an image.
        is_test: nothing is learned from it.
        for_coco: dicts are evaluated by COCO's rules, which find images by their ids and sizes.
        needs_objects: a detector is to learn from dicts.
        skips_images: those that cannot be read are passed over, see :mod:`..readable`.
    """

    mask_format: str | None = None
    num_keypoints: int | None = None
    max_aspect: float | None = None
    is_test: bool = False
    for_coco: bool = False
    needs_objects: bool = False
    skips_images: bool = False


ANY_USE = Use()


@dataclass(frozen=True)
class Fault:
    """Something wrong with a dataset.

    Attributes:
        kind: a short name of what is wrong.
        where: the image file and the id of the entry.
        detail: what was found there.
    """

    kind: str
    where: str
    detail: str = ""

    @property
    def is_fatal(self) -> bool:
        """Whether training or evaluation would end in an error, or in nonsense."""
        return self.kind in _FATAL

    def __str__(self) -> str:
        return f"{self.kind}: {self._place}"

    @property
    def _place(self) -> str:
        return self.where + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class Inspection:
    """What is in a dataset, and what is wrong with it.

    Attributes:
        source: the JSON file, or the dataset's name.
        classes: the names of the categories, in the order of their ids; None: it says none.
        holder: what the entries lie in, for the messages.
    """

    source: str
    images: int
    unannotated: int
    objects: int
    classes: Sequence[str] | None
    faults: list[Fault]
    holder: str = "the JSON"

    @property
    def fatal(self) -> list[Fault]:
        return [fault for fault in self.faults if fault.is_fatal]

    def describe(self) -> str:
        """A line on what is there, and one for each kind of fault, with examples."""
        lines = [
            f"{self.source}: {self.images} images ({self.unannotated} without annotations), "
            f"{self.objects} annotations, {len(self.classes or ())} categories"
        ]
        return "\n  ".join(lines + list(self.describe_faults(self.faults)))

    def describe_faults(self, faults: list[Fault]) -> Iterator[str]:
        """How many of each kind, and the first few of them."""
        texts = _FATAL | _OTHERS
        for kind, count in Counter(fault.kind for fault in faults).items():
            of = f" of {self.images}" if kind == "no image" else ""
            examples = some_of([fault._place for fault in faults if fault.kind == kind])
            text = texts[kind].replace("the JSON", self.holder)
            yield f"{count}{of} {text}: {examples}"
