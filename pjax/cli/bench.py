"""Measures: the latency of one batch, the throughput of many requests at once, or a running server under load.

All figures are printed, and written with --json; nothing is left out of them but the warm-up.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pjax.cli.bench_data import percentiles, random_requests, rates, read_dataset
from pjax.cli.breakdown import break_down
from pjax.cli.common import add_model, engine_options, model_or_demo
from pjax.cli.flags import Parser, make_parser, size
from pjax.errors import ConfigError


def add_arguments(parser: Parser) -> None:
    """A command for each measurement."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    latency = make_parser(
        "pjax bench latency", "Times one batch of equal requests from first to last token.", kinds, "latency", "one batch"
    )
    latency.add_argument("--batch-size", type=size, default=1, metavar="N", help="requests at once (default: 1)")
    latency.add_argument("--num-iters", type=size, default=5, metavar="N", help="batches that count (default: 5)")
    latency.add_argument("--num-iters-warmup", type=size, default=1, metavar="N", help="batches before them (default: 1)")
    latency.add_argument("--breakdown", action="store_true", help="one more batch, traced: attention, products, sampling, host")
    text = "Runs all requests at once and counts requests and tokens a second."
    throughput = make_parser("pjax bench throughput", text, kinds, "throughput", "many requests at once")
    text = "Sends requests to a server as they would arrive, and measures what a client sees."
    serve = make_parser("pjax bench serve", text, kinds, "serve", "a running server under load")
    serve.add_argument("--url", default="http://localhost:8000", metavar="URL", help="of the server (default: %(default)s)")
    serve.add_argument("--api-key", metavar="KEY", help="for it (better in PJAX_API_KEY than in the list of processes)")
    serve.add_argument("--request-rate", type=float, metavar="X", help="requests a second, as a Poisson process (default: all at once)")
    serve.add_argument("--max-concurrency", type=size, metavar="N", help="most requests open at once")
    for sub in (throughput, serve):
        sub.add_argument("--num-prompts", type=size, default=64, metavar="N", help="requests (default: 64)")
        sub.add_argument("--range-ratio", type=float, default=0.0, metavar="X", help="lengths vary by this share, evenly (default: 0)")
        sub.add_argument("--dataset", type=Path, metavar="FILE", help='JSON lines {"prompt": …, "max_tokens": …} instead of random tokens')
    for sub in (latency, throughput, serve):
        sub.add_argument("--input-len", type=size, default=128, metavar="N", help="tokens of a prompt (default: 128)")
        sub.add_argument("--output-len", type=size, default=128, metavar="N", help="tokens to generate (default: 128)")
        sub.add_argument("--bench-seed", type=int, default=0, metavar="N", help="of prompts and arrivals (default: 0)")
        sub.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    serve.add_argument("--model", metavar="NAME", help="the name that the server knows (default: its first)")
    serve.add_argument("--vocab-size", type=size, default=10_000, metavar="N", help="random tokens are below this (default: 10000)")
    for sub in (latency, throughput):
        add_model(sub, warmup="all")


def run(args: argparse.Namespace) -> int:
    """Measures; 1 when a request failed."""
    for name in ("batch_size", "num_iters", "num_prompts", "input_len", "output_len", "max_concurrency", "vocab_size"):
        if (value := getattr(args, name, None)) is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, but must be >= 1")
    if not 0 <= getattr(args, "range_ratio", 0) < 1:
        raise ConfigError(f"--range-ratio is {args.range_ratio}, but must be in [0, 1)")
    if (rate := getattr(args, "request_rate", None)) is not None and not rate > 0:
        raise ConfigError(f"--request-rate is {rate}, but must be > 0")
    if args.json is not None:
        with args.json.open("ab"):  # where it cannot be written, that is told before anything is measured
            pass
    if args.kind == "serve":
        from pjax.cli.bench_serve import bench_serve

        figures = bench_serve(args)
    else:
        figures = (latency if args.kind == "latency" else throughput)(args)
    report(figures)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 1 if figures.get("failed") else 0


def latency(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of one batch, in percentiles over its repetitions."""
    llm, params = _open(args), _params([args.output_len])[0]
    prompts = [ids for ids, _ in random_requests(args, args.batch_size, llm.engine.model_config.vocab_size)]
    rounds = itertools.count()

    def batch() -> float:
        # Prompts differ from round to round, so that no round finds the pages of the one before.
        index = next(rounds)
        moved = [ids[index % len(ids) :] + ids[: index % len(ids)] for ids in prompts]
        started = time.perf_counter()
        llm.generate(moved, params, use_tqdm=False)
        return time.perf_counter() - started

    taken = [batch() for _ in range(args.num_iters_warmup + args.num_iters)][args.num_iters_warmup :]
    tokens = args.batch_size * args.output_len
    mean = sum(taken) / len(taken)
    figures = {"batch_size": args.batch_size, "latency_s": percentiles(taken), "output_tokens_per_s": tokens / mean, "runs_s": taken}
    return figures | ({"breakdown": break_down(llm, batch)} if args.breakdown else {})


def throughput(args: argparse.Namespace) -> dict[str, Any]:
    """Requests and tokens a second, from the first request to the end of the last."""
    llm = _open(args)
    requests = read_dataset(args.dataset, args.output_len) if args.dataset else None
    requests = requests or random_requests(args, args.num_prompts, llm.engine.model_config.vocab_size)
    prompts, lengths = [prompt for prompt, _ in requests], [length for _, length in requests]
    llm.generate(prompts[0], _params([2])[0], use_tqdm=False)
    started = time.perf_counter()
    outputs = llm.generate(prompts, _params(lengths))
    seconds = time.perf_counter() - started
    num_in = sum(len(output.prompt_token_ids) for output in outputs)
    num_out = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {
        "requests": len(outputs),
        **rates(len(outputs), num_in, num_out, seconds),
        "preemptions": sum(output.metrics.num_preemptions for output in outputs),
    }


def _open(args: argparse.Namespace) -> Any:
    from pjax.llm import LLM

    return LLM(model_or_demo(args.model), tokenizer=args.tokenizer, progress=sys.stderr.isatty(), **engine_options(args))


def _params(lengths: Sequence[int]) -> list[Any]:
    from pjax.params import SamplingParams

    return [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in lengths]


def report(figures: dict[str, Any]) -> None:
    """Prints the figures, one a line."""
    for text in figures.get("errors", ()):
        print(f"pjax bench: {text}", file=sys.stderr)
    for name, value in figures.items():
        if name == "breakdown":
            print("breakdown: milliseconds a step, and the shares of its parts in percent")
            report(value)
        elif isinstance(value, dict):
            print(f"{name:<22} " + "  ".join(f"{key} {number:.4g}" for key, number in value.items()))
        elif not isinstance(value, list):
            print(f"{name:<22} {value:.4g}" if isinstance(value, float) else f"{name:<22} {value}")
