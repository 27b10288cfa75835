"""Small functions that tests share."""

import torch
from detectron2.structures import Boxes, Instances, PolygonMasks
from torch import Tensor, nn

# What the weights files of the tests say about themselves.
RGB_STATS = {"mean": (0.5, 0.45, 0.4), "std": (0.25, 0.24, 0.23)}
BIRDS = {"arctic tern": 0, "bar-tailed godwit": 1, "common crane": 2}


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
