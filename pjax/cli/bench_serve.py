"""A running server under load: what a client sees of each request."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import httpx2
import numpy as np
from tqdm import tqdm

from pjax.cli.bench_data import percentiles, random_requests, rates, read_dataset
from pjax.cli.talk import ServerError, base_url, error_text


@dataclass
class Seen:
    """What a client saw of one request; times in seconds on one clock."""

    started: float
    times: list[float] = field(default_factory=list)
    """Seconds at which each piece of text came."""
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    ended: float = 0.0
    error: str | None = None


def bench_serve(args: argparse.Namespace) -> dict[str, Any]:
    """Latencies and throughput of a server. ServerError when it is not there."""
    requests = read_dataset(args.dataset, args.output_len) if args.dataset else random_requests(args, args.num_prompts, args.vocab_size)
    return asyncio.run(_bench(args, requests))


async def _bench(args: argparse.Namespace, requests: list[tuple[Any, int]]) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    room: AbstractAsyncContextManager[Any] = asyncio.Semaphore(args.max_concurrency) if args.max_concurrency else nullcontext()
    async with httpx2.AsyncClient(base_url=base_url(args.url), headers=headers, timeout=None, limits=limits) as client:
        model = args.model or await _first_model(client)
        arrivals = np.zeros(len(requests))
        if args.request_rate:
            arrivals = np.random.default_rng(args.bench_seed).exponential(1 / args.request_rate, len(requests)).cumsum()
        started = time.perf_counter()
        with tqdm(total=len(requests), desc="Asking", unit="req", disable=None, dynamic_ncols=True) as bar:

            async def one(prompt: Any, length: int, arrival: float) -> Seen:
                await asyncio.sleep(max(started + arrival - time.perf_counter(), 0))
                async with room:
                    seen = await ask(client, {"model": model, "prompt": prompt, "max_tokens": length})
                bar.update()
                return seen

            asked = [one(prompt, length, arrival) for (prompt, length), arrival in zip(requests, arrivals, strict=True)]
            seen = await asyncio.gather(*asked)
    return summary(seen, time.perf_counter() - started)


async def _first_model(client: httpx2.AsyncClient) -> str:
    try:
        response = await client.get("models")
    except httpx2.HTTPError as error:
        raise ServerError(f"{client.base_url} does not answer: {error}") from error
    if response.status_code != 200:
        raise ServerError(error_text(response))
    return str(response.json()["data"][0]["id"])


async def ask(client: httpx2.AsyncClient, body: dict[str, Any]) -> Seen:
    """One greedy request of a fixed length, streamed."""
    body = {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}, **body}
    seen = Seen(time.perf_counter())
    try:
        async with client.stream("POST", "completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                seen.error = error_text(response)
                return seen
            done = False
            async for line in response.aiter_lines():
                if line.startswith("data:"):
                    done = _take(line[5:].strip(), seen) or done
        if not done and seen.error is None:
            seen.error = "the stream ended early"
    except (httpx2.HTTPError, ValueError) as error:
        seen.error = f"{type(error).__name__}: {error}"
    seen.ended = time.perf_counter()
    return seen


def _take(data: str, seen: Seen) -> bool:
    """One event; whether it was the last."""
    if data == "[DONE]":
        return True
    event = json.loads(data)
    if "error" in event:
        seen.error = str(event["error"])
    if event.get("choices"):
        seen.times.append(time.perf_counter())
    if usage := event.get("usage"):
        seen.num_prompt_tokens, seen.num_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    return False


def summary(seen: list[Seen], seconds: float) -> dict[str, Any]:
    """Figures of all requests. Times between tokens are those between two pieces of a stream."""
    good = [one for one in seen if one.error is None]
    errors: dict[str, int] = {}
    for one in seen:
        if one.error is not None:
            errors[one.error[:120]] = errors.get(one.error[:120], 0) + 1
    num_in, num_out = sum(one.num_prompt_tokens for one in good), sum(one.num_tokens for one in good)
    return {
        "requests": len(good),
        "failed": len(seen) - len(good),
        **rates(len(good), num_in, num_out, seconds),
        "first_token_s": percentiles([one.times[0] - one.started for one in good if one.times]),
        "between_tokens_s": percentiles([b - a for one in good for a, b in zip(one.times, one.times[1:], strict=False)]),
        "per_output_token_s": percentiles([(one.ended - one.times[0]) / (one.num_tokens - 1) for one in good if one.num_tokens > 1]),
        "end_to_end_s": percentiles([one.ended - one.started for one in good]),
        **({"errors": [f"{count} times: {text}" for text, count in errors.items()]} if errors else {}),
    }
