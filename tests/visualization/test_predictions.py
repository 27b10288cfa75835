"""The pictures: what is asked for is on them."""

import cv2
import numpy as np
import torch
from detectron2.structures import Boxes, BoxMode, Instances

from rope_vit_det.visualization.predictions import draw_predictions


def test_truth_is_left_and_confident_predictions_are_right(tmp_path):
    path = str(tmp_path / "grey.png")
    cv2.imwrite(path, np.full((100, 150, 3), 90, np.uint8))
    image = {
        "file_name": path,
        "annotations": [
            {"bbox": [10, 10, 60, 60], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
        ],
    }
    found = Instances((100, 150))
    found.pred_boxes = Boxes(torch.tensor([[80.0, 30.0, 140.0, 90.0], [5.0, 5.0, 60.0, 60.0]]))
    found.scores = torch.tensor([0.9, 0.2])
    found.pred_classes = torch.tensor([0, 0])

    def changed(min_score):
        out = str(tmp_path / f"{min_score}.png")
        draw_predictions([image], [found], ["disc"], out, min_score=min_score)
        sheet = cv2.imread(out)[44:-8]
        left, right = np.split(sheet, 2, axis=1)
        return [(np.abs(half.astype(int) - 90).max(axis=2) > 20)[:, 8:-8] for half in (left, right)]

    truth, guess = changed(0.5)
    both = changed(0.1)[1]
    # Panels are 440 pixels wide: 2.93 a pixel. Left box ends at 176, the right one begins at 234.
    assert truth[:, 29:180].any() and not truth[:, 225:].any()
    assert guess[:, 234:].any() and not guess[:, :190].any()
    assert both[:, :180].any()
