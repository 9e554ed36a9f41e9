"""Parameters from the caller: used where they are, swapped between steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pjax import LLM, SamplingParams, models
from pjax.errors import ConfigError
from tests.engine import common
from tests.tiny import write_model

OPTIONS: dict[str, Any] = common.OPTIONS | {"skip_tokenizer_init": True}
PARAMS = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
PROMPTS = [np.random.default_rng(0).integers(0, 256, n).tolist() for n in (5, 30)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tuple(write_model(tmp_path_factory.mktemp("model"), tokenizer=False, seed=seed) for seed in (0, 1))


def tokens(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


@pytest.fixture(scope="module")
def expected(folders: tuple[Path, Path]) -> list[list[list[int]]]:
    found = [tokens(LLM(folder, **OPTIONS)) for folder in folders]
    assert found[0] != found[1]
    return found


def addresses(params: Any) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)]


@pytest.mark.parametrize("mode", ["unroll", "scan"])
def test_a_module_is_used_where_it_is(folders: tuple[Path, Path], expected: list[Any], mode: str) -> None:
    module = models.load(folders[0], layer_mode=mode, progress=False)
    llm = LLM(module, **OPTIONS)
    assert tokens(llm) == expected[0]
    assert addresses(llm.engine.params) == addresses(nnx.state(module))


@pytest.mark.parametrize("kind", ["module", "state", "dictionaries"])
def test_parameters_of_every_kind(folders: tuple[Path, Path], expected: list[Any], kind: str) -> None:
    other = models.load(folders[1], layer_mode="loop", progress=False)
    state = nnx.state(other)
    given = {"module": other, "state": state, "dictionaries": nnx.to_pure_dict(state)}[kind]
    llm = LLM(folders[0], params=given, **OPTIONS)
    assert tokens(llm) == expected[1]
    assert addresses(llm.engine.params) == addresses(state)


def test_update_drops_cached_prefixes(folders: tuple[Path, Path], expected: list[Any]) -> None:
    llm = LLM(folders[0], **OPTIONS)
    assert tokens(llm) == expected[0]
    first = llm.engine.params
    llm.update_params(models.load(folders[1], layer_mode="loop", progress=False))
    assert tokens(llm) == expected[1]
    llm.update_params(first)
    assert tokens(llm) == expected[0]


@pytest.mark.parametrize("ahead", [False, True])
def test_update_between_steps(folders: tuple[Path, Path], expected: list[Any], ahead: bool) -> None:
    """With restart all goes on as if the new parameters had always been there; without, pages of the old ones reach nobody else."""
    second = models.load(folders[1], layer_mode="loop", progress=False)
    for restart in (True, False):
        llm = LLM(folders[0], **OPTIONS, async_scheduling=ahead)
        engine = llm.engine
        engine.add_request(PROMPTS[1], PARAMS, request_id="old")
        for _ in range(5):
            (output,) = engine.step() or [None]
        before = expected[0][1][: len(output.outputs[0].token_ids) + ahead]  # a step under way ends with the old ones
        assert output.outputs[0].token_ids == before[: len(before) - ahead]
        engine.update_params(second, restart=restart)
        while engine.has_unfinished_requests:
            outputs = engine.step()
        after = list(outputs[0].outputs[0].token_ids)
        assert after[: len(before)] == before
        if restart:
            whole = LLM(folders[1], **OPTIONS).generate(
                [PROMPTS[1] + before], SamplingParams(temperature=0, max_tokens=16 - len(before), ignore_eos=True), use_tqdm=False
            )
            assert after[len(before) :] == whole[0].outputs[0].token_ids
        assert tokens(llm) == expected[1]
        engine.scheduler.check()


def test_pages_that_were_saved_reach_nobody_after_an_update(folders: tuple[Path, Path], expected: list[Any]) -> None:
    """A request goes on with pages of the old parameters, is preempted, and comes back with them."""
    llm = LLM(folders[0], **OPTIONS, preemption_mode="swap", swap_space=1 << 20)
    engine = llm.engine
    engine.add_request(PROMPTS[1], PARAMS)
    for _ in range(3):
        engine.step()
    engine.update_params(models.load(folders[1], layer_mode="loop", progress=False))
    engine.scheduler.preempt(engine.scheduler.running.last)
    for _ in range(2):  # the first returns what the update has ended
        engine.step()
    assert engine.scheduler.kv.swap.num_restored_pages > 0
    while engine.has_unfinished_requests:
        engine.step()
    assert tokens(llm) == expected[1]


def test_nan_and_infinite_values_are_named(folders: tuple[Path, Path], expected: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    """They are used all the same; good ones mend the engine."""
    llm = LLM(folders[0], **OPTIONS)
    good = nnx.to_pure_dict(llm.engine.params)
    bad = good | {"norm": {"scale": good["norm"]["scale"].at[3:5].set(jnp.nan)}}
    bad |= {"head": {"kernel": good["head"]["kernel"].at[7, 1].set(-jnp.inf)}}
    messages = []
    for params in (good, bad):
        caplog.clear()
        llm.update_params(params)
        messages.append(caplog.messages)
    caplog.clear()
    given = LLM(folders[0], params=bad, **OPTIONS)
    named = ["2 tensors have NaN or infinite values: head.kernel (1 of 8320), norm.scale (2 of 32)"]
    assert messages == [[], named] and caplog.messages == named
    for engine in (llm, given):
        outputs = engine.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert [output.outputs[0].finish_reason for output in outputs] == ["error", "error"]
        engine.update_params(good)
        assert tokens(engine) == expected[0]


def test_what_does_not_fit_is_named(folders: tuple[Path, Path]) -> None:
    llm = LLM(folders[0], **OPTIONS)
    good = nnx.to_pure_dict(llm.engine.params)
    bad = jax.tree.map(lambda leaf: leaf, good)
    del bad["norm"]
    bad["extra"] = {"scale": jnp.ones(3)}
    bad["embed"]["table"] = jnp.zeros((3, 32))
    with pytest.raises(ConfigError, match=r"missing: norm\.scale; unknown: extra\.scale; embed\.table is float32\[3, 32\], but must be"):
        llm.update_params(bad)
    with pytest.raises(ConfigError, match=r"head\.kernel is bfloat16\[260, 32\], but must be float32"):
        llm.update_params(good | {"head": {"kernel": good["head"]["kernel"].astype(jnp.bfloat16)}})
    assert addresses(llm.engine.params) == addresses(good)
    with pytest.raises(ConfigError, match="model is int, but must be a path"):
        LLM(3, **OPTIONS)
    with pytest.raises(ConfigError, match="dtype is 'bfloat16', but the model that was given has 'float32'"):
        LLM(models.load(folders[0], progress=False), dtype="bfloat16", **OPTIONS)
    with pytest.raises(ConfigError, match="layer_mode is 'scan', but the model that was given has 'unroll'"):
        LLM(models.load(folders[0], progress=False), layer_mode="scan", **OPTIONS)
    with pytest.raises(ConfigError, match="which has no tokenizer"):
        LLM(models.load(folders[0], progress=False), **OPTIONS | {"skip_tokenizer_init": False})
