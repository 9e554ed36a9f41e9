"""What each sampling parameter costs: the sampler of a step, compiled once, with logits that are there already.

Every case runs the same program; all that differs is what the rows ask for. `argmax` is the floor: the likeliest token and
nothing else. The cases take turns, so that a noisy machine hurts all of them; medians, and their ratio to `greedy`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjax.params import LogitRules, SamplingParams
from pjax.sampling.adjust import adjust_logits
from pjax.sampling.parameters import SamplingArrays, SamplingTable, flags_of
from pjax.sampling.sampler import sample
from pjax.sampling.token_rules import as_row, empty_tables, write_row

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # fields of SamplingParams, and of LogitRules
    "greedy": ({}, {}),
    "allowed_token_ids": ({}, {"allowed": frozenset(range(0, 4096, 2))}),
    "logit_bias": ({}, {"bias": tuple((token, 1.0) for token in range(300))}),
    "min_tokens": ({"min_tokens": 4096}, {"stops": frozenset([2])}),
    "bad_words": ({}, {"bad_sequences": tuple((token, token + 1) for token in range(100))}),
    "presence_penalty": ({"presence_penalty": 1}, {}),
    "repetition_penalty": ({"repetition_penalty": 1.2}, {}),
    "logprobs": ({"logprobs": 5}, {}),
    "temperature": ({"temperature": 1}, {}),
    "temperature, top_k, top_p": ({"temperature": 1, "top_k": 50, "top_p": 0.9}, {}),
    "temperature, typical_p": ({"temperature": 1, "typical_p": 0.9}, {}),
    "temperature, penalties": ({"temperature": 1, "repetition_penalty": 1.2, "frequency_penalty": 1}, {}),
}


def make_cases(rows: int, vocab: int, num_prompt: int, num_output: int) -> dict[str, Callable[[], Any]]:
    """Calls that wait for their tokens."""
    rng = np.random.default_rng(0)
    logits = jax.device_put(rng.standard_normal((rows, vocab)).astype(np.float32) * 4)
    tokens = jax.device_put(rng.integers(0, vocab, (rows, num_prompt + num_output + 1)).astype(np.int32))
    positions = np.full(rows, num_prompt + num_output, np.int32)

    def step(logits: Any, positions: Any, packed: Any, tables: Any, tokens: Any) -> Any:
        def adjust(x: jax.Array, positions: jax.Array, params: SamplingArrays) -> jax.Array:
            return adjust_logits(x, positions, params, tables, tokens)

        return sample(logits, positions, packed.unpack(), 32, adjust=adjust)

    programs: list[Any] = []
    floor = jax.jit(lambda x: jnp.argmax(x, axis=-1)).lower(logits).compile()
    calls: dict[str, Callable[[], Any]] = {"argmax": lambda: jax.block_until_ready(floor(logits))}
    for name, (fields, rule_fields) in CASES.items():
        table, tables, rules = SamplingTable(rows), empty_tables(rows, vocab), LogitRules(**rule_fields)
        params = SamplingParams(**{"temperature": 0, "max_tokens": None} | fields)
        one = as_row(rules, vocab)
        for row in range(rows):
            table.set(row, object(), params, row, prompt_len=num_prompt, flags=flags_of(rules, []))
            tables = write_row(tables, np.int32(row), one) if rule_fields else tables
        packed = jax.device_put(table.gather(np.arange(rows, dtype=np.int32), rows))
        if not programs:
            started = time.perf_counter()
            programs.append(jax.jit(step).lower(logits, positions, packed, tables, tokens).compile())
            print(f"{rows} rows of {vocab} tokens; the sampler compiles in {time.perf_counter() - started:.2f} s")
        arguments = logits, jax.device_put(positions), packed, tables, tokens
        calls[name] = lambda arguments=arguments: jax.block_until_ready(programs[0](*arguments))  # type: ignore[misc]
    return calls


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt (default: 512)")
    parser.add_argument("--output", type=int, default=256, help="tokens that each row has generated (default: 256)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    calls = make_cases(args.rows, args.vocab, args.prompt, args.output)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(args.rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - started))
    medians = {name: statistics.median(one) for name, one in times.items()}
    for name, median in medians.items():
        print(f"{name:<28} {median:8.2f} ms   {median / medians['greedy']:6.2f} x greedy   best {min(times[name]):8.2f}")
    if args.json is not None:
        args.json.write_text(json.dumps(times, indent=2))


if __name__ == "__main__":
    main()
