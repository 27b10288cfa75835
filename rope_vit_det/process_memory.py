"""How much memory this process takes, as Linux counts it."""

from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident_mib() -> float:
    """Resident memory of this process, in MiB (Linux)."""
    return _status_kib("VmRSS") / 2**10


def process_peak_mib() -> float:
    """Peak memory of this process so far, all that it holds included, in MiB (Linux)."""
    return _status_kib("VmHWM") / 2**10


def _status_kib(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"{_STATUS} has no {field}")
