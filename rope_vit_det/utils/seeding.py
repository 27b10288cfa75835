"""Random state as a function of where in a run one is, never of what happened before."""

import random
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What the random numbers are for, so that no two uses share a stream."""

    ORDER = 0  # of the samples
    SAMPLE = 1  # augmentation of the sample at a position of the stream
    STEP = 2  # drop path, sampling of anchors and boxes, at (iteration, micro-batch)


def seed_all(seed: int, purpose: Purpose, *position: int) -> None:
    """Seeds Python's, NumPy's and torch's global generators (torch's on every device).

    Args:
        seed: of the run, 0 or more.
        position: where in the run, whole numbers of 0 or more.
    """
    words = np.random.SeedSequence((seed, int(purpose), *position)).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))
