"""lm-eval's local-completions: log-likelihoods of a small multiple-choice task, beside transformers' on the same checkpoint."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

WORDS = "sky river stone bread light winter garden engine paper music".split()


def questions(folder: Path) -> Path:
    """A data set of 12 questions with four answers each."""
    rng = random.Random(4)
    rows = []
    for _ in range(12):
        words = rng.sample(WORDS, 5)
        rows.append({"question": f"After {words[0]} comes", "choices": words[1:], "answer": rng.randrange(4)})
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_log_likelihoods_are_those_of_transformers(
    served: dict[str, str], reference: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", served["key"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    task = {
        "task": "words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions(tmp_path))}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    model = {
        "model": "tiny",
        "base_url": f"{served['url']}/v1/completions",
        "tokenizer": served["folder"],
        "num_concurrent": 4,
        "max_length": 128,
        "max_retries": 1,
    }
    found = simple_evaluate("local-completions", model_args=model, tasks=[task], task_manager=TaskManager(), log_samples=True)
    assert found is not None
    tokenizer = AutoTokenizer.from_pretrained(served["folder"])
    pairs, scores = [], []
    for sample in found["samples"]["words"]:
        for arguments, [[score, greedy]] in zip(_arguments(sample), sample["resps"], strict=True):
            context, continuation = arguments.values() if isinstance(arguments, dict) else arguments
            pairs.append((tokenizer.encode(context), tokenizer.encode(continuation)))
            scores.append([float(score), str(greedy) == "True"])
    expected = reference(pairs)
    assert len(scores) == 48
    assert [score for score, _ in scores] == pytest.approx([score for score, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    assert min(score for score, _ in scores) < -20, "a score of nothing"


def _arguments(sample: dict[str, Any]) -> list[Any]:
    """lm-eval logs them as a list, or as a mapping from their numbers."""
    arguments = sample["arguments"]
    return list(arguments.values()) if isinstance(arguments, dict) else list(arguments)
