"""Where :mod:`rope_vit_det.solver.optimizers` was before 0.2."""

from ..solver.optimizers import (
    build_optimizer,
    has_weight_decay,
    layer_decay_factor,
    parameter_groups,
)

__all__ = ["build_optimizer", "has_weight_decay", "layer_decay_factor", "parameter_groups"]
