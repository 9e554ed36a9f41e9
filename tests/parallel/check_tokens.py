"""The same tokens on 1, 2, 4 and 8 devices as on one, in an engine so crowded that it preempts, with prefix caching and beams on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from pjax import LLM, BeamSearchParams, SamplingParams
from tests.models import hf

VOCAB = 123  # no multiple of 2: the vocabulary is padded
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 2},  # 4 and 8 devices: two and four of them share a KV head
    "GPTNeoX": {"rotary_pct": 0.5},
    "OPT": {"word_embed_proj_dim": 48},
    "GPT2": {},
}
OTHERS: dict[str, dict[str, Any]] = {
    "Qwen3": {"num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": True},
    "Llama": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "GPTNeoX": {"rotary_pct": 1.0, "use_parallel_residual": False},
}
GREEDY = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True, logprobs=2)
SAMPLES = SamplingParams(n=2, seed=5, temperature=0.8, top_k=30, top_p=0.9, max_tokens=10, ignore_eos=True)
BEAMS = BeamSearchParams(beam_width=2, max_tokens=8)
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A checkpoint of 8 heads; made once for a family and its changes."""
    made: dict[str, Path] = {}

    def make(family: str, changes: dict[str, Any]) -> Path:
        key = f"{family} {changes}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family)
            hf.make(made[key], family, hidden_size=64, num_attention_heads=8, vocab_size=VOCAB, **changes)
        return made[key]

    return make


def prompts() -> list[list[int]]:
    """Two of which begin alike."""
    rng = np.random.default_rng(3)
    shared = rng.integers(0, VOCAB, 20).tolist()
    return [shared + rng.integers(0, VOCAB, 5).tolist(), rng.integers(0, VOCAB, 3).tolist(), shared + [7]]


def load(folder: Path, **options: Any) -> LLM:
    sizes = {"max_model_len": 40, "max_num_seqs": 2, "max_num_batched_tokens": 16, "page_size": 4}
    return LLM(folder, skip_tokenizer_init=True, lazy=True, progress=False, **sizes | options)


def crowd(llm: LLM) -> tuple[list[Any], dict[str, int]]:
    """Tokens of greedy requests, samples and beams, all at once; log-probabilities; and what happened on the way."""
    engine, names, done = llm.engine, list[str](), dict[str, Any]()
    for prompt in prompts():
        names += [engine.add_request(prompt, GREEDY), engine.add_request(prompt, SAMPLES)]
    names.append(engine.add_request(prompts()[0], BEAMS))
    while engine.has_unfinished_requests:
        done |= {output.request_id: output for output in engine.step() if output.finished}
        engine.scheduler.check()
    outputs = [done[name] for name in names]
    happened = {
        "preemptions": sum(output.metrics.num_preemptions for output in outputs),
        "cached": sum(output.num_cached_tokens or 0 for output in outputs),
    }
    tokens = [[one.token_ids for one in output.outputs] for output in outputs]
    logprobs = [
        [[(token, one.logprob, one.rank) for token, one in position.items()] for position in output.outputs[0].logprobs or ()]
        for output in outputs[: len(names) - 1 : 2]
    ]
    return [tokens, logprobs], happened


def same(found: Any, expected: Any) -> None:
    assert found[0] == expected[0]
    for one, other in zip(found[1], expected[1], strict=True):
        for position, wanted in zip(one, other, strict=True):
            assert [(token, rank) for token, _, rank in position] == [(token, rank) for token, _, rank in wanted]
            np.testing.assert_allclose([x[1] for x in position], [x[1] for x in wanted], atol=1e-4)


@pytest.fixture(scope="module")
def expected(make: Make) -> Callable[[str, dict[str, Any]], Any]:
    """On one device, without a mesh, with room for all."""
    known: dict[str, Any] = {}

    def expect(family: str, changes: dict[str, Any]) -> Any:
        key = f"{family} {changes}"
        if key not in known:
            known[key], happened = crowd(load(make(family, changes), num_pages=200, enable_prefix_caching=False))
            assert happened == {"preemptions": 0, "cached": 0}
        return known[key]

    return expect


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_on_every_number_of_devices(make: Make, expected: Any, family: str, size: int) -> None:
    mode = "swap" if size == 4 else "recompute"
    llm = load(make(family, FAMILIES[family]), tensor_parallel_size=size, num_pages=10, preemption_mode=mode)
    found, happened = crowd(llm)
    same(found, expected(family, FAMILIES[family]))
    assert happened["preemptions"] > 0 and happened["cached"] > 0, happened
    assert llm.engine.scheduler.pool.num_used == 0


@pytest.mark.parametrize("family", OTHERS)
def test_other_forms(make: Make, expected: Any, family: str) -> None:
    """Biases beside a sum over devices, a tied vocabulary, norms of heads; layers stacked or one after the other."""
    mode = {"Qwen3": "scan", "Llama": "unroll"}.get(family, "loop")
    llm = load(make(family, OTHERS[family]), tensor_parallel_size=4, layer_mode=mode, num_pages=200)
    same(crowd(llm)[0], expected(family, OTHERS[family]))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_of_the_caller(make: Make, expected: Any, kind: AxisType) -> None:
    """The model is divided over "model", here of two devices; the others hold the same."""
    if kind == AxisType.Auto:
        mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind), devices=jax.devices()[4:])
    else:
        mesh = jax.make_mesh((1,), ("model",), axis_types=(kind,), devices=jax.devices()[5:6])
    llm = load(make("Llama", FAMILIES["Llama"]), mesh=mesh, num_pages=200)
    same(crowd(llm)[0], expected("Llama", FAMILIES["Llama"]))
    assert {device for leaf in jax.tree.leaves(llm.engine.params) for device in leaf.devices()} == set(mesh.devices.flat)
