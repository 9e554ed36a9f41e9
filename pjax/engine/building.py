"""The parts of an engine, in the order in which they are made: the model is opened, sizes are chosen, weights load beside all else,
then scheduler, runner and intake are built, and programs are compiled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pjax.checkpoints.arena import Arena
from pjax.config import EngineConfig
from pjax.engine.agreement import agree_on_model, agree_on_sizes
from pjax.engine.intake import Intake
from pjax.engine.opening import bytes_to_come, open_source
from pjax.errors import ConfigError
from pjax.hosts import Group
from pjax.kv_cache.layout import KVCacheLayout, make_layout, specs_of
from pjax.memory import choose_num_pages, choose_num_slots, describe_pool
from pjax.models import ModelSource
from pjax.models.given import match
from pjax.models.sharding import choose_mesh
from pjax.runner import ModelRunner, RunnerConfig, can_keep, use_compilation_cache
from pjax.scheduler import Scheduler
from pjax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

ASSUMED_COPY_RATE = 5e9  # bytes per second between device and host, until it is measured


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model whose weights are not loaded yet, and the configuration for the platform that it runs on."""

    config: EngineConfig
    source: ModelSource
    given: Any
    """The caller's own parameters; None when the source loads them."""
    weight_bytes: int
    """Bytes of free device memory that the weights will still take."""
    platform: str
    devices: Sequence[Any]
    """This host's devices of the mesh; empty without one."""
    max_model_len: int
    kv_dtype: str
    layout: KVCacheLayout
    """Which layers of one device's share of the model share a page."""

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, on one device."""
        return self.layout.page_bytes(self.config.page_size, jnp.dtype(self.kv_dtype).itemsize)


def open_parts(model: Any, config: EngineConfig, params: Any, arena: Arena | None, hosts: Group | None) -> Opened:
    """Opens the model. Raises ConfigError when it, the configuration, given parameters or other hosts do not fit each other."""
    mesh = choose_mesh(config)
    platform = jax.default_backend() if mesh is None else str(mesh.devices.flat[0].platform)
    config = config.for_platform(platform)
    source, layer_mode = open_source(model, config, platform, mesh, arena)
    agree_on_model(hosts, source)
    max_model_len = _resolve_length(config.max_model_len, source.config.max_position)
    each = "" if source.shares is None else f" on each of {source.shares.size} devices"
    log.info("%s: %.2f GiB of %s weights%s, layers by %s", source.path.name, source.num_bytes / 2**30, source.dtype, each, layer_mode)
    return Opened(
        config=config,
        source=source,
        given=None if params is None else match(source.abstract, params),
        weight_bytes=bytes_to_come(source, arena),
        platform=platform,
        devices=() if mesh is None else mesh.local_devices,
        max_model_len=max_model_len,
        layout=make_layout(specs_of(source.own_config), max_model_len),
        kv_dtype="float32" if platform == "cpu" else jnp.dtype(source.dtype).name,
    )


def _resolve_length(wanted: int | None, limit: int) -> int:
    if wanted is not None and wanted > limit:
        raise ConfigError(f"max_model_len is {wanted}, but the model's own limit is {limit}")
    return wanted or limit


def choose_sizes(opened: Opened, hosts: Group | None) -> tuple[int, int]:
    """Pages of the pool, and for how many of them there is host memory. To be chosen before the weights take memory."""
    config, source = opened.config, opened.source
    num_pages = choose_num_pages(
        config,
        opened.layout,
        opened.kv_dtype,
        opened.max_model_len,
        weight_bytes=opened.weight_bytes,
        devices=opened.devices,
    )
    num_shares = 1 if source.shares is None else min(source.shares.size, len(opened.devices))  # of which this host keeps pages
    num_slots = choose_num_slots(config, num_pages, opened.page_bytes * num_shares)
    num_pages, num_slots = agree_on_sizes(hosts, num_pages, num_slots)
    return num_pages, num_slots


def fit_length(opened: Opened, num_pages: int) -> Opened:
    """Returns the opened model with a `max_model_len` that a pool of so many pages can hold.

    A length that nobody asked for is reduced, and a line of the log names both. Raises ConfigError where it was asked for; where
    `num_pages` was too, both stay as they are, and requests that are too long for the pool are refused one by one.
    """
    config, wanted = opened.config, opened.max_model_len
    fits = opened.layout.max_tokens_in(num_pages, config.page_size, config.step_sizes[1], wanted)
    if fits == wanted:
        return opened
    if config.max_model_len is None:
        log.warning("max_model_len is reduced from %d, the model's own, to %d: the page pool holds no more tokens", wanted, fits)
        return replace(opened, max_model_len=fits)
    if config.num_pages is None:
        raise ConfigError(
            f"max_model_len is {wanted}, but the page pool holds {fits} tokens: lower max_model_len, or raise kv_cache_memory "
            "or memory_share"
        )
    return opened


class Loading:
    """Weights on their way, in a thread of their own."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pjax-load")
        self._weights: Future[Any] = self._thread.submit(load)

    @property
    def is_done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return self._weights.done()

    def wait(self) -> Any:
        """The weights. An exception of their loading comes here."""
        weights = self._weights.result()
        self._thread.shutdown()
        return weights

    def close(self) -> None:
        """Lets the thread end when it can."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def load_weights(opened: Opened, *, progress: bool) -> Loading:
    """Starts loading the weights; or gives those that the caller had."""
    return Loading(partial(opened.source.load, progress=progress) if opened.given is None else lambda: opened.given)


def build_scheduler_and_runner(opened: Opened, sizes: tuple[int, int]) -> tuple[Scheduler, ModelRunner]:
    """Makes the scheduler and the runner, with a page pool of these sizes."""
    config, source, (num_pages, num_slots) = opened.config, opened.source, sizes
    steps = use_compilation_cache(config.compilation_cache_dir, whole_steps=can_keep(source, config, opened.platform))
    log.info("%s", describe_pool(num_pages, config.page_size, opened.max_model_len, opened.layout, config.step_sizes[1]))
    limits: dict[str, Any] = {
        "layout": opened.layout,
        "num_pages": num_pages,
        "page_size": config.page_size,
        "max_model_len": opened.max_model_len,
        "max_num_seqs": config.step_sizes[0],
        "max_num_batched_tokens": config.step_sizes[1],
        "num_host_slots": num_slots,
    }
    scheduler = Scheduler(
        **limits,
        enable_prefix_caching=config.enable_prefix_caching,
        seconds_per_priority=config.seconds_per_priority,
        preemption_mode=config.preemption_mode,
    )
    scheduler.kv.swap.cost.observe_copy(1, opened.page_bytes / ASSUMED_COPY_RATE)
    limits |= {name: getattr(config, name) for name in ("attention_backend", "logits_processors")}
    return scheduler, ModelRunner(source, RunnerConfig(**limits, kv_cache_dtype=opened.kv_dtype, step_folder=steps))


def build_intake(opened: Opened, tokenizer: Tokenizer | None) -> Intake:
    """Makes what checks requests and turns them into sequences."""
    config, source = opened.config, opened.source
    return Intake(
        tokenizer,
        vocab_size=source.config.vocab_size,
        eos_token_ids=frozenset(source.eos_token_ids) | frozenset(tokenizer.eos_token_ids if tokenizer else ()),
        max_model_len=opened.max_model_len,
        max_num_seqs=config.step_sizes[0],
        seed=config.seed or 0,
        logits_processors=frozenset(config.logits_processors),
    )


def warm_up(runner: ModelRunner, scheduler: Scheduler, config: EngineConfig, *, progress: bool) -> None:
    """Compiles all programs, or starts compiling them in the background, as `warmup` says."""
    if config.warmup_mode == "all":
        runner.warmup(progress=progress)
        if copied := runner.measure_swap():
            scheduler.kv.swap.cost.observe_copy(*copied)
    elif config.warmup_mode == "background":
        runner.warm_in_background()
