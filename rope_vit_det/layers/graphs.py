"""Whether the forward pass runs, or is being written down as a graph for many image sizes."""

import torch


def is_building_graph() -> bool:
    """True under `torch.compile`, `torch.export` and `torch.jit.trace`.

    Whatever looks at a size then (a cache, a shortcut) would bake that size into the graph.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
