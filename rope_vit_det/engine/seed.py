"""The seed of a run: given or drawn, and the same after a resume."""

import logging
import secrets
from pathlib import Path

from detectron2.utils import comm

from ..weights.files import new_file

SEED_FILE = "seed.txt"

logger = logging.getLogger(__name__)


def settle_seed(seed: int, output: str | None = None, *, resume: bool = False) -> int:
    """The seed of a run, the same in all processes, which all are to call this.

    Args:
        seed: as the config gives it; below 0 one is drawn, or with `resume` read.
        output: the run's folder, where it is written; None: nowhere.
        resume: go on with the seed that `output` holds.
    """
    if comm.is_main_process():
        known = _read(output) if resume and output else None
        if seed < 0:
            seed = secrets.randbelow(2**31) if known is None else known
        elif known is not None and known != seed:
            logger.warning(
                "The run in %s had SEED %d; with %d it goes on as another one", output, known, seed
            )
        if output:
            with new_file(Path(output, SEED_FILE), force=True) as temporary:
                temporary.write_text(f"{seed}\n")
    return comm.all_gather(seed)[0]


def _read(output: str) -> int | None:
    path = Path(output, SEED_FILE)
    return int(path.read_text()) if path.is_file() else None
