"""Writes text with a language model, as it is made.

Without --model it uses the demo model, a small chat model that `make generate` installs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pjax.cli.common import add_model, add_sampling, open_engine, sampling_params
from pjax.cli.flags import Parser
from pjax.errors import ConfigError

if TYPE_CHECKING:
    from pjax.engine import LLMEngine
    from pjax.outputs import RequestOutput
    from pjax.params import SamplingParams

EXAMPLES = """examples:
  pjax generate "The capital of France is" --max-tokens 8
  pjax generate --chat "Why is the sky blue?" --temperature 0.7 --seed 1
  pjax generate --chat "Name three colours." --model databricks/dolly-v2-3b --chat-template examples/dolly.jinja
  pjax generate --file prompts.txt --json > answers.jsonl
  echo "Once upon a time" | pjax generate --model ./my-llama --stats
"""


def add_arguments(parser: Parser) -> None:
    """Prompts, model, sampling and output."""
    parser.epilog = EXAMPLES
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to continue; none, or -, reads standard input as one prompt")
    parser.add_argument("--file", type=Path, metavar="PATH", help="a text file with one prompt a line")
    parser.add_argument("--chat", action="store_true", help="each prompt is a user's message; the model's chat template is applied")
    parser.add_argument("--system", metavar="TEXT", help="the system message of --chat")
    parser.add_argument("--chat-template", metavar="FILE", help="a jinja2 chat template for --chat, instead of the model's own")
    add_model(parser, leave_out=("seed",), max_num_seqs=None, lazy=True)
    add_sampling(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object a prompt, in the order of the prompts")
    output.add_argument("--stats", action="store_true", help="times and speeds on standard error when done")
    output.add_argument("--profile", metavar="DIR", help="write a trace of JAX's profiler there, for TensorBoard, XProf or Perfetto")
    output.add_argument("--verbose", action="store_true", help="log messages on standard error")


def run(args: argparse.Namespace) -> int:
    """Streams the completions; 1 when the next token of one could not be sampled, else 0."""
    if needs := [name for name, value in (("--system", args.system), ("--chat-template", args.chat_template)) if value is not None]:
        if not args.chat:
            args.parser.error(f"{', '.join(needs)}: no use without --chat")
    if args.prompts.count("-") > 1:
        args.parser.error("standard input (-) can be one prompt only")
    params = sampling_params(args)
    prompts = read_prompts(args)

    if args.verbose:
        from pjax.logs import show_logs

        show_logs()
    template = None
    if args.chat_template is not None:
        from pjax.text.chat_template import read_template

        template = read_template(Path(args.chat_template))
    if args.profile is not None:
        Path(args.profile).mkdir(parents=True, exist_ok=True)  # where it cannot be written, that is told before the model is loaded
    rows = min(len(prompts), 64) if args.max_num_seqs is None else args.max_num_seqs
    engine = open_engine(args, max_num_seqs=rows, seed=0)  # that compiles just what the prompts need
    ids = add_requests(engine, args, prompts, params, template)
    with nullcontext() if args.profile is None else profiler_trace(args.profile):
        outputs = show(in_order(engine, ids), prompts, args.json)
    if args.stats:
        print_stats(outputs, engine.runner.num_compilations)
    engine.close()
    return int(any(output.outputs[0].finish_reason == "error" for output in outputs))  # the engine's warning says why


def read_prompts(args: argparse.Namespace) -> list[str]:
    """From the arguments, a file, or standard input."""
    prompts = [sys.stdin.read().rstrip("\n") if prompt == "-" else prompt for prompt in args.prompts]
    if args.file is not None:
        try:
            lines = args.file.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--file {args.file}: {error}") from error
        prompts += [line for line in lines if line.strip()]
    if not prompts and args.file is None and not sys.stdin.isatty():
        prompts = [text] if (text := sys.stdin.read().rstrip("\n")) else []
    if not prompts:
        raise ConfigError("there is no prompt; give one as an argument, by --file, or on standard input (see --help)")
    return prompts


def add_requests(
    engine: LLMEngine, args: argparse.Namespace, prompts: list[str], params: SamplingParams, template: str | None
) -> list[str]:
    """Queues every prompt; the ids, in their order."""
    ids = []
    for text in prompts:
        prompt: str | list[int] = text
        if args.chat and engine.tokenizer is not None:
            messages = [{"role": "system", "content": args.system}] if args.system is not None else []
            messages.append({"role": "user", "content": text})
            chat = engine.tokenizer.apply_chat_template(messages, chat_template=template)
            prompt = engine.tokenizer.encode(chat, add_special_tokens=False)
        ids.append(engine.add_request(prompt, params))
    engine.prefetch()
    return ids


def in_order(engine: LLMEngine, ids: list[str]) -> Iterator[RequestOutput]:
    """Outputs in the order of the prompts: of the first that is not finished as it grows, of later ones when their turn comes."""
    latest: dict[str, RequestOutput] = {}
    turn = 0
    while turn < len(ids):
        for output in engine.step():
            latest[output.request_id] = output
        while turn < len(ids) and ids[turn] in latest:
            output = latest[ids[turn]]
            yield output
            if not output.finished:
                break
            turn += 1


def show(outputs: Iterator[RequestOutput], prompts: list[str], as_json: bool) -> list[RequestOutput]:
    """Prints texts as they grow, or finished ones as JSON."""
    finished: list[RequestOutput] = []
    shown = titled = 0
    for output in outputs:
        answer = output.outputs[0]
        if not as_json:
            if len(prompts) > 1 and titled == len(finished):
                print(f"── {prompts[titled]}")
                titled += 1
            print(answer.text[shown:], end="", flush=True)
            shown = len(answer.text)
        if output.finished:
            print(json.dumps(as_record(output, prompts[len(finished)]), ensure_ascii=False) if as_json else "", flush=True)
            finished.append(output)
            shown = 0
    return finished


def as_record(output: RequestOutput, prompt: str) -> dict[str, Any]:
    """What --json prints."""
    answer = output.outputs[0]
    return {
        "prompt": prompt,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "token_ids": answer.token_ids,
    }


def print_stats(outputs: list[RequestOutput], compilations: int) -> None:
    """Times and speeds, on standard error."""
    began = time.monotonic() - process_age()
    firsts = [output.metrics.first_token_time or 0.0 for output in outputs]
    first, last = min(firsts), max(output.metrics.finished_time or 0.0 for output in outputs)
    num_in = sum(len(output.prompt_token_ids) for output in outputs)
    num_cached = sum(output.num_cached_tokens or 0 for output in outputs)
    num_out = sum(len(output.outputs[0].token_ids) for output in outputs)
    later = num_out - sum(1 for time_of_first in firsts if time_of_first == first)
    lines = [
        f"prompts          {len(outputs)} ({num_in} tokens in, {num_cached} of them cached, {num_out} out)",
        f"first token      {first - began:.2f} s after the process began",
        f"generation       {last - first:.2f} s after the first token, {later / max(last - first, 1e-9):.1f} tokens/s",
        f"compiled         {compilations} programs",
        f"preemptions      {sum(output.metrics.num_preemptions for output in outputs)}",
    ]
    print("\n".join(lines), file=sys.stderr)


def process_age() -> float:
    """Seconds since this process began: on Linux in hundredths. (psutil counts from a boot time in whole seconds there.)"""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        import psutil

        return time.time() - psutil.Process().create_time()


def profiler_trace(folder: str) -> AbstractContextManager[None]:
    """Traces device, host and Python into a folder."""
    import jax

    return jax.profiler.trace(folder)
