#!/usr/bin/env python3
"""Trains a classifier on the network in plain PyTorch: plain_pytorch.py NAME_OR_PATH STEPS

NAME_OR_PATH is that of published weights or a file, or of an architecture, for random weights.
Needs rope_vit_det, not Detectron2. Put images of your own, normalised as `info` says, in place of
the noise.
"""

import sys

import torch
from torch import nn

from rope_vit_det import create_model, load_model
from rope_vit_det.models import VARIANTS


def main(name: str, steps: int = 10, num_classes: int = 2) -> list[float]:
    if name in VARIANTS:
        network = create_model(name)
    else:
        network, info = load_model(name)
        print(info)
    labels = torch.arange(8) % num_classes
    images = torch.rand(8, 3, 224, 224) + labels[:, None, None, None]  # brighter by class
    classifier = nn.Linear(network.embedding(images[:1]).shape[1], num_classes)
    groups = [
        {"params": network.parameters(), "lr": 1e-5},  # pretrained: slowly
        {"params": classifier.parameters(), "lr": 1e-3},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    losses = []
    for step in range(steps):
        logits = classifier(network.embedding(images))  # (N, C) to (N, classes)
        loss = nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.3f}")
    features = network.eval().detection_features(images[:1])["neck"]
    print("a feature map for a dense task:", tuple(features.shape))
    return losses


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], int(sys.argv[2]))
