"""Runs that are resumed with other settings than they had."""

import shutil
import tempfile
from functools import cache
from pathlib import Path

from .case import HANDLED, OWN, REFUSED, Case, World


@cache
def _finished_run() -> Path:
    """The output of a good run of two iterations."""
    from .run import run_case

    folder = Path(tempfile.mkdtemp()) / "run"
    case = Case("", "", lambda world: world.opts.extend(("SOLVER.MAX_ITER", "2")), HANDLED)
    outcome = run_case(case, OWN, folder)
    assert outcome.kind == HANDLED, outcome.log[-3000:]
    return folder / "out"


def _case(key: str, value: str, outcome: str, *says: str, iterations: str = "3") -> Case:
    def spoil(world: World) -> None:
        shutil.copytree(_finished_run(), world.folder / "out")
        world.flags.append("--resume")
        world.opts += ["SOLVER.MAX_ITER", iterations, *((key, value) if key else ())]

    name = f"resumed with {key or 'more'} {value or 'iterations'}"
    return Case(name, "after two iterations", spoil, outcome, says, (OWN,))


CASES = [
    _case("", "", HANDLED, "SOLVER.MAX_ITER (2 -> 3)"),
    _case("SOLVER.BASE_LR", "1e-5", HANDLED, "SOLVER.BASE_LR (", "-> 1e-05)"),
    _case("SOLVER.WEIGHT_DECAY", "0.0", HANDLED, "SOLVER.WEIGHT_DECAY (", "-> 0.0)"),
    _case("SOLVER.WARMUP_ITERS", "1", HANDLED, "SOLVER.WARMUP_ITERS ("),
    _case("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", HANDLED, "SOLVER.LR_SCHEDULER_NAME ("),
    _case("SOLVER.LAYER_DECAY", "0.5", REFUSED, "SOLVER.LAYER_DECAY (", "start anew",
          "MODEL.WEIGHTS"),
    _case("SOLVER.OPTIMIZER", "SGD", REFUSED, "SOLVER.OPTIMIZER ('AdamW' -> 'SGD')", "start anew"),
    _case("MODEL.ROPE_VIT.FREEZE_BLOCKS", "1", REFUSED, "MODEL.ROPE_VIT.FREEZE_BLOCKS (0 -> 1)",
          "start anew"),
    _case("MODEL.MASK_ON", "False", REFUSED, "MODEL.MASK_ON (True -> False)", "start anew"),
    _case("MODEL.ROI_BOX_HEAD.NUM_FC", "1", REFUSED, "parameters more or less",
          "MODEL.ROI_BOX_HEAD.NUM_FC (", "start anew"),
    _case("", "", REFUSED, "SOLVER.MAX_ITER is 1, and the run has done 2 iterations",
          iterations="1"),
]  # fmt: skip
CASES[-1] = Case("resumed with fewer iterations", *list(vars(CASES[-1]).values())[1:])
