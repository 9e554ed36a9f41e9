"""One host of several, or one by itself: makes an engine and does what it is told.

    python -m tests.hosts.worker WHAT FOLDER OPTIONS

On ranks other than 0 `LLM` does not return; that is what is tested.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from pjax import LLM, BeamSearchParams, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True, logprobs=2, prompt_logprobs=1)
SAMPLES = SamplingParams(n=2, seed=5, temperature=0.8, top_k=30, top_p=0.9, max_tokens=10, ignore_eos=True)
RULES = SamplingParams(
    temperature=1.0, repetition_penalty=1.3, logit_bias={3: 2.0, 9: -5.0}, bad_words_ids=[[4, 5], [7]], stop_token_ids=[11],
    min_tokens=4, max_tokens=10,
)  # fmt: skip
BEAMS = BeamSearchParams(beam_width=2, max_tokens=8)


def prompts(vocab: int = 60) -> list[list[int]]:
    """Two of which begin alike."""
    rng = np.random.default_rng(3)
    shared = rng.integers(0, vocab, 20).tolist()
    return [shared + rng.integers(0, vocab, 5).tolist(), rng.integers(0, vocab, 3).tolist(), [*shared, 7]]


def crowd(llm: LLM) -> dict[str, Any]:
    """Greedy requests, samples with and without a seed, rules and beams, all at once: tokens, log-probabilities, and what happened."""
    engine, names, done = llm.engine, list[str](), dict[str, Any]()
    compiled = engine.runner.num_compilations
    for prompt in prompts():
        names += [engine.add_request(prompt, params) for params in (GREEDY, SAMPLES, RULES)]
    names.append(engine.add_request(prompts()[0], BEAMS))
    sent, announce = list[int](), engine.runner.announce
    if announce is not None:
        engine.runner.announce = lambda data: (sent.append(len(data)), announce(data))[1]
    while engine.has_unfinished_requests:
        done |= {output.request_id: output for output in engine.step() if output.finished}
        engine.scheduler.check()
    outputs = [done[name] for name in names]

    def scores(positions: Any) -> Any:
        return [[[int(token), one.logprob, one.rank] for token, one in (position or {}).items()] for position in positions or ()]

    return {
        "tokens": [[list(map(int, one.token_ids)) for one in output.outputs] for output in outputs],
        "logprobs": [scores(output.outputs[0].logprobs) + scores(output.prompt_logprobs) for output in outputs],
        "preemptions": sum(output.metrics.num_preemptions for output in outputs),
        "cached": sum(output.num_cached_tokens or 0 for output in outputs),
        "saved": engine.scheduler.kv.swap.num_saved_pages,
        "restored": engine.scheduler.kv.swap.num_restored_pages,
        "compiled": engine.runner.num_compilations - compiled,
        "largest_message": max(sent, default=0),
    }


def load(llm: LLM) -> None:
    """Generates until somebody ends it; a line each time."""
    while True:
        llm.generate(prompts(), SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), use_tqdm=False)
        print("generated", flush=True)


def main(what: str, folder: str, options: dict[str, Any]) -> None:
    """Does it."""
    llm = LLM(Path(folder), skip_tokenizer_init=True, **options)
    assert options.get("node_rank", 0) == 0, "a follower does not come here"
    if what == "crowd":
        print(json.dumps(crowd(llm)), flush=True)
    elif what == "load":
        load(llm)
    elif what == "fail":  # a step that rank 0 alone can't do
        llm.engine.runner.programs._compiled.clear()
        llm.engine.runner.programs.compile_it = lambda shape: 1 / 0
        load(llm)
    elif what == "exit":
        sys.exit(3)
    print("pid", os.getpid(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
