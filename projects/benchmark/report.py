"""A benchmark's results as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from projects.benchmark.networks import CONTESTANTS

_PEERS = ("birder", "vitdet", "eva02")


def format_report(results: Mapping[str, Any]) -> str:
    """The table of medians, ratios, memory and shares, and the bars, in Markdown."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [
        f"{results['date']}, {machine['device']}, {machine['threads']} threads; {versions}",
        *(f"{name}: not installed, not measured" for name in results["absent"]),
        *(f"{m['network']}, {m['mode']}, {m['precision']}: {m['why']}" for m in results["failed"]),
    ]
    for rate in results["matrix_rate"]:
        parts.append(
            f"matrix rate, {rate['precision']}, linear layers alone at {_grid(rate)} tokens: "
            f"{rate['gflops']:.0f} GFLOP/s"
        )
    if results["output_difference"] is not None:
        parts.append(
            f"global against birder, equal weights: outputs differ by "
            f"{results['output_difference']:.1e} of the largest value"
        )
    parts += ["", _measurements_table(results["measurements"])]
    if results["bars"]:
        parts += ["", format_bars(results["bars"])]
    return "\n".join(parts)


def _measurements_table(measurements: Sequence[Mapping[str, Any]]) -> str:
    peers = [p for p in _PEERS if any(m["network"] == p for m in measurements)]
    medians = {
        (m["network"], m["mode"], m["precision"], _grid(m)): m["median_s"]
        for m in measurements
        if not m["compiled"]
    }
    rows = []
    for m in measurements:
        row = [
            m["network"] + (" compiled" if m["compiled"] else ""),
            m["mode"],
            m["precision"],
            _grid(m),
            f"{m['median_s']:.3f}",
            f"{m['batch_size'] / m['median_s']:.2f}",
        ]
        for peer in peers:
            for precision in dict.fromkeys(("fp32", m["precision"])):
                theirs = medians.get((peer, m["mode"], precision, _grid(m)))
                row.append("" if theirs is None else f"{theirs / m['median_s']:.2f}")
            if m["precision"] == "fp32":
                row.append("")
        row += [
            "" if m["peak_mib"] is None else f"{m['peak_mib']:.0f}",
            f"{m['share_of_matrix_rate']:.0%}",
        ]
        rows.append(row)
    headers = ["network", "mode", "precision", "tokens", "median s", "images/s"]
    for peer in peers:
        headers += [f"× {peer} fp32", f"× {peer} same"]
    headers += ["peak MiB", "of matrix rate"]
    what = "\n".join(
        f"{c.name}: {c.what}"
        for c in CONTESTANTS.values()
        if any(m["network"] == c.name for m in measurements)
    )
    table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    return f"{what}\n\n{table}"


def format_bars(bars: Sequence[Mapping[str, Any]]) -> str:
    """A line a bar: what is measured, what was wanted, what came out."""
    rows = [
        [bar["what"], bar["wanted"], "not measured", ""]
        if bar["value"] is None
        else [bar["what"], bar["wanted"], f"{bar['value']:.3g}", "yes" if bar["met"] else "no"]
        for bar in bars
    ]
    headers = ["bar", "wanted", "measured", "met"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _grid(entry: Mapping[str, Any]) -> str:
    return f"{entry['grid'][0]}×{entry['grid'][1]}"
