"""Steps over time, drawn by matplotlib."""

import importlib
from typing import Any

from tools.watchers import Turn


def new_figure(num_columns: int) -> Any:
    try:
        figure = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise SystemExit("drawing needs matplotlib: pip install matplotlib") from None
    return figure.Figure(figsize=(1 + 5 * num_columns, 8), layout="constrained")


def plot(traces: dict[str, list[Turn]], figure: Any, file: str) -> None:
    """A column for each workload; over time: how long steps took, their tokens, and the use of the KV pool."""
    axes = figure.subplots(3, len(traces), sharex="col", squeeze=False)
    for (name, turns), (top, middle, bottom) in zip(traces.items(), axes.T, strict=True):
        ends = [turn.end - turns[0].start for turn in turns]
        top.scatter(ends, [1000 * (turn.end - turn.start) for turn in turns], s=3, color="black")
        for kind, count in ("prompt", "num_prefill_tokens"), ("output", "num_decode_tokens"):
            counts = [getattr(turn.step, count) or None for turn in turns]  # nothing is drawn for None
            middle.plot(ends, counts, linestyle="none", marker=".", markersize=3, label=kind)
        middle.legend()
        bottom.plot(ends, [100 * turn.kv_usage for turn in turns], color="black")
        top.set(title=name, ylabel="step, ms", yscale="log")
        middle.set(ylabel="tokens in a step", yscale="log")
        bottom.set(ylabel="KV pool in use, %", ylim=(0, None), xlabel="seconds", xlim=(0, None))
    figure.savefig(file, dpi=150)
