"""Servers and replicas draw a seed each, so that requests without one get other samples from each of them; engines of a program do not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pjax import LLM, AsyncLLM, SamplingParams, cli
from pjax.config import EngineConfig
from pjax.ray_serve import Replica
from pjax.server import ServerConfig, lifecycle, run
from tests.server.common import OPTIONS

SIZES = {name: value for name, value in OPTIONS.items() if name != "progress"}
FLAGS = "--max-model-len 128 --max-num-seqs 8 --max-num-batched-tokens 32 --num-pages 64 --lazy --port 0".split()
SAMPLED = SamplingParams(max_tokens=16, ignore_eos=True)


class OpenedError(Exception):
    """The engine would have been opened now."""


def by_command(folder: Path, *flags: str) -> None:
    cli.main(["serve", str(folder), *FLAGS, *flags])


def by_function(folder: Path, *flags: str) -> None:
    seed = {"seed": int(flags[1])} if flags else {}
    run(ServerConfig(model=str(folder), port=0, engine=EngineConfig(**SIZES, **seed)))


def by_ray(folder: Path, *flags: str) -> None:
    Replica({"model": str(folder), **SIZES} | ({"seed": int(flags[1])} if flags else {}))


@pytest.mark.parametrize("start", [by_command, by_function, by_ray])
def test_each_start_draws_a_seed_unless_one_is_given(
    folder: Path, start: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seeds: list[int | None] = []

    def open_engine(config: ServerConfig) -> Any:
        seeds.append(config.engine.seed)
        raise OpenedError

    monkeypatch.setattr(lifecycle, "open_engine", open_engine)
    monkeypatch.setattr("pjax.server.logs.set_up", lambda *_: None)
    monkeypatch.setattr(lifecycle, "set_up", lambda *_: None)
    caplog.set_level(logging.INFO, "pjax.server")
    for flags in ((), (), ("--seed", "0"), ("--seed", "5")):
        with pytest.raises(OpenedError):
            start(folder, *flags)
    first, second, *given = seeds
    assert first is not None and second is not None and first != second and given == [0, 5]
    assert [f"seed {seed} was drawn at random" in message for seed, message in zip(seeds, caplog.messages, strict=False)] == [True, True]


def test_replicas_give_other_samples_and_programs_repeat_theirs(folder: Path) -> None:
    async def sample(llm: AsyncLLM) -> list[list[int]]:
        found = []
        for prompt in ([1, 2], [1, 2]):
            found.append([output.outputs[0].token_ids async for output in llm.generate(prompt, SAMPLED)][-1])
        return found

    def by_server(config: ServerConfig) -> list[list[int]]:
        llm = lifecycle.open_engine(config)
        try:
            return asyncio.run(sample(llm))
        finally:
            llm.close()

    config = ServerConfig(model=str(folder), engine=EngineConfig(**SIZES))
    drawn = lifecycle.with_seed(config)
    first, again, second = by_server(drawn), by_server(drawn), by_server(lifecycle.with_seed(config))
    assert first == again, "the seed that the log names repeats the samples"
    assert len({tuple(tokens) for tokens in first + second}) == 4
    program, other = (
        [o.outputs[0].token_ids for o in LLM(folder, **OPTIONS).generate([[1, 2]] * 2, SAMPLED, use_tqdm=False)] for _ in "ab"
    )
    assert program == other and program[0] != program[1]
