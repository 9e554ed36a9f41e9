"""How much of the page pool holds live tokens, and how many pages sharing saves: the real scheduler, no device.

Lengths are seeded lognormals with the means that Kwon et al. 2023 (PagedAttention), section 6.1, publish for ShareGPT and
Alpaca; their spread (--sigma) is our choice. A request of n samples, or of a beam search, is served alone, as its saving
does not depend on its neighbours; prefix caching is off, so that only forks save. Beams need log-probabilities, and there is
no model: the gaps from each candidate to the next are exponential with mean 1. How soon beams part, and so what they
share, depends on that.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from pjax.outputs import RequestMetrics
from pjax.params import BeamSearchParams, SamplingParams
from pjax.scheduler import Request, Scheduler
from pjax.scheduler.beam_search import BeamSearch

TRACES = {"ShareGPT": (161.31, 337.99), "Alpaca": (19.31, 58.45)}  # mean prompt, mean output
PAPER = {  # pages saved, percent: smallest and largest over their sizes (Kwon et al. 2023, section 6.3)
    ("Alpaca", "samples"): "6.1–9.8",
    ("Alpaca", "beams"): "37.6–55.2",
    ("ShareGPT", "samples"): "16.2–30.5",
    ("ShareGPT", "beams"): "44.3–66.3",
}
VOCAB = 32000


def lengths(rng: np.random.Generator, mean: float, sigma: float, count: int, most: int) -> list[int]:
    """Lognormal of this mean, at least 1 and at most `most`."""
    return np.clip(np.rint(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)), 1, most).astype(int).tolist()


def make(name: str, prompt: int, output: int, rng: np.random.Generator, *, n: int = 1, width: int = 0) -> list[Request]:
    """A request that generates exactly `output` tokens."""
    params = BeamSearchParams(beam_width=width or 1, max_tokens=output, ignore_eos=True)
    common: dict[str, Any] = {
        "request_id": name,
        "prompt_token_ids": rng.integers(0, VOCAB, prompt).tolist(),
        "params": SamplingParams(),
        "max_tokens": output,
        "stop_token_ids": frozenset(),
        "eos_token_ids": frozenset(),
        "seed": 0,
        "metrics": RequestMetrics(0.0),
        "beam": BeamSearch(params, output, frozenset()) if width else None,
    }
    return [Request(**common, index=index) for index in range(width or n)]


def candidates(count: int, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Each beam's likeliest tokens with log-probabilities of a made-up model: gaps between ranks are exponential."""
    return rng.integers(0, VOCAB, (count, size)), -np.cumsum(rng.exponential(1.0, (count, size)), axis=1).astype(np.float32)


def step(scheduler: Scheduler, rng: np.random.Generator, size: int = 16) -> None:
    """Schedules and commits a step."""
    plan = scheduler.schedule()
    assert plan is not None
    count = len(plan.sampled)
    scheduler.commit(plan, rng.integers(1, VOCAB, count), 0.0, candidates(count, size, rng))


def live_share(trace: list[tuple[int, int]], page_size: int, num_pages: int, max_model_len: int, seed: int) -> tuple[float, float]:
    """Live tokens / slots of used pages, and / slots that padding each to the model's length takes; both summed over all steps."""
    rng = np.random.default_rng(seed)
    scheduler = Scheduler(
        num_pages=num_pages, page_size=page_size, max_model_len=max_model_len, max_num_seqs=256, max_num_batched_tokens=2048,
        enable_prefix_caching=False,
    )  # fmt: skip
    requests = [make(str(i), prompt, output, rng)[0] for i, (prompt, output) in enumerate(trace)]
    for request in requests:
        scheduler.add(request)
    live = used = padded = 0
    while scheduler.has_work:
        step(scheduler, rng)
        live += sum(request.num_computed for request in scheduler.running)
        used += scheduler.pool.num_used * page_size
        padded += len(scheduler.running) * max_model_len
    return live / used, live / padded


def saved(trace: list[tuple[int, int]], page_size: int, max_model_len: int, seed: int, *, n: int = 1, width: int = 0) -> float:
    """Pages that sharing saves, as the paper counts them: pages saved / pages without sharing, over all steps."""
    rng = np.random.default_rng(seed)
    used = owned = 0
    for prompt, output in trace:
        scheduler = Scheduler(
            num_pages=(width or n) * (max_model_len // page_size + 1), page_size=page_size, max_model_len=max_model_len,
            max_num_seqs=width or n, max_num_batched_tokens=max_model_len, enable_prefix_caching=False,
        )  # fmt: skip
        scheduler.add(*make("0", prompt, output, rng, n=n, width=width))
        while scheduler.has_work:
            step(scheduler, rng, max(2 * width, 1))
            used += scheduler.pool.num_used
            owned += sum(len(scheduler.kv.pages_of(request)) for request in scheduler.running)
    return 1 - used / owned


def plot(file: str, shares: dict[str, tuple[float, float]], savings: dict[tuple[str, str], list[float]], page_size: int) -> None:
    """Draws both tables, the paper's ranges as bands behind the bars."""
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), width_ratios=(3, 4, 4), layout="constrained")
    colours = {"ShareGPT": "#1f66c1", "Alpaca": "#d97706"}
    for place, (name, (live, padded)) in enumerate(shares.items()):
        for offset, share, alpha in ((-0.2, live, 1.0), (0.2, padded, 0.35)):
            bar = left.bar(place + offset, 100 * share, 0.36, color=colours[name], alpha=alpha)
            left.bar_label(bar, fmt="%.0f%%")
    left.set_xticks(range(len(shares)), [f"{name}\npages | padded" for name in shares])
    left.set(title=f"Slots that hold live tokens\n(pages of {page_size}; padded to the model's length)", ylim=(0, 112), ylabel="%")
    for axes, kind in ((middle, "samples"), (right, "beams")):
        for number, name in enumerate(shares):
            low, high = map(float, PAPER[name, kind].split("–"))
            axes.axhspan(low, high, xmin=0.5 * number, xmax=0.5 * (number + 1), color=colours[name], alpha=0.15, lw=0)
            places = [4 * number + index for index in range(3)]
            axes.bar_label(axes.bar(places, [100 * share for share in savings[name, kind]], color=colours[name]), fmt="%.0f")
        axes.set_xlim(-1, 7)
        axes.set_xticks([0, 1, 2, 4, 5, 6], ["2", "4", "6"] * 2)
        axes.set(title=f"Pages saved by sharing: {kind}\n(bands: Kwon et al. 2023)", ylim=(0, 95), ylabel="%")
        axes.set_xlabel("  ".join(f"{name}" + " " * 28 for name in shares).rstrip())
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Prints the tables of docs/memory.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000, help="of the shared pool (default: %(default)s)")
    parser.add_argument("--alone", type=int, default=100, help="requests for each figure of sharing (default: %(default)s)")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the logarithm of lengths (default: %(default)s)")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--num-pages", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE", help="draw the figures too (needs matplotlib)")
    args = parser.parse_args()
    size, most, seed = args.page_size, args.max_model_len, args.seed
    print("| trace | live tokens in used pages | padded to the model's length |\n|---|---|---|")
    traces = {}
    shares: dict[str, tuple[float, float]] = {}
    for name, (prompt, output) in TRACES.items():
        rng = np.random.default_rng(seed)
        prompts, outputs = (lengths(rng, mean, args.sigma, args.requests, most // 2) for mean in (prompt, output))
        traces[name] = list(zip(prompts, outputs, strict=True))
        live, padded = live_share(traces[name], size, args.num_pages, most, seed)
        shares[name] = live, padded
        print(f"| {name} | {live:.1%} | {padded:.1%} |", flush=True)
    print("\n| trace | sharing | 2 | 4 | 6 | the paper |\n|---|---|---|---|---|---|")
    savings: dict[tuple[str, str], list[float]] = {}
    for name, trace in traces.items():
        some = trace[: args.alone]
        for kind, option in (("samples", "n"), ("beams", "width")):
            found = savings[name, kind] = [saved(some, size, most, seed, **{option: count}) for count in (2, 4, 6)]
            print(f"| {name} | {kind} | {' | '.join(f'{share:.1%}' for share in found)} | {PAPER[name, kind]}% |", flush=True)
    if args.plot:
        plot(args.plot, shares, savings, args.page_size)


if __name__ == "__main__":
    main()
