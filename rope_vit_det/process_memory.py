"""How much memory this process takes, as Linux counts it."""

from pathlib import Path

_STATUS = Path("/proc/self/status")


def process_peak_mib() -> float:
    """Peak memory of this process so far, all that it holds included, in MiB (Linux)."""
    return status_kib("VmHWM") / 2**10


def status_kib(field: str) -> int:
    """A field of /proc/self/status, in KiB.

    Raises:
        OSError: there is no such field, or no Linux.
    """
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"{_STATUS} has no {field}")
