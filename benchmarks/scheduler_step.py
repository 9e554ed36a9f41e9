"""What the host spends on a step: schedule, pack and commit, without a device. Reported in milliseconds, medians."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import numpy as np

from pjax.outputs import RequestMetrics
from pjax.params import SamplingParams
from pjax.runner.batch import SamplingTable, find_bucket, make_buckets, pack
from pjax.scheduler import Request, Scheduler


def make_request(number: int, rng: np.random.Generator, max_tokens: int) -> Request:
    """A prompt of 1 to 300 tokens."""
    return Request(
        request_id=str(number),
        prompt_token_ids=rng.integers(0, 30000, rng.integers(1, 300)).tolist(),
        params=SamplingParams(max_tokens=max_tokens),
        max_tokens=max_tokens,
        stop_token_ids=frozenset(),
        eos_token_ids=frozenset({0}),
        seed=number,
        metrics=RequestMetrics(0.0),
    )


def main() -> None:
    """Times decode steps of a full batch, and steps that also take prompts in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    count = args.sequences
    scheduler = Scheduler(
        num_pages=count * 64, page_size=16, max_model_len=2048, max_num_seqs=count, max_num_batched_tokens=max(512, count)
    )
    buckets, sampling = make_buckets(count, max(512, count)), SamplingTable(count)
    for number in range(2 * count):
        scheduler.add(make_request(number, rng, max_tokens=args.steps // 2))
    parts: dict[str, list[tuple[float, float, float]]] = {"decode": [], "mixed": []}
    for _ in range(args.steps):
        times = [time.perf_counter()]
        plan = scheduler.schedule()
        times.append(time.perf_counter())
        if plan is None:
            break
        for request in plan.sampled:
            sampling.set(request.row, request, request.params, request.seed)
        bucket = find_bucket(buckets, plan.num_tokens, len(plan.rows), plan.num_decode == len(plan.rows))
        pack(plan, scheduler.table.tokens, scheduler.table.block_tables, sampling, bucket)
        times.append(time.perf_counter())
        scheduler.commit(plan, rng.integers(1, 30000, len(plan.sampled)), 0.0)
        times.append(time.perf_counter())
        if len(plan.rows) == count:
            kind = "decode" if bucket.decode_only else "mixed"
            parts[kind].append(tuple(1e3 * (b - a) for a, b in itertools.pairwise(times)))  # type: ignore[arg-type]
    for kind, rows in parts.items():
        if rows:
            schedule, packing, commit = (statistics.median(column) for column in zip(*rows))
            print(f"{kind:<7} {count} rows, {len(rows):4d} steps: schedule {schedule:.3f} ms + pack {packing:.3f} ms = "
                  f"{schedule + packing:.3f} ms; commit {commit:.3f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
