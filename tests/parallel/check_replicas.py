"""Data parallelism, alone and with tensor parallelism: the tokens of one engine, and both engines at work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pjax import LLM, BeamSearchParams, ConfigError, InvalidRequestError, LLMEngine, SamplingParams, models
from pjax.config import EngineConfig
from tests.tiny import write_model

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True, "lazy": True, "progress": False, "layer_mode": "unroll",
    "max_model_len": 48, "max_num_seqs": 2, "max_num_batched_tokens": 16, "page_size": 4, "num_pages": 24,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), tokenizer=False, **SIZES)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 250, count).tolist() for count in (20, 3, 3, 9, 14, 1)]


def run(llm: LLM, prompts: list[list[int]]) -> list[Any]:
    greedy = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    without_seed = SamplingParams(temperature=1.0, n=2, max_tokens=6, ignore_eos=True)
    outputs = llm.generate(prompts, [greedy, without_seed] * 3, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == prompts
    beams = llm.beam_search(prompts[:3], BeamSearchParams(beam_width=2, max_tokens=5))
    return [[one.token_ids for one in output.outputs] for output in outputs] + [
        [one.tokens for one in output.sequences] for output in beams
    ]


def test_the_tokens_of_one_engine(folder: Path, prompts: list[list[int]]) -> None:
    """Two engines of four devices each; requests without a seed draw the same, too."""
    copies, each = 2, 4
    llm = LLM(folder, data_parallel_size=copies, tensor_parallel_size=each, **OPTIONS)
    assert run(llm, prompts) == run(LLM(folder, **OPTIONS), prompts)
    devices = [{d for leaf in jax.tree.leaves(engine.params) for d in leaf.devices()} for engine in llm.engine.engines]
    assert devices == [set(jax.devices()[i * each : (i + 1) * each]) for i in range(copies)]
    assert all(engine.stats().num_steps > 5 and engine.scheduler.pool.num_used == 0 for engine in llm.engine.engines)
    assert llm.engine._tokens == [0] * copies and not llm.engine._places


def test_a_request_goes_where_the_fewest_tokens_are(folder: Path) -> None:
    engine = LLM(folder, data_parallel_size=3, **OPTIONS).engine
    names = [engine.add_request([1] * count, SamplingParams(max_tokens=1)) for count in (20, 5, 6, 1, 1)]
    assert [engine._places[name][0] for name in names] == [0, 1, 2, 1, 2]
    for name in names:
        assert engine.abort_request(name) is not None
    assert engine.abort_request(names[0]) is None and not engine.has_unfinished_requests and engine._tokens == [0, 0, 0]


def test_a_bad_request_takes_no_other_with_it(folder: Path) -> None:
    llm = LLM(folder, data_parallel_size=2, **OPTIONS)
    with pytest.raises(InvalidRequestError, match="token id 999"):
        llm.generate([[1, 2], [3], [999]], use_tqdm=False)
    assert not llm.engine.has_unfinished_requests and llm.engine._tokens == [0, 0]


def test_what_is_refused(folder: Path) -> None:
    for options, message in (
        (
            {"data_parallel_size": 3, "tensor_parallel_size": 4},
            "is 3 and tensor_parallel_size is 4, which takes 12 devices, but there are 8",
        ),
        ({"data_parallel_size": 0}, "data_parallel_size is 0, but must be an integer >= 1"),
        ({"data_parallel_size": None}, "data_parallel_size is None, but must be an integer >= 1"),
        ({"data_parallel_size": 2, "mesh": object()}, "data_parallel_size is 2, but a mesh was given, which is for one engine"),
        ({"data_parallel_size": 2, "params": {}}, "data_parallel_size is 2, but params was given"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(folder, **OPTIONS | options)
    with pytest.raises(ConfigError, match="but a module was given"):
        LLM(models.load(folder, progress=False), skip_tokenizer_init=True, progress=False, data_parallel_size=2)
    with pytest.raises(ConfigError, match=r"data_parallel_size is 2, but an engine is one copy of the model; pjax\.LLM runs several"):
        LLMEngine(folder, EngineConfig(data_parallel_size=2), skip_tokenizer_init=True, progress=False)
