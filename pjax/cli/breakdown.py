"""Where a step's time goes: a profiler's trace, read with the compiled programs' HLO beside it.

Each operation of the trace belongs to the part of pjax that its instruction came from: attention (the kernels and what they
need), products (of the model with its weights), sampling, and the rest of the model (norms, rotations, embeddings).
"""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PARTS = ("attention", "products", "sampling", "rest")
ATTENTION = re.compile(r"/pjax/(pallas_kernels/(?!products)|models/attention)")
SAMPLING = re.compile(r"/pjax/sampling/")
PRODUCT = re.compile(r"\b(dot|convolution|ragged-dot)\(|gemm|matmul|\bcublas|pjax_product", re.IGNORECASE)
FORWARD = ("decode_", "mixed_")  # how the names of forward programs begin: each step has one
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*)$")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=\{?((?:%[\w.-]+(?:, )?)+)")


def parts_of(hlo: str) -> dict[str, str]:
    """The part of each instruction of a compiled program, by its name."""
    files, locations, frames = (_table(hlo, name) for name in ("FileNames", "FileLocations", "StackFrames"))
    products = _computations_with_products(hlo)

    def frame_files(frame: int) -> Iterable[str]:
        seen = set[int]()
        while frame in frames and frame not in seen:
            seen.add(frame)
            location, parent = (int(number) for number in re.findall(r"_id=(\d+)", frames[frame])[:2])
            yield files[int(re.findall(r"file_name_id=(\d+)", locations[location])[0])]
            frame = parent - 1

    found = {}
    for line in hlo.splitlines():
        if (match := INSTRUCTION.match(line)) is None:
            continue
        name, text = match.groups()
        frame = re.search(r"stack_frame_id=(\d+)", text)
        sources = " ".join(frame_files(int(frame[1]))) if frame else ""
        called = {one for names in CALLED.findall(text) for one in re.findall(r"%([\w.-]+)", names)}
        if ATTENTION.search(sources):
            found[name] = "attention"
        elif SAMPLING.search(sources):
            found[name] = "sampling"
        else:
            found[name] = "products" if PRODUCT.search(text.partition(", metadata=")[0]) or called & products else "rest"
    return found


def _table(hlo: str, name: str) -> dict[int, str]:
    """A table before the first computation: a number and a text in each line."""
    rows = hlo.partition(f"\n{name}\n")[2].partition("\n\n")[0].splitlines()
    return {int(number): text for number, _, text in (row.partition(" ") for row in rows)}


def _computations_with_products(hlo: str) -> set[str]:
    """Names of the computations that hold a product."""
    found, current = set[str](), ""
    for line in hlo.splitlines():
        if match := COMPUTATION.match(line):
            current = match[1]
        elif PRODUCT.search(line.partition(", metadata=")[0]):
            found.add(current)
    return found


def own_times(events: Iterable[tuple[float, float, str]]) -> dict[str, float]:
    """Nanoseconds in each operation (start, end, name) of one thread, without those inside it."""
    times: dict[str, float] = defaultdict(float)
    stack: list[tuple[float, str]] = []  # ends and names of the operations around
    for start, end, name in sorted(events, key=lambda event: (event[0], -event[1])):
        while stack and stack[-1][0] <= start:
            stack.pop()
        if stack:
            times[stack[-1][1]] -= end - start
        times[name] += end - start
        stack.append((end, name))
    return times


def busy_time(intervals: Iterable[tuple[float, float]]) -> float:
    """Nanoseconds in which at least one of the intervals lasts."""
    busy, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        busy += max(end - max(start, until), 0)
        until = max(until, end)
    return busy


def read_trace(folder: Path, texts: dict[str, str]) -> dict[str, dict[str, float]]:
    """For each compiled program that ran, by its name: how often, milliseconds a run, and the share of each part in percent."""
    import jax

    file = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    by_step: dict[str, list[list[tuple[float, float, str]]]] = defaultdict(list)  # of each thread or stream
    runs: dict[str, set[Any]] = defaultdict(set)
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            events: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
            for event in line.events:
                stats = dict(event.stats)
                name = str(stats.get("hlo_module", "")).removeprefix("jit_").partition("(")[0]
                if name in texts and "hlo_op" in stats:
                    events[name].append((event.start_ns, event.start_ns + event.duration_ns, str(stats["hlo_op"])))
                    runs[name].add(stats.get("run_id"))
            for name, found in events.items():
                by_step[name].append(found)
    return {name: _shares(lines, parts_of(texts[name]), len(runs[name])) for name, lines in sorted(by_step.items())}


def _shares(lines: list[list[tuple[float, float, str]]], parts: dict[str, str], num_runs: int) -> dict[str, float]:
    times = dict.fromkeys(PARTS, 0.0)
    for line in lines:
        for name, time in own_times(line).items():
            times[parts.get(name, "rest")] += time
    total = sum(times.values()) or 1.0
    busy = busy_time((start, end) for line in lines for start, end, _ in line)
    return {"steps": num_runs, "ms": busy / num_runs / 1e6} | {part: 100 * time / total for part, time in times.items()}


def break_down(llm: Any, run: Callable[[], float]) -> dict[str, dict[str, float]]:
    """Traces `run`, which gives its seconds, and reads the trace; "host" is the time in which no step ran: a step's, and its share.

    The trace itself costs time, mostly on the host: its share is an upper bound.
    """
    with tempfile.TemporaryDirectory() as folder:
        llm.start_profile(folder)
        try:
            seconds = run()
        finally:
            llm.stop_profile()
        steps = read_trace(Path(folder), llm.engine.runner.compiled_texts())
    busy = sum(step["ms"] * step["steps"] for step in steps.values())
    num_steps = sum(step["steps"] for name, step in steps.items() if name.startswith(FORWARD))
    return steps | {"host": {"ms": (1e3 * seconds - busy) / max(num_steps, 1), "percent": 100 * (1 - busy / (1e3 * seconds))}}
