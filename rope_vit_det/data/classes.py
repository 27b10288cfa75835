"""Which classes a detector tells apart, by name and by the id that its dataset gives them."""

from collections.abc import Sequence
from typing import TypedDict

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances

from ..errors import InputError, did_you_mean
from .demo.dataset import register_where_named
from .rle_masks import RLEMasks

# Of the architectures that learn instances, where they have the number of classes.
_HEADS = {"GeneralizedRCNN": "ROI_HEADS", "PanopticFPN": "ROI_HEADS", "RetinaNet": "RETINANET"}


class Classes(TypedDict):
    """Plain lists, as they lie in a checkpoint: entry i belongs to the detector's class i."""

    names: list[str]
    ids: list[int]


def registered(name: str, key: str) -> Metadata:
    """What Detectron2's catalogs say of a dataset.

    Args:
        key: or option that names it, for the message.

    Raises:
        InputError: there is none.
    """
    register_where_named([name])
    if name not in DatasetCatalog:
        hint = did_you_mean(name, DatasetCatalog.list()) or "; register it in DatasetCatalog first"
        raise InputError(f"{key}: no dataset is registered as {name!r}{hint}")
    return MetadataCatalog.get(name)


def dataset_classes(name: str) -> Classes | None:
    """The classes of a registered dataset; None for one without instances.

    Args:
        name: in Detectron2's catalogs; a dataset of the user's own must have been loaded once, for
            Detectron2 to know them.
    """
    metadata = MetadataCatalog.get(name)
    names = metadata.get("thing_classes", None)
    if names is None:
        return None
    mapping = metadata.get("thing_dataset_id_to_contiguous_id", None)
    if mapping is not None:
        ids = [dataset_id for dataset_id, _ in sorted(mapping.items(), key=lambda item: item[1])]
    else:
        # Detectron2 reads LVIS, whose ids start at 1, without a mapping.
        first = 1 if metadata.get("evaluator_type", None) == "lvis" else 0
        ids = list(range(first, first + len(names)))
    return {"names": [str(each) for each in names], "ids": [int(each) for each in ids]}


def num_classes(cfg: CfgNode) -> tuple[str, int] | None:
    """The key and value by which the model knows how many categories there are, if it does."""
    head = _HEADS.get(cfg.MODEL.META_ARCHITECTURE)
    return (f"MODEL.{head}.NUM_CLASSES", cfg.MODEL[head].NUM_CLASSES) if head else None


def to_coco_results(
    instances: Instances, image_id: int | str, ids: Sequence[int]
) -> list[dict[str, object]]:
    """A detector's instances as COCO results, with the ids of the dataset that it was trained on.

    Args:
        instances: on the CPU, in the size of the original image.
        ids: `Classes["ids"]`.
    """
    fields = dict(instances.get_fields())
    if isinstance(fields.get("pred_masks"), RLEMasks):
        del fields["pred_masks"]  # of which Detectron2 would make pixels
    results = instances_to_coco_json(Instances(instances.image_size, **fields), image_id)
    if len(fields) < len(instances.get_fields()):
        for result, rle in zip(results, instances.pred_masks.rles, strict=True):
            result["segmentation"] = rle
    return [{**result, "category_id": ids[result["category_id"]]} for result in results]
