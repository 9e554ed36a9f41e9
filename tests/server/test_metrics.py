"""/metrics and the log: vLLM's names, and figures that agree with what was asked."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from pjax.outputs import CompletionOutput, RequestMetrics, RequestOutput
from pjax.server.logs import JsonFormatter, TextFormatter, throughput
from pjax.server.metrics import RequestObserver, ServerMetrics
from tests.server.common import Running, ScriptedLLM, idle, metrics, wait_for

# What autoscalers and boards made for vLLM ask for.
VLLM = [
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    *("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:num_preemptions_total"),
    *("vllm:prompt_tokens_total", "vllm:generation_tokens_total"),
    *(f"vllm:request_success_total.{reason}" for reason in ("stop", "length", "abort")),
    *(
        f"vllm:{name}_{part}"
        for name in (
            *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"),
            *("request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens", "request_generation_tokens"),
        )
        for part in ("sum", "count", "bucket.+Inf")
    ),
]


def test_figures_follow_what_was_asked(server: Running, post: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Steps that wait for a compilation, or for a caller on a busy machine, have no time.
    monkeypatch.setattr("pjax.engine.engine.LONG_PAUSE", 60.0)
    other = "another text of as many characters, for the steps"
    for _ in range(2):
        post("/v1/completions", prompt=[other, other[:20]], max_tokens=5, temperature=0, ignore_eos=True)
    wait_for(lambda: idle(server.url))
    before = metrics(server.url)
    assert set(VLLM) <= set(before)
    prompt = "forty-eight characters are exactly three pages: ."
    for _ in range(2):
        post("/v1/completions", prompt=[prompt, prompt[:20]], max_tokens=5, temperature=0, ignore_eos=True)
    after = metrics(server.url)
    grown = {name: after[name] - before[name] for name in before}
    assert grown["vllm:prompt_tokens_total"] == grown["vllm:request_prompt_tokens_sum"] == 2 * (len(prompt) + 20)
    assert grown["vllm:generation_tokens_total"] == grown["vllm:request_generation_tokens_sum"] == 20
    assert grown["vllm:request_success_total.length"] == grown["vllm:e2e_request_latency_seconds_count"] == 4
    assert grown["vllm:time_to_first_token_seconds_count"] == grown["vllm:request_queue_time_seconds_count"] == 4
    assert 0 < grown["vllm:inter_token_latency_seconds_count"] <= 16  # fewer where a reader was slower than the engine
    assert grown["vllm:prefix_cache_hits_total"] >= 16 + 48 and grown["pjax:steps_total"] > 5
    assert after["vllm:kv_cache_usage_perc"] == after["pjax:pages.used"] == 0
    assert sum(after[f"pjax:pages.{state}"] for state in ("used", "cached", "free")) == 64
    phases = sum(grown[f"pjax:step_seconds_count.{phase}"] for phase in ("prefill", "decode", "mixed"))
    assert phases == grown["pjax:steps_total"]


def test_a_request_is_measured_by_its_own_clock(tmp_path: Path) -> None:
    shared = ServerMetrics(ScriptedLLM(tmp_path), "m")
    times = iter([10.0, 10.5, 11.5])
    observer = RequestObserver(shared, clock=lambda: next(times))
    measured = RequestMetrics(8.0, 9.0, 10.0)
    for count, done in ((1, None), (2, None), (4, "stop")):
        measured.finished_time = 12.0 if done else None
        sequence = CompletionOutput(0, "", list(range(count)), finish_reason=done)
        observer.observe(RequestOutput("r", None, [1, 2, 3], [sequence], done is not None, 0, measured))
    observer.close()

    def value(name: str) -> float | None:
        return shared.registry.get_sample_value(f"vllm:{name}", {"model_name": "m", "engine": "0"})

    assert value("time_to_first_token_seconds_sum") == 2.0 and value("request_queue_time_seconds_sum") == 1.0
    assert value("request_prefill_time_seconds_sum") == 1.0 and value("request_decode_time_seconds_sum") == 2.0
    assert value("e2e_request_latency_seconds_sum") == 4.0 and value("request_generation_tokens_sum") == 4
    assert (value("inter_token_latency_seconds_count"), value("inter_token_latency_seconds_sum")) == (3, 1.5)


@pytest.fixture
def lines() -> Iterator[list[logging.LogRecord]]:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("pjax.server")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel("INFO")
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_each_request_has_its_line(server: Running, lines: list[logging.LogRecord]) -> None:
    body = {"prompt": "a secret", "max_tokens": 3, "temperature": 0, "ignore_eos": True, "user": 'eve"\nINFO'}
    httpx2.post(f"{server.url}/v1/completions", json=body, headers={"X-Request-Id": "mine"}, timeout=60)
    httpx2.post(f"{server.url}/v1/completions", json={"prompt": "a secret", "foo": 1})
    httpx2.get(f"{server.url}/health")
    wait_for(lambda: len(lines) >= 2)
    fields = lines[0].fields  # type: ignore[attr-defined]
    assert fields["request_id"] == "mine" and fields["id"].startswith("cmpl-") and fields["finish_reason"] == "length"
    assert (fields["prompt_tokens"], fields["generated_tokens"]) == (8, 3) and fields["ttft"] > 0
    assert [record.getMessage() for record in lines] == ["POST /v1/completions 200", "POST /v1/completions 400"]
    for formatter in (TextFormatter(), JsonFormatter()):
        for record in lines:
            line = formatter.format(record)
            assert "secret" not in line and "\n" not in line
    assert json.loads(JsonFormatter().format(lines[0]))["user"] == 'eve"\nINFO'


def test_throughput(tmp_path: Path) -> None:
    from dataclasses import replace

    before = ScriptedLLM(tmp_path).stats()
    after = replace(before, prompt_tokens=100, generation_tokens=50, prefix_cache_queries=100, prefix_cache_hits=25, num_running=2)
    assert throughput(before, after, 10.0) == (
        "prompt 10.0 tok/s, generation 5.0 tok/s, 2 running, 0 waiting, pages 0.0% used, prefix cache 25.0% hit"
    )
