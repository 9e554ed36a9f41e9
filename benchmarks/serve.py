"""What serving costs: streams over HTTP beside `LLM.generate` on the same requests, greedy, in turns and in one run.

The clients run in a process of their own, as they do in life; on a small machine they take their share of its cores.
Start it from the repository's root: `python -m benchmarks.serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.throughput import Workload, demo_model, many, run_pjax


async def stream(client: httpx2.AsyncClient, prompt: list[int], count: int) -> tuple[float, list[int]]:
    """Seconds to the first token, and the tokens."""
    body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "stream": True, "return_token_ids": True}
    started = time.perf_counter()
    first, ids = 0.0, list[int]()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - started
                ids += json.loads(line[6:])["choices"][0]["token_ids"]
    return first, ids


async def run_clients(url: str, work: Workload) -> tuple[float, list[tuple[float, list[int]]]]:
    """All requests at once, each a stream: seconds, and what `stream` gives of each."""
    async with httpx2.AsyncClient(base_url=url, timeout=None, limits=httpx2.Limits(max_connections=None)) as client:
        started = time.perf_counter()
        answers = await asyncio.gather(*[stream(client, *request) for request in zip(work.prompts, work.num_out, strict=True)])
        return time.perf_counter() - started, answers


def client_process(url: str, work: Workload) -> tuple[float, list[tuple[float, list[int]]]]:
    """`run_clients` in a process of its own; its start is not measured."""
    given = json.dumps({"url": url, "prompts": work.prompts, "num_out": work.num_out})
    command = [sys.executable, "-m", "benchmarks.serve", "--as-clients"]
    done = subprocess.run(command, input=given, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[1])
    answer = json.loads(done.stdout)
    return answer["seconds"], answer["answers"]


def serve(model: Path, options: dict[str, Any]) -> tuple[str, Any, threading.Thread]:
    """A server on a free port."""
    from pjax import AsyncLLM
    from pjax.server import ServerConfig
    from pjax.server.app import create_app
    from pjax.server.lifecycle import Server, bind, uvicorn_config

    config = ServerConfig(model=str(model), port=0)
    listener = bind(config.host, config.port)
    app = create_app(AsyncLLM(model, **options), config)
    server = Server(uvicorn_config(app, config), app.state.service.bridge, drain_seconds=0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    return f"http://127.0.0.1:{listener.getsockname()[1]}", server, thread


def main() -> None:
    """Measures, and says by how much serving is slower."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a .gguf file or a Hugging Face folder (default: the demo model)")
    parser.add_argument("--requests", type=int, default=32, help="all at once (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--as-clients", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_clients:
        given = json.load(sys.stdin)
        seconds, answers = asyncio.run(run_clients(given["url"], Workload(given["prompts"], given["num_out"])))
        print(json.dumps({"seconds": seconds, "answers": answers}))
        return

    from pjax import LLM

    model = args.model or demo_model(parser)
    options: dict[str, Any] = {"max_model_len": 1024, "max_num_seqs": args.requests, "num_pages": 64 * args.requests, "warmup": "all"}
    options["enable_prefix_caching"] = False  # or else every round but the first would find its prompts computed
    llm = LLM(model, **options)
    url, server, thread = serve(model, options)
    work = many(args.requests, llm.engine.model_config.vocab_size)
    speeds: dict[str, list[float]] = {"offline": [], "served": []}
    firsts: list[float] = []
    for turn in range(args.rounds + 1):
        offline, made = run_pjax(llm, work)
        served, answers = client_process(url, work)
        same = sum(ids == expected for (_, ids), expected in zip(answers, made, strict=True))
        if turn == 0:
            print(f"{same} of {len(made)} requests with identical tokens", flush=True)
            continue  # warm
        for name, seconds in (("offline", offline), ("served", served)):
            speeds[name].append(sum(work.num_out) / seconds)
        firsts += [first for first, _ in answers]
        print(f"round {turn}: offline {speeds['offline'][-1]:.1f} tok/s, served {speeds['served'][-1]:.1f} tok/s", flush=True)
    ratio = statistics.median(served / offline for served, offline in zip(speeds["served"], speeds["offline"], strict=True))
    wait = statistics.median(firsts)
    print(f"{args.requests} streams: {100 * ratio:.1f}% of the offline throughput; median time to first token {wait:.2f} s")
    server.should_exit = True
    thread.join()


if __name__ == "__main__":
    main()
