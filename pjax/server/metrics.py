"""Metrics under vLLM's names, for the autoscalers and boards that know those, and pjax's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pjax.engine import AsyncLLM, EngineStats, StepStats
from pjax.outputs import RequestOutput

# Bounds of vLLM's histograms: boards compute quantiles from them.
TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
LATENCY = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
LENGTH = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
STEP = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
LABELS = ("model_name", "engine")
FINISH_REASONS = ("stop", "length", "abort", "error")


class ServerMetrics:
    """One server's metrics, in a registry of its own.

    Args:
      llm: its figures are read when somebody asks for them.
      model_name: the label that tells several servers apart.
      engine: the label that tells copies of one model apart.
    """

    def __init__(self, llm: AsyncLLM, model_name: str, engine: str = "0") -> None:
        self.registry = CollectorRegistry()
        self._labels = (model_name, engine)

        def histogram(name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, LABELS, registry=self.registry, buckets=bounds).labels(*self._labels)

        success = Counter("vllm:request_success", "Requests that ended, by reason", (*LABELS, "finished_reason"), registry=self.registry)
        self.ended = {reason: success.labels(*self._labels, reason) for reason in FINISH_REASONS}
        self.first_token = histogram("vllm:time_to_first_token_seconds", "From arrival to the first token", TTFT)
        self.inter_token = histogram("vllm:inter_token_latency_seconds", "Between two tokens of a request", LATENCY)
        self.per_token = histogram("vllm:request_time_per_output_token_seconds", "A request's mean time between two tokens", LATENCY)
        self.end_to_end = histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token", REQUEST)
        self.queue = histogram("vllm:request_queue_time_seconds", "From arrival to the first step", REQUEST)
        self.prefill = histogram("vllm:request_prefill_time_seconds", "From the first step to the first token", REQUEST)
        self.decode = histogram("vllm:request_decode_time_seconds", "From the first token to the last", REQUEST)
        self.inference = histogram("vllm:request_inference_time_seconds", "From the first step to the last token", REQUEST)
        self.prompt_length = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request", LENGTH)
        self.output_length = histogram("vllm:request_generation_tokens", "Generated tokens of a request", LENGTH)
        steps = Histogram(
            "pjax:step_seconds",
            "A step, by what it computed: prompts, one token each, or both",
            (*LABELS, "phase"),
            registry=self.registry,
            buckets=STEP,
        )
        self._steps = {phase: steps.labels(*self._labels, phase) for phase in ("prefill", "decode", "mixed")}
        self._step_tokens = histogram("vllm:iteration_tokens_total", "Tokens of a step", LENGTH)
        llm.engine.on_step = self.on_step
        self.registry.register(EngineCollector(llm, self._labels))

    def on_step(self, step: StepStats) -> None:
        """Measures a step, in the engine's thread."""
        phase = "decode" if not step.num_prefill_tokens else "mixed" if step.num_decode_tokens else "prefill"
        if step.seconds is not None:
            self._steps[phase].observe(step.seconds)
        self._step_tokens.observe(step.num_prefill_tokens + step.num_decode_tokens)

    def observer(self) -> RequestObserver:
        """Measures one prompt."""
        return RequestObserver(self)


class RequestObserver:
    """Measures one prompt as its outputs come."""

    def __init__(self, metrics: ServerMetrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._num_tokens = 0
        self._last = 0.0
        self._ended = False

    def observe(self, output: RequestOutput) -> None:
        """A newer output: how long it took since the one before."""
        now = self._clock()
        count = sum(len(sequence.token_ids) for sequence in output.outputs)
        if self._num_tokens and count > self._num_tokens:
            # A slow reader gets several steps' tokens at once: each is one observation, of their mean.
            steps = max((count - self._num_tokens) // len(output.outputs), 1)
            for _ in range(steps):
                self._metrics.inter_token.observe((now - self._last) / steps)
        elif count and not self._num_tokens and output.metrics.time_to_first_token is not None:
            self._metrics.first_token.observe(output.metrics.time_to_first_token)
        if count > self._num_tokens:
            self._num_tokens, self._last = count, now
        if output.finished:
            self._finish(output)

    def close(self, *, refused: bool = False, failed: bool = False) -> None:
        """Nothing more comes: a request that has not ended has failed or was aborted, unless the engine never took it."""
        if not self._ended and not refused:
            self._ended = True
            self._metrics.ended["error" if failed else "abort"].inc()

    def _finish(self, output: RequestOutput) -> None:
        self._ended = True
        metrics, times = self._metrics, output.metrics
        reasons = {sequence.finish_reason for sequence in output.outputs}
        metrics.ended[next((reason for reason in ("error", "abort", "length", "stop") if reason in reasons), "error")].inc()
        metrics.prompt_length.observe(len(output.prompt_token_ids))
        metrics.output_length.observe(self._num_tokens)
        started, first, finished = times.first_scheduled_time, times.first_token_time, times.finished_time
        if started is None or first is None or finished is None:
            return
        metrics.queue.observe(started - times.arrival_time)
        metrics.prefill.observe(first - started)
        metrics.decode.observe(finished - first)
        metrics.inference.observe(finished - started)
        metrics.end_to_end.observe(finished - times.arrival_time)
        longest = max(len(sequence.token_ids) for sequence in output.outputs)
        if longest > 1:
            metrics.per_token.observe((finished - first) / (longest - 1))


class EngineCollector:
    """The engine's own figures, read at the moment of asking."""

    def __init__(self, llm: AsyncLLM, labels: tuple[str, ...]) -> None:
        self._llm = llm
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        """The families of one scrape."""
        stats = self._llm.stats()
        yield self._gauge("vllm:num_requests_running", "Sequences in the engine's steps", stats.num_running)
        yield self._gauge("vllm:num_requests_waiting", "Sequences that wait", stats.num_waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Used pages; 1 is all", stats.kv_cache_usage)
        yield self._counter("vllm:prefix_cache_queries", "Prompt tokens looked for in the page pool", stats.prefix_cache_queries)
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found there", stats.prefix_cache_hits)
        yield self._counter("vllm:prompt_tokens", "Prompt tokens computed", stats.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens generated", stats.generation_tokens)
        yield self._counter("vllm:num_preemptions", "Requests that gave their pages away and began again", stats.num_preemptions)
        yield self._cache_config(stats.num_pages)
        yield self._counter("pjax:compilations", "Programs that were compiled", stats.num_compilations)
        yield self._counter("pjax:steps", "Steps", stats.num_steps)
        yield self._pages(stats)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._labels, value)
        return family

    def _pages(self, stats: EngineStats) -> Metric:
        family = GaugeMetricFamily("pjax:pages", "Pages by state; shared ones are counted as used too", labels=(*LABELS, "state"))
        free = stats.num_pages - stats.num_used_pages - stats.num_cached_pages
        values = {"used": stats.num_used_pages, "shared": stats.num_shared_pages, "cached": stats.num_cached_pages, "free": free}
        for state, value in values.items():
            family.add_metric((*self._labels, state), value)
        return family

    def _cache_config(self, num_pages: int) -> Metric:
        config = self._llm.engine.config
        shown = {"block_size": config.page_size, "num_gpu_blocks": num_pages, "enable_prefix_caching": config.enable_prefix_caching}
        family = GaugeMetricFamily("vllm:cache_config_info", "The page pool's settings", labels=(*LABELS, *shown))
        family.add_metric((*self._labels, *map(str, shown.values())), 1)
        return family
