"""Runs a file of requests in OpenAI's batch format, one JSON object a line, through the same checks as the server's.

Each answer is written when it is there. Started again, it runs what has no answer yet, and again what failed. A line that is no
request gets an error with its number; the others are answered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import stat
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pjax.cli.common import ONE_HOST, add_engine, server_config
from pjax.cli.flags import Parser
from pjax.errors import ConfigError, EngineDeadError

MAX_LINE = 1 << 28  # bytes; a device without line breaks is not read for ever
BEGIN = b'{"id": "batch_req_'  # of each line that this command writes
INVALID_LINE = "invalid_line"
URLS = ("/v1/chat/completions", "/v1/completions")


def add_arguments(parser: Parser) -> None:
    """Files and model."""
    parser.add_argument("-i", "--input", type=Path, required=True, metavar="FILE", help="requests: custom_id, method, url and body")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="answers; requests that have theirs in it already are not asked again",
    )
    parser.add_argument("--keep-errors", action="store_true", help="requests that failed before keep their errors, and are not asked again")
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="NAME", help="a Hugging Face folder, a .gguf file or a hub id (default: the demo model)")
    group.add_argument("--tokenizer", metavar="NAME", help="a path or hub id, where it is not the model's")
    group.add_argument("--served-model-name", action="append", metavar="TEXT", help="what the requests call the model; repeatable")
    add_engine(parser, ONE_HOST)


def run(args: argparse.Namespace) -> int:
    """Answers every request; 0 when each was answered with 200, else 1."""
    check_files(args.input, args.output)
    requests = read_requests(args.input)
    answers = read_answers(args.output)
    done = answers.answered | (answers.failed if args.keep_errors else set())
    left = [request for request in requests if request.key not in done]
    num_kept = sum(request.key in done - answers.answered for request in requests)
    config = server_config(args)
    if not left:
        told = f"{num_kept} of {len(requests)} requests failed before" if num_kept else f"all {len(requests)} requests have their answers"
        print(f"{told} in {args.output}", file=sys.stderr)
        return 1 if num_kept else 0
    with args.output.open("ab"):  # a folder that is missing or read only is told before the model is loaded
        pass
    progress = Progress()
    try:
        run_all(left, args.output, answers, config, progress, keep_errors=args.keep_errors)
    except EngineDeadError as error:
        num_left = len(left) - progress.num_answered - progress.num_failed
        print(f"{error}: {num_left} requests have no answer yet; run the same command again", file=sys.stderr)
        return 1
    there = f"{len(requests) - len(left)} were there already" + (f", {num_kept} of them failed" if num_kept else "")
    print(f"{progress.num_answered} requests answered, {progress.num_failed} failed, {there}", file=sys.stderr)
    return 1 if progress.num_failed or num_kept else 0


def check_files(source: Path, output: Path) -> None:
    """ConfigError when the output cannot be a file of answers: it is the input, a device or a folder."""
    if not output.exists():
        return
    if not stat.S_ISREG(output.stat().st_mode):
        raise ConfigError(f"--output {output} is no regular file")
    if source.exists() and output.samefile(source):
        raise ConfigError(f"--output {output} is the input, {source}")


@dataclass(frozen=True)
class BatchRequest:
    """One line of the input.

    Args:
      number: the line's, from 1.
      custom_id: None when it cannot be read.
      problem: why it is no request; None for one that is.
    """

    number: int
    custom_id: str | None
    url: str = ""
    body: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None

    @property
    def key(self) -> str | int:
        """What its answer is found by: the custom_id, or the number of a line that is no request."""
        return self.number if self.problem is not None or self.custom_id is None else self.custom_id


@dataclass
class Answers:
    """What an output file holds: keys of requests that were answered or failed, and the bytes of its whole lines."""

    answered: set[str | int] = field(default_factory=set)
    failed: set[str | int] = field(default_factory=set)
    num_bytes: int = 0


@dataclass
class Progress:
    """Counts of a run."""

    num_answered: int = 0
    num_failed: int = 0


def lines_of(path: Path, flag: str) -> Iterator[bytes]:
    """Lines with their ends. ConfigError when the file is not readable, or has a line without end."""
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE):
                if len(line) == MAX_LINE:
                    raise ConfigError(f"{flag} {path} has a line of more than {MAX_LINE} bytes")
                yield line
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error}") from error


def read_requests(path: Path) -> list[BatchRequest]:
    """The requests, those among them that are none with their problem. ConfigError when the file is not readable."""
    found: list[BatchRequest] = []
    names: set[str | int] = set()
    for number, line in enumerate(lines_of(path, "--input"), 1):
        if not line.removeprefix(b"\xef\xbb\xbf").strip():
            continue
        request = read_request(number, line, f"{path}:{number}")
        if request.problem is None and request.key in names:
            request = BatchRequest(number, request.custom_id, problem=f"{path}:{number}: custom_id {request.key!r} is there twice")
        elif request.problem is None:
            names.add(request.key)
        found.append(request)
    return found


def read_request(number: int, line: bytes, where: str) -> BatchRequest:
    """One line's request, or its problem."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return BatchRequest(number, None, problem=f"{where}: no JSON: {error}")
    name = value.get("custom_id") if isinstance(value, dict) else None
    name = name if isinstance(name, str) else None
    if name is None or not isinstance(value.get("body"), dict):
        return BatchRequest(number, name, problem=f"{where}: must be an object with a custom_id (text) and a body (object)")
    if value.get("method", "POST") != "POST" or value.get("url") not in URLS:
        told = f"{where}: is {value.get('method')} {value.get('url')}, but must be POST to one of {', '.join(URLS)}"
        return BatchRequest(number, name, problem=told)
    if value["body"].get("stream"):
        return BatchRequest(number, name, problem=f"{where}: stream is set, but a batch has no streams")
    return BatchRequest(number, name, value["url"], value["body"])


def read_answers(path: Path) -> Answers:
    """What the file holds, which is not changed. A last line that an interruption has cut does not count.

    Raises ConfigError when any line is no answer of a batch, or the last one no beginning of one.
    """
    answers = Answers()
    if not path.exists():
        return answers
    for number, line in enumerate(lines_of(path, "--output"), 1):
        if not line.endswith(b"\n"):
            if not (line.startswith(BEGIN) or BEGIN.startswith(line)):
                raise ConfigError(f"--output {path}:{number} is no answer of a batch")
            return answers
        answers.num_bytes += len(line)
        if line.strip():
            key, is_failed = read_answer(line, f"--output {path}:{number}")
            (answers.failed if is_failed else answers.answered).add(key)
    answers.failed -= answers.answered
    return answers


def read_answer(line: bytes, where: str) -> tuple[str | int, bool]:
    """(key of the request, whether it failed)."""
    try:
        value = json.loads(line)
        error, response = value["error"], value["response"]
        if isinstance(error, dict) and error.get("code") == INVALID_LINE:
            return int(error["line"]), True
        if not isinstance(value["custom_id"], str):
            raise TypeError("custom_id is no text")
        return value["custom_id"], error is not None or response["status_code"] != 200
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"{where} is no answer of a batch") from None


def open_answers(path: Path, answers: Answers, *, keep_errors: bool) -> BinaryIO:
    """The file, to append answers. What an interruption has cut is removed from it, and errors of requests that are asked again."""
    if not answers.failed or keep_errors:
        os.truncate(path, answers.num_bytes)
        return path.open("ab")
    target = path.resolve()
    draft = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with draft.open("wb") as file:
            for line in lines_of(target, "--output"):
                if line.strip() and line.endswith(b"\n") and not read_answer(line, str(path))[1]:
                    file.write(line)
            file.flush()
            os.fsync(file.fileno())
        draft.chmod(stat.S_IMODE(target.stat().st_mode))
        draft.replace(target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return path.open("ab")


def run_all(requests: Sequence[BatchRequest], path: Path, answers: Answers, config: Any, progress: Progress, *, keep_errors: bool) -> None:
    """Writes an answer for each request; the model is loaded only if one of them needs it. EngineDeadError when the engine dies."""
    good = [request for request in requests if request.problem is None]
    if not good:
        with open_answers(path, answers, keep_errors=keep_errors) as file:
            write_problems(requests, file, progress)
        return
    from pjax.engine import AsyncLLM

    llm = AsyncLLM(config.model, tokenizer=config.tokenizer, progress=sys.stderr.isatty(), **vars(config.engine))
    try:
        with open_answers(path, answers, keep_errors=keep_errors) as file:
            write_problems(requests, file, progress)
            asyncio.run(answer_all(llm, config, good, file, progress))
    finally:
        llm.close()


def write_problems(requests: Sequence[BatchRequest], file: BinaryIO, progress: Progress) -> None:
    """An error for each line that is no request."""
    for request in requests:
        if request.problem is not None:
            progress.num_failed += 1
            write(file, failure(request, request.problem, INVALID_LINE))


async def answer_all(llm: Any, config: Any, requests: Sequence[BatchRequest], file: BinaryIO, progress: Progress) -> None:
    """Asks the server's own application, in this process, and writes each answer. EngineDeadError when the engine dies meanwhile."""
    import httpx2
    from tqdm import tqdm

    from pjax.server.app import create_app

    app = create_app(llm, config)
    room = asyncio.Semaphore(2 * llm.engine.config.max_num_seqs)
    headers = {"Content-Type": "application/json"}
    if config.api_keys:
        headers["Authorization"] = f"Bearer {config.api_keys[0]}"
    client = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://batch", timeout=None, headers=headers)
    with tqdm(total=len(requests), desc="Answering", unit="req", disable=None, dynamic_ncols=True) as bar:

        async def answer(request: BatchRequest) -> None:
            async with room:
                line = await answer_one(client, request)
            if not llm.is_running and line["error"] is not None:
                raise EngineDeadError(f"the engine died: {type(llm.error).__name__}: {llm.error}")
            write(file, line)
            progress.num_failed += line["error"] is not None
            progress.num_answered += line["error"] is None
            bar.update()

        try:
            async with client, asyncio.TaskGroup() as group:
                for request in requests:
                    group.create_task(answer(request))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            app.state.service.close()
    os.fsync(file.fileno())


async def answer_one(client: Any, request: BatchRequest) -> dict[str, Any]:
    """One request's line."""
    try:
        response = await client.post(request.url, content=json.dumps(request.body))
        return as_line(request, response)
    except Exception as error:  # whatever is odd about one request, the others go on
        return failure(request, f"{type(error).__name__}: {error}", "request_failed")


def write(file: BinaryIO, line: dict[str, Any]) -> None:
    """Writes a line at once, so that an interruption loses no answer."""
    text = json.dumps(line, ensure_ascii=False)
    try:
        data = text.encode()
    except UnicodeEncodeError:  # a custom_id that is no Unicode text
        data = json.dumps(line).encode()
    file.write(data + b"\n")
    file.flush()


def as_line(request: BatchRequest, response: Any) -> dict[str, Any]:
    """An answer in OpenAI's batch format."""
    body = response.json()
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": request.custom_id,
        "response": {"status_code": response.status_code, "request_id": response.headers.get("x-request-id", ""), "body": body},
        "error": None if response.status_code == 200 else body.get("error", body),
    }


def failure(request: BatchRequest, message: str, code: str) -> dict[str, Any]:
    """The line of a request that got no answer."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code, "line": request.number}
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": request.custom_id, "response": None, "error": error}
