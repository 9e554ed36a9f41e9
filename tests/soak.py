"""Thousands of random requests through one small engine that has too little memory: `make soak`.

Prompts with and without common beginnings, samples, beams, stops, priorities, deadlines and aborts, in a pool that is 30% of what
the rows want. Each request must end as it should, greedy ones with the tokens that they have alone; at the end every page and
slot is free, nothing was compiled since warm-up, and the process has not grown. Exits with 1 and says what broke otherwise.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from pjax import BeamSearchParams, SamplingParams
from pjax.config import EngineConfig
from pjax.engine import LLMEngine
from pjax.outputs import RequestOutput
from tests.tiny import CONFIG, write_model

VOCAB, EOS = CONFIG["vocab_size"], CONFIG["eos_token_id"]
PAGE_SIZE, ROWS, LENGTH = 4, 16, 96
SHARE = 0.3
SIZES: dict[str, Any] = {"max_model_len": LENGTH, "max_num_seqs": ROWS, "max_num_batched_tokens": 64, "page_size": PAGE_SIZE}


@dataclass
class Asked:
    """One request, and how it may end."""

    prompt: list[int]
    params: SamplingParams | BeamSearchParams
    options: dict[str, Any]
    expected: list[int] | None = None
    aborted: bool = False

    @property
    def num_sequences(self) -> int:
        """Sequences of its output."""
        return self.params.beam_width if isinstance(self.params, BeamSearchParams) else self.params.n


@dataclass
class Figures:
    """What a soak has seen."""

    reasons: Counter[str] = field(default_factory=Counter)
    num_compared: int = 0
    num_preemptions: int = 0
    num_restored_pages: int = 0
    num_cached_tokens: int = 0
    num_steps: int = 0
    grown_bytes: int = 0
    """Memory that the process gained in the second half."""


def draw(rng: random.Random, bases: list[list[int]]) -> Asked:
    """Any request that the engine takes."""
    base = rng.choice(bases)
    prompt = base[: rng.randint(0, len(base))] + [rng.randrange(256) for _ in range(rng.randint(1, 12))]
    max_tokens = rng.choice([1, 2, rng.randint(3, 20), rng.randint(3, 44)])
    options: dict[str, Any] = {
        "priority": rng.choice([0, 0, 0, -1, 3]),
        "timeout": rng.choice([None] * 30 + [0.005, 0.1]),
        "cache_salt": rng.choice([None] * 9 + ["salt"]),
    }
    kind = rng.random()
    if kind < 0.08:
        beams = BeamSearchParams(beam_width=rng.randint(1, 5), max_tokens=min(max_tokens, 16), length_penalty=rng.choice([0.0, 1.0]))
        return Asked(prompt, beams, options)
    temperature = rng.choice([0.0, 0.7, 1.0, 2.0])
    params = SamplingParams(
        n=rng.choice([1, 1, 1, 2, 4, 7]) if temperature else 1,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=rng.choice([0, 0, 1, 20]),
        top_p=rng.choice([1.0, 0.9]),
        min_p=rng.choice([0.0, 0.05]),
        seed=rng.choice([None, 7]),
        logprobs=rng.choice([None, None, None, 0, 3]),
        stop=rng.choice([(), (), ("e",), ("th", "x")]),
        stop_token_ids=rng.choice([(), (65, 66, 67)]),
        ignore_eos=rng.random() < 0.5,
    )
    return Asked(prompt, params, options)


def check_end(asked: Asked, output: RequestOutput) -> None:
    """That a finished request is what was asked for."""
    params = asked.params
    reasons = {one.finish_reason for one in output.outputs}
    early = {"abort"} if asked.aborted else {"timeout"} if asked.options["timeout"] is not None else set()
    assert reasons <= {"stop", "length"} | early, (reasons, asked)
    assert output.prompt_token_ids == asked.prompt
    if not reasons & early and not (early and isinstance(params, BeamSearchParams)):
        assert len(output.outputs) == asked.num_sequences, asked
    for one in output.outputs:
        assert params.max_tokens is not None and len(one.token_ids) <= params.max_tokens
        assert all(0 <= token < VOCAB for token in one.token_ids)
        if one.finish_reason == "length":
            assert len(one.token_ids) == params.max_tokens or len(asked.prompt) + len(one.token_ids) == LENGTH, asked
        if one.finish_reason == "stop" and isinstance(params, SamplingParams):
            ends = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else {EOS})
            assert one.token_ids[-1] in ends or one.stop_reason in (params.stop or ()), (one, asked)
        if isinstance(params, SamplingParams) and params.logprobs is not None:
            assert one.logprobs is not None and len(one.logprobs) == len(one.token_ids)
    if asked.expected is not None and not reasons & early:
        assert output.outputs[0].token_ids == asked.expected, "not what it generates alone"


class Soak:
    """The engine under load, and what was asked of it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.bases = [[self.rng.randrange(256) for _ in range(40)] for _ in range(6)]
        wanted = [self._pages(draw(self.rng, self.bases)) for _ in range(2000)]
        num_pages = int(SHARE * ROWS * sum(pages for pages, _ in wanted) / sum(count for _, count in wanted))
        num_pages = max(num_pages, -(-LENGTH // PAGE_SIZE))
        self.known = self._generate_alone(folder, num_pages)
        self.engine = LLMEngine(folder, EngineConfig(**SIZES, num_pages=num_pages, seconds_per_priority=0.1), progress=False)
        self.num_compiled = self.engine.runner.num_compilations
        self.asked: dict[str, Asked] = {}
        self.figures = Figures()

    def _pages(self, asked: Asked) -> tuple[int, int]:
        """Pages that it wants without sharing, and its sequences."""
        length = min(len(asked.prompt) + (asked.params.max_tokens or 0), LENGTH)
        return asked.num_sequences * -(-length // PAGE_SIZE), asked.num_sequences

    def _generate_alone(self, folder: Path, num_pages: int) -> list[Asked]:
        """Greedy requests and their tokens, one at a time, without anything that shares or preempts."""
        config = EngineConfig(**SIZES, lazy=True, num_pages=num_pages, enable_prefix_caching=False, preemption_mode="recompute")
        engine, known = LLMEngine(folder, config, progress=False), []
        for _ in range(20):
            asked = draw(self.rng, self.bases)
            asked.params = SamplingParams(temperature=0, max_tokens=self.rng.randint(5, 40))
            asked.options["timeout"] = None
            engine.add_request(asked.prompt, asked.params)
            outputs = [output for output in iter_steps(engine) if output.finished]
            asked.expected = outputs[-1].outputs[0].token_ids
            known.append(asked)
        engine.close()
        return known

    def ask(self, number: int) -> None:
        """Adds the next request."""
        if self.rng.random() < 0.2:
            one = self.rng.choice(self.known)
            asked = Asked(one.prompt, one.params, one.options, one.expected)
        else:
            asked = draw(self.rng, self.bases)
        name = self.engine.add_request(asked.prompt, asked.params, f"request {number}", **asked.options)
        self.asked[name] = asked

    def finish(self, output: RequestOutput) -> None:
        """Takes a request's last output."""
        asked = self.asked.pop(output.request_id)
        check_end(asked, output)
        self.figures.reasons.update(one.finish_reason or "none" for one in output.outputs)
        self.figures.num_compared += asked.expected is not None and not asked.aborted
        self.figures.num_preemptions += output.metrics.num_preemptions
        self.figures.num_cached_tokens += output.num_cached_tokens or 0

    def run(self, num_requests: int, *, progress: bool = False) -> Figures:
        """Adds, steps and aborts until all have ended; AssertionError when anything is not as it should be."""
        process, half, number = psutil.Process(), 0, 0
        with tqdm(total=num_requests, desc="Soak", unit="req", disable=not progress) as bar:
            while number < num_requests or self.asked:
                while number < num_requests and len(self.asked) < 48 and self.rng.random() < 0.9:
                    self.ask(number)
                    number += 1
                    if number == num_requests // 2:
                        half = process.memory_info().rss
                if self.asked and self.rng.random() < 0.02:
                    name = self.rng.choice(list(self.asked))
                    self.asked[name].aborted = True
                    output = self.engine.abort_request(name)
                    assert output is not None and output.finished
                    self.finish(output)
                    bar.update()
                for output in self.engine.step():
                    if output.finished:
                        self.finish(output)
                        bar.update()
                self.figures.num_steps += 1
                if self.figures.num_steps % 100 == 0:
                    self.engine.scheduler.check()
        self.engine.step()  # whatever is still under way for those that were aborted
        self.figures.grown_bytes = process.memory_info().rss - half
        self._check_rest()
        return self.figures

    def _check_rest(self) -> None:
        scheduler, swap = self.engine.scheduler, self.engine.scheduler.kv.swap
        scheduler.check()
        assert not self.engine.has_unfinished_requests
        assert scheduler.pool.num_used == 0 and scheduler.table.num_free_rows == ROWS
        assert swap.pool is None or swap.pool.num_used == 0
        assert self.engine.runner.num_compilations == self.num_compiled, "a step was compiled after warm-up"
        self.figures.num_restored_pages = swap.num_restored_pages


def iter_steps(engine: LLMEngine) -> list[RequestOutput]:
    """All outputs until nothing is unfinished."""
    outputs = []
    while engine.has_unfinished_requests:
        outputs += engine.step()
    return outputs


def main() -> None:
    """The long form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(write_model(Path(folder)), args.seed)
        started = time.monotonic()
        figures = soak.run(args.requests, progress=True)
        print(f"{args.requests} requests in {time.monotonic() - started:.0f} s, {soak.engine.scheduler.pool.num_pages} pages: {figures}")
        soak.engine.close()
    assert figures.grown_bytes < 32 << 20, f"the process grew by {figures.grown_bytes >> 20} MiB over the second half"


if __name__ == "__main__":
    main()
