"""A family from outside the package, by the registry alone, against float64 numpy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pjax import LLM, SamplingParams, models
from pjax.errors import UnsupportedError
from tests.models import toy_family

HEADS, SIZE, VOCAB, LAYERS = 2, 8, 50, 2
PROMPTS = [[3], [7, 1, 4, 9, 9, 2, 30]]


@pytest.fixture
def toy() -> Iterator[None]:
    models.register_family("ToyForCausalLM", "tests.models.toy_family")
    yield
    del models.FAMILIES["ToyForCausalLM"]


def write(folder: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    width = HEADS * SIZE
    tensors = {"toy.embed": rng.standard_normal((VOCAB, width)).astype(np.float32)}
    tensors |= {f"toy.{i}.qkv.weight": rng.standard_normal((3 * width, width)).astype(np.float32) * 0.5 for i in range(LAYERS)}
    save_file(tensors, folder / "model.safetensors")
    config = {"architectures": ["ToyForCausalLM"], "vocab_size": VOCAB, "layers": LAYERS, "heads": HEADS, "head_size": SIZE}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def expected(tensors: dict[str, np.ndarray], prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        x = tensors["toy.embed"][tokens].astype(np.float64)
        for layer in range(LAYERS):
            q, k, v = (x @ tensors[f"toy.{layer}.qkv.weight"].T.astype(np.float64)).reshape(len(x), 3, HEADS, SIZE).swapaxes(0, 1)
            scores = np.einsum("shd,thd->hst", q, k) / np.sqrt(SIZE)
            scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            x = x + np.einsum("hst,thd->shd", weights, v).reshape(x.shape)
        tokens.append(int((x[-1] @ tensors["toy.embed"].T).argmax()))
    return tokens[len(prompt) :]


def test_a_family_from_outside_is_served(toy: None, tmp_path: Path) -> None:
    tensors = write(tmp_path)
    sizes = {"max_model_len": 32, "max_num_seqs": 2, "max_num_batched_tokens": 4, "num_pages": 12, "page_size": 4}
    llm = LLM(tmp_path, skip_tokenizer_init=True, lazy=True, progress=False, **sizes)
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [expected(tensors, prompt, 12) for prompt in PROMPTS]


def test_it_is_unknown_without(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(UnsupportedError, match="architecture ToyForCausalLM is not supported"):
        models.open_model(tmp_path, dtype="auto")


def test_what_registering_refuses(toy: None) -> None:
    with pytest.raises(ValueError, match=r"'ToyForCausalLM', which tests\.models\.toy_family implements already"):
        models.register_family("ToyForCausalLM", "tests.models.toy_family")
    with pytest.raises(ValueError, match=r"module tests\.tiny lacks Config, Model, weight_table"):
        models.register_family("Other", "tests.tiny")
    with pytest.raises(ImportError):
        models.register_family("Other", "no.such.module")


def test_a_family_whose_logits_take_no_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_family.Model, "logits", lambda self, hidden: hidden)
    with pytest.raises(ValueError, match=r"tests\.models\.toy_family\.Model\.logits takes no num_rows, which it must"):
        models.register_family("ToyForCausalLM", "tests.models.toy_family")
