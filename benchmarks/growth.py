"""Does cost grow as it should? Decoded tokens per second against running sequences and against context, beside the machine's bound.

    python -m benchmarks.growth --dtype float32 --out growth.png

A decode's time is the difference of two calls that find their prompts in the prefix cache: one makes a token, one many. The bound
is what the memory's speed (weights and KV cache are read once a step) and the cores' (two operations a weight and row) allow, both
measured here with numpy on as many threads. Points that the model's length or the free memory does not allow are left out, and said.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.throughput import demo_model

ROWS, CONTEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256), (128, 256, 512, 1024, 2048, 4096, 8192)
STEPS = 32


@dataclass(frozen=True)
class Machine:
    """What it can do at most."""

    bytes_per_second: float
    flops_per_second: float

    @classmethod
    def measure(cls) -> Machine:
        """The best of five of each."""
        threads = len(os.sched_getaffinity(0))
        each = min(1 << 26, max(1 << 24, (1 << 28) // threads))  # floats, more than caches hold; 1 GB in all up to 16 threads
        arrays = [np.ones(each, np.float32) for _ in range(threads)]
        square = np.ones((2048, 2048), np.float32)

        def read() -> None:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda array: np.dot(array, array), arrays))

        return cls(threads * arrays[0].nbytes / _best(read), 2 * 2048**3 / _best(lambda: square @ square))


def _best(work: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def measure(llm: Any, num_rows: int, context: int, rounds: int) -> float:
    """Decoded tokens per second of so many sequences, each with `context` tokens before the first."""
    from pjax import SamplingParams

    rng = np.random.default_rng([num_rows, context])
    prompts = rng.integers(0, llm.engine.model_config.vocab_size, (num_rows, context)).tolist()

    def seconds(num_out: int) -> float:
        started = time.perf_counter()
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=num_out, ignore_eos=True), use_tqdm=False)
        return time.perf_counter() - started

    seconds(STEPS)  # fills the prefix cache
    return statistics.median(num_rows * STEPS / (seconds(STEPS + 1) - seconds(1)) for _ in range(rounds))


def bound(llm: Any, machine: Machine, num_rows: int, context: int, dtype: str) -> float:
    """Tokens per second that the machine allows a LLaMA."""
    c = llm.engine.model_config
    attention = c.hidden_size * c.head_size * (2 * c.num_heads + 2 * c.num_kv_heads)
    weights = c.num_layers * (attention + 3 * c.hidden_size * c.intermediate_size) + c.vocab_size * c.hidden_size
    kv_bytes = 2 * c.num_layers * c.num_kv_heads * c.head_size * np.dtype(llm.engine.runner.config.kv_cache_dtype).itemsize
    length = context + STEPS / 2
    num_bytes = weights * (2 if dtype == "bfloat16" else 4) + num_rows * length * kv_bytes
    flops = num_rows * (2 * weights + 4 * c.num_layers * c.num_heads * c.head_size * length)
    return num_rows / max(num_bytes / machine.bytes_per_second, flops / machine.flops_per_second)


def why_not(llm: Any, num_rows: int, context: int) -> str | None:
    """The reason why so many sequences of such length can't be measured, or None."""
    if context + STEPS + 1 > llm.engine.max_model_len:
        return f"the longest sequence has {llm.engine.max_model_len} tokens"
    needed, num_pages = num_rows * -(-(context + STEPS + 1) // llm.engine.config.page_size), llm.engine.stats().num_pages
    return f"they take {needed} pages, and the free memory has {num_pages}" if needed > num_pages else None


def plot(rows: list[dict[str, float]], contexts: list[dict[str, float]], title: str, path: Path) -> None:
    """Two pictures side by side, logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    fig, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    label = f"tokens of context, {contexts[0]['rows']} sequences" if contexts else ""
    for axis, points, key, name in ((axes[0], rows, "rows", "running sequences, 128 tokens each"), (axes[1], contexts, "context", label)):
        places = [point[key] for point in points]
        axis.loglog(places, [point["bound"] for point in points], "--", color="grey", label="bound")
        axis.loglog(places, [point["tokens_per_second"] for point in points], "o-", label="pjax")
        axis.set_xticks(places, [str(place) for place in places])
        axis.minorticks_off()
        axis.set_xlabel(name)
        axis.set_ylabel("decoded tokens per second")
        axis.grid(alpha=0.3)
        axis.legend()
    fig.suptitle(title, fontsize=10)
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main() -> None:
    """Measures, prints, plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder or a .gguf file (default: the demo model)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-seqs", type=int, default=4, help="sequences whose context grows (default: 4)")
    parser.add_argument("--out", type=Path, required=True, help="the picture; the figures are written beside it as .json")
    args = parser.parse_args()
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the picture needs matplotlib: pip install 'matplotlib>=3.9'")
    from pjax import LLM

    model = args.model or demo_model(parser)
    machine = Machine.measure()
    places = {"rows": [(rows, 128) for rows in ROWS], "contexts": [(args.num_seqs, context) for context in CONTEXTS]}
    found: dict[str, Any] = {"dtype": args.dtype, "gigabytes_per_second": machine.bytes_per_second / 1e9}
    found |= {"gigaflops_per_second": machine.flops_per_second / 1e9, "rows": [], "contexts": []}
    limit = max(CONTEXTS)
    for kind, points in places.items():
        longest = min(-(-(max(context for _, context in points) + STEPS + 1) // 16) * 16, limit)
        llm = LLM(
            model, dtype=args.dtype, max_model_len=longest, max_num_seqs=max(rows for rows, _ in points), warmup="all", progress=False
        )
        limit = min(limit, llm.engine.model_config.max_position)
        for num_rows, context in tqdm(points, desc=kind):
            context = min(context, longest - STEPS - 1) if context == longest else context
            if reason := why_not(llm, num_rows, context):
                tqdm.write(f"{num_rows:4d} sequences of {context:5d}: left out, {reason}")
                continue
            speed, most_speed = measure(llm, num_rows, context, args.rounds), bound(llm, machine, num_rows, context, args.dtype)
            found[kind].append({"rows": num_rows, "context": context, "tokens_per_second": speed, "bound": most_speed})
            tqdm.write(f"{num_rows:4d} sequences of {context:5d}: {speed:8.1f} tokens/s, {speed / most_speed:5.2f} of the bound")
            args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        del llm
    title = f"{args.dtype}; bound: {found['gigabytes_per_second']:.0f} GB/s, {found['gigaflops_per_second']:.0f} GFLOP/s"
    plot(found["rows"], found["contexts"], title, args.out)


if __name__ == "__main__":
    main()
