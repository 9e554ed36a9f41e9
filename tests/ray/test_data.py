"""examples/ray_data_batch.py on the cluster, against the engine by itself."""

from __future__ import annotations

import json
from pathlib import Path

import ray.data

from examples.ray_data_batch import completed
from pjax import LLM, SamplingParams
from tests.ray.conftest import OPTIONS, Cluster


def test_a_file_of_prompts_is_completed(cluster: Cluster, llm: LLM, tmp_path: Path) -> None:
    rows = [{"id": index, "prompt": f"line {index}: " + "na " * (index % 5)} for index in range(50)]
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ray.data.read_json(str(source), lines=True)
    completed(data, str(cluster.folder), engines=2, batch_size=8, max_tokens=12, **OPTIONS).write_json(str(tmp_path / "out"))
    found = [json.loads(line) for path in (tmp_path / "out").glob("*.json") for line in path.read_text().splitlines()]
    outputs = llm.generate([row["prompt"] for row in rows], SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    expected = [
        {**row, "text": one.outputs[0].text, "finish_reason": one.outputs[0].finish_reason, "num_tokens": len(one.outputs[0].token_ids)}
        for row, one in zip(rows, outputs, strict=True)
    ]
    assert sorted(found, key=lambda row: row["id"]) == expected
