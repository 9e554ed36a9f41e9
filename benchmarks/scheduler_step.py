"""What the host spends on a step: schedule, pack and commit, without a device.

Milliseconds of CPU time, which a busy machine disturbs less than the clock, of a batch that is full; the median and the best of
many steps. Decode alone, and with a prompt taken in and a request ended every few steps. Each size also with many requests waiting.
With --prompt-len all prompts are so long, and steps that take them in do not count: what a step costs should not depend on it.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator

import numpy as np

from pjax.outputs import RequestMetrics
from pjax.params import SamplingParams
from pjax.runner.batch import find_bucket, make_buckets, pack
from pjax.sampling.parameters import SamplingTable
from pjax.scheduler import Request, Scheduler

Times = tuple[float, float, float]


def make_request(number: int, rng: np.random.Generator, max_tokens: int, prompt_len: int) -> Request:
    """A prompt of so many tokens; of 1 to 300 where that is 0."""
    return Request(
        request_id=str(number),
        prompt_token_ids=rng.integers(0, 30000, prompt_len or rng.integers(1, 300)).tolist(),
        params=SamplingParams(max_tokens=max_tokens),
        max_tokens=max_tokens,
        stop_token_ids=frozenset(),
        eos_token_ids=frozenset({0}),
        seed=number,
        metrics=RequestMetrics(0.0),
    )


def steps(count: int, waiting: int, num_steps: int, rng: np.random.Generator, prompt_len: int) -> Iterator[tuple[str, Times]]:
    """Steps of a full batch: whether it decodes alone, and what schedule, pack and commit took, in milliseconds."""
    budget = max(512, 2 * count, 8192 if prompt_len else 0)
    longer = 2 * count * prompt_len // budget + 4 * num_steps * bool(prompt_len)  # none ends before the last prompt is computed
    length = prompt_len + longer + 2048
    num_pages = count * -(-length // 16) if prompt_len else count * 64
    scheduler = Scheduler(num_pages=num_pages, page_size=16, max_model_len=length, max_num_seqs=count, max_num_batched_tokens=budget)
    buckets, sampling = make_buckets(count, budget), SamplingTable(count)
    numbers, left = itertools.count(), num_steps
    while left:
        while scheduler.num_running + scheduler.num_waiting < count + max(waiting, 0 if prompt_len else 8):
            scheduler.add(make_request(next(numbers), rng, int(rng.integers(200, 700)) + longer, prompt_len))
        times = [time.thread_time()]
        plan = scheduler.schedule()
        times.append(time.thread_time())
        assert plan is not None
        for request in plan.sampled:
            sampling.set(request.row, request, request.params, request.seed)
        bucket = find_bucket(buckets, plan.num_tokens, max(len(plan.rows), len(plan.sampled)), plan.num_decode == len(plan.rows))
        pack(plan, scheduler.table.tokens, sampling, bucket)
        times.append(time.thread_time())
        scheduler.commit(plan, rng.integers(1, 30000, len(plan.sampled)), 0.0)
        times.append(time.thread_time())
        if plan.num_decode >= count - 8 and scheduler.num_running >= count - 8 and (bucket.decode_only or not prompt_len):
            schedule, packing, commit = (1e3 * (b - a) for a, b in itertools.pairwise(times))
            yield ("decode" if bucket.decode_only else "mixed"), (schedule, packing, commit)
            left -= 1


def main() -> None:
    """Prints a line for each size, number of waiting requests and kind of step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--waiting", type=int, nargs="+", default=[0, 10_000])
    parser.add_argument("--prompt-len", type=int, default=0, help="tokens of every prompt (default: 1 to 300)")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    print("running waiting kind   steps   schedule  pack    both (best)      commit")
    for count in args.sequences:
        for waiting in args.waiting:
            kinds: dict[str, list[Times]] = {}
            for kind, times in steps(count, waiting, args.steps, np.random.default_rng(0), args.prompt_len):
                kinds.setdefault(kind, []).append(times)
            for kind, rows in sorted(kinds.items()):
                table = np.array(rows)
                both = table[:, 0] + table[:, 1]
                schedule, packing, commit = np.median(table, axis=0)
                print(f"{count:7d} {waiting:7d} {kind:<7}{len(rows):5d} {schedule:9.3f} {packing:7.3f} "
                      f"{np.median(both):7.3f} ({both.min():.3f}) {commit:9.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
