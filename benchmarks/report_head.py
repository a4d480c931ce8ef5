"""The fused head's part of the report: per shape, ours in each mode beside every peer, in time and in peak memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers import PEERS

Metrics = dict[str, dict[str, float]]  # variant to metric to value
Key = tuple[str, str, str]  # machine, model, case
# What a step of the head saves: as it was before, and the bytes that are not read and written any more, less those that
# are instead (the targets' weights, hidden states and their scaled copy), for N rows of D and V words of 16 bits.
SAVINGS: dict[str, Callable[[int, int, int], int]] = {
    "ours forward, tiles' maxima": lambda n, d, v: 4 * n * v - 8 * n * d,
    "ours forward, gradient scaled": lambda n, d, v: 4 * (v * d + n * d),
}
# By the copy rate that an H100 is taken to have, bytes/s.
COPY_RATE = 2.7e12
LABELS = {
    "ours forward": "real_kernels, gradient in forward",
    "ours forward, tuned": "real_kernels, gradient in forward, tuned",
    "ours forward, small budget": "real_kernels, gradient in forward, 8 chunks",
    "ours recompute": "real_kernels, recompute",
    "ours recompute, tuned": "real_kernels, recompute, tuned",
    "ours forward, tiles' maxima": "real_kernels, gradient in forward, tiles' maxima",
    "ours forward, gradient scaled": "real_kernels, gradient in forward, then scaled",
} | {name: peer.label for name, peer in PEERS.items()}
# In the tables' order.
OURS = tuple(name for name in LABELS if name not in PEERS)
ORDER = tuple(LABELS)


def cases(found: dict[Key, Metrics]) -> list[dict[str, Any]]:
    """For ``summary.json``: per shape and mode of ours, a peer's seconds and bytes over ours."""
    rows = []
    for (machine, model, case), variants in sorted(found.items()):
        for name in OURS:
            mine = variants.get(name)
            if mine is None:
                continue
            row: dict[str, Any] = {"machine": machine, "shape": f"{model} {case}", "mode": name.removeprefix("ours ")}
            row["seconds"], row["of_matmul_rate"] = mine["seconds"], mine["of_matmul_rate"]
            row["peak_bytes"] = mine.get("peak_bytes")
            others = {peer: m for peer, m in variants.items() if peer not in OURS}
            row["time_over_ours"] = {peer: m["seconds"] / mine["seconds"] for peer, m in others.items()}
            if mine.get("peak_bytes"):
                row["memory_over_ours"] = {
                    peer: m["peak_bytes"] / mine["peak_bytes"] for peer, m in others.items() if "peak_bytes" in m
                }
            rows.append(row)
    return rows


def savings(found: dict[Key, Metrics]) -> str:
    """What the base per row and the known upstream gradient save: by arithmetic, and measured where a card has."""
    out = [
        "| N | D | V | no pass for dL/dz: predicted | measured | no scaling: predicted | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for d, n in ((4096, 8192), (4096, 2048), (1024, 8192), (1024, 2048)):
        v, cells = 151_936, []
        of_shape = [m for (_, model, case), m in found.items() if (model, case) == _key(n, d, v)]
        for before, saved in SAVINGS.items():
            cells.append(f"{1e3 * saved(n, d, v) / COPY_RATE:.2f} ms")
            both = [m for m in of_shape if before in m and "ours forward" in m]
            gained = [1e3 * (m[before]["seconds"] - m["ours forward"]["seconds"]) for m in both]
            cells.append(f"{gained[-1]:.2f} ms" if gained else "")
        out.append(f"| {n} | {d} | {v:,} | {' | '.join(cells)} |")
    return "\n".join(out)


def _key(n: int, d: int, v: int) -> tuple[str, str]:
    return f"V={v} D={d} bf16", f"N={n} forward+backward"


def plot(found: dict[Key, Metrics], folder: Path) -> list[str]:
    """One figure per machine: seconds and peak memory per shape, forward and backward. Returns the files' names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = []
    for machine in sorted({key[0] for key in found}):
        mine = {key: v for key, v in found.items() if key[0] == machine and key[2].endswith("+backward")}
        if not mine:
            continue
        shown = sorted(mine, key=lambda key: -len(mine[key]))[:4]
        figure = Figure(figsize=(12, 1.2 + 2.6 * len(shown)), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, key in zip(figure.subplots(len(shown), 2, squeeze=False), shown, strict=True):
            variants = mine[key]
            order = [n for n in ORDER if n in variants][::-1]
            colours = ["#0072B2" if n in OURS else "#999999" for n in order]
            labels = [LABELS[n].replace("`", "") for n in order]
            axes[0].barh(labels, [variants[n]["seconds"] for n in order], color=colours)
            axes[0].set_xlabel("seconds, forward and backward")
            axes[0].set_title(f"{key[1]}, {key[2].split()[0]}", fontsize=10)
            axes[1].barh(labels, [variants[n].get("peak_bytes", 0.0) / 2**20 for n in order], color=colours)
            axes[1].set_yticklabels([])
            axes[1].set_xlabel("peak MiB above inputs and gradients")
            for side in axes:
                side.tick_params(labelsize=8)
        figure.suptitle(machine, fontsize=9)
        slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
        names.append(f"head-{slug}.png")
        figure.savefig(folder / names[-1], dpi=100)
    return names
