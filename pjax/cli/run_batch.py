"""Runs a file of requests in OpenAI's batch format, one JSON object a line, through the same checks as the server's.

Each answer is written when it is there. Started again after an interruption, it runs only what has no answer yet.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import uuid
from pathlib import Path
from typing import IO, Any

from pjax.cli.common import ONE_HOST, add_engine, server_config
from pjax.cli.flags import Parser
from pjax.errors import ConfigError

URLS = ("/v1/chat/completions", "/v1/completions")


def add_arguments(parser: Parser) -> None:
    """Files and model."""
    parser.add_argument("-i", "--input", type=Path, required=True, metavar="FILE", help="requests: custom_id, method, url and body")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="answers; those that it holds are not asked again")
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="NAME", help="a Hugging Face folder, a .gguf file or a hub id (default: the demo model)")
    group.add_argument("--tokenizer", metavar="NAME", help="a path or hub id, where it is not the model's")
    group.add_argument("--served-model-name", action="append", metavar="TEXT", help="what the requests call the model; repeatable")
    add_engine(parser, ONE_HOST)


def run(args: argparse.Namespace) -> int:
    """Answers every request; 0 when each was answered with 200, else 1."""
    requests = read_requests(args.input)
    done = read_answers(args.output)
    left = [request for request in requests if request["custom_id"] not in done]
    config = server_config(args)
    if not left:
        print(f"all {len(requests)} requests have their answers in {args.output}", file=sys.stderr)
        return 0
    from pjax.engine import AsyncLLM

    llm = AsyncLLM(config.model, tokenizer=config.tokenizer, progress=sys.stderr.isatty(), **vars(config.engine))
    try:
        with args.output.open("a", encoding="utf-8") as file:
            failed = asyncio.run(answer_all(llm, config, left, file))
    finally:
        llm.close()
    print(f"{len(left) - failed} requests answered, {failed} failed, {len(requests) - len(left)} were there already", file=sys.stderr)
    return 1 if failed else 0


def read_requests(path: Path) -> list[dict[str, Any]]:
    """The requests. ConfigError, with the number of the line, when one is not as it must be: nothing has run by then."""
    found: dict[str, dict[str, Any]] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--input {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            request = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where}: no JSON: {error}") from None
        if not isinstance(request, dict) or not isinstance(request.get("body"), dict) or not isinstance(request.get("custom_id"), str):
            raise ConfigError(f"{where}: must be an object with a custom_id (text) and a body (object)")
        if request.get("method", "POST") != "POST" or request.get("url") not in URLS:
            raise ConfigError(f"{where}: is {request.get('method')} {request.get('url')}, but must be POST to one of {', '.join(URLS)}")
        if request["body"].get("stream"):
            raise ConfigError(f"{where}: stream is set, but a batch has no streams")
        if request["custom_id"] in found:
            raise ConfigError(f"{where}: custom_id {request['custom_id']!r} is there twice")
        found[request["custom_id"]] = request
    return list(found.values())


def read_answers(path: Path) -> set[str]:
    """Ids that have an answer. A last line that an interruption cut is removed."""
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    try:
        return {str(json.loads(line)["custom_id"]) for line in whole.splitlines() if line.strip()}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--output {path} holds something else than answers: {error}") from None


async def answer_all(llm: Any, config: Any, requests: list[dict[str, Any]], file: IO[str]) -> int:
    """Asks the server's own application, in this process; how many requests failed."""
    import httpx2
    from tqdm import tqdm

    from pjax.server.app import create_app

    transport = httpx2.ASGITransport(create_app(llm, config))
    room = asyncio.Semaphore(2 * llm.engine.config.max_num_seqs)
    headers = {"Authorization": f"Bearer {config.api_keys[0]}"} if config.api_keys else {}
    failed = 0
    async with httpx2.AsyncClient(transport=transport, base_url="http://batch", timeout=None, headers=headers) as client:
        with tqdm(total=len(requests), desc="Answering", unit="req", disable=None, dynamic_ncols=True) as bar:

            async def answer(request: dict[str, Any]) -> None:
                nonlocal failed
                async with room:
                    response = await client.post(request["url"], json=request["body"])
                failed += response.status_code != 200
                file.write(json.dumps(as_line(request, response), ensure_ascii=False) + "\n")
                file.flush()
                bar.update()

            async with asyncio.TaskGroup() as group:
                for request in requests:
                    group.create_task(answer(request))
    os.fsync(file.fileno())
    return failed


def as_line(request: dict[str, Any], response: Any) -> dict[str, Any]:
    """An answer in OpenAI's batch format."""
    body = response.json()
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": request["custom_id"],
        "response": {"status_code": response.status_code, "request_id": response.headers.get("x-request-id", ""), "body": body},
        "error": None if response.status_code == 200 else body.get("error", body),
    }
