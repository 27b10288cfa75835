"""Small functions that tests share."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from detectron2.structures import Boxes, Instances, PolygonMasks
from torch import Tensor, nn

from rope_vit_det.models.variants import is_birders
from rope_vit_det.weights import PublishedWeights, published_weights

# Scalars that no two runs share.
TIMES = {"time", "data_time", "rank_data_time", "eta_seconds"}
# What the weights files of the tests say about themselves.
RGB_STATS = {"mean": (0.5, 0.45, 0.4), "std": (0.25, 0.24, 0.23)}
BIRDS = {"arctic tern": 0, "bar-tailed godwit": 1, "common crane": 2}

# Whether tests/gpu runs at tiny sizes on the CPU.
REHEARSED = os.environ.get("GPU_TESTS") == "cpu"
DEMO_CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"


def birders_weights() -> dict[str, PublishedWeights]:
    """The part of the catalogue that birder is an oracle of."""
    every = published_weights().items()
    return {name: entry for name, entry in every if is_birders(entry.network)}


def move_off_initial_values(model: nn.Module) -> nn.Module:
    """Adds noise to every parameter, so that no mistake hides behind a zero or a one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def relative_difference(ours: Tensor, oracle: Tensor) -> float:
    """Largest difference over the largest oracle value."""
    assert ours.shape == oracle.shape, (ours.shape, oracle.shape)
    return ((ours - oracle).abs().max() / oracle.abs().max()).item()


def metrics_without_times(folder: Path) -> list[dict]:
    """The lines of a run's metrics.json, but for what depends on the machine."""
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def differences(one, other, path: str = "") -> list[str]:
    """Where checkpoints or metrics differ by a bit, but for times."""
    if type(one) is not type(other):
        return [path]
    if isinstance(one, dict):
        pairs = {key: (one.get(key), other.get(key)) for key in {*one, *other} - TIMES}
    elif isinstance(one, list | tuple) and len(one) == len(other):
        pairs = dict(enumerate(zip(one, other, strict=True)))
    else:
        # Of objects that are not there, AP is NaN.
        if isinstance(one, Tensor):
            same = np.array_equal(one.numpy(), other.numpy(), equal_nan=True)
        else:
            same = repr(one) == repr(other)
        return [] if same else [path]
    return [found for key, pair in pairs.items() for found in differences(*pair, f"{path}/{key}")]


def detector_input(height: int, width: int) -> dict:
    """One image with two annotated objects, as Detectron2's mapper would give it."""
    boxes = torch.tensor([[0.1, 0.1, 0.4, 0.6], [0.3, 0.4, 0.9, 0.9]])
    boxes = boxes * torch.tensor([width, height, width, height])
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(boxes)
    instances.gt_classes = torch.tensor([0, 1])
    instances.gt_masks = PolygonMasks(
        [[torch.stack((b[[0, 2, 2, 0]], b[[1, 1, 3, 3]]), dim=1).flatten().numpy()] for b in boxes]
    )
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return {"image": image, "height": height, "width": width, "instances": instances}
