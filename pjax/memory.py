"""How many pages the pool gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pjax.config import EngineConfig
from pjax.errors import ConfigError
from pjax.kv_cache.layout import KVCacheLayout
from pjax.machine import host_free_bytes

DEFAULT_SWAP_SPACE = 4 << 30
HOST_SHARE = 0.1  # of free host memory, for pages of preempted requests
CPU_SHARE = 0.2  # a CPU's memory is not the engine's own


def choose_num_pages(
    config: EngineConfig, layout: KVCacheLayout, kv_dtype: str, max_model_len: int, *, weight_bytes: int = 0, devices: Sequence[Any] = ()
) -> int:
    """Pages of one layer: as asked, or what fits the device, but no more than all sequences at full length can use.

    Args:
      layout: of what one device has.
      weight_bytes: of the weights that are still to be loaded, on one device.
      devices: that have a pool each; JAX's first one by default.

    Raises ConfigError when not even one page fits, or on a CPU with `warmup` "all", which takes all of it, when what is asked for
    does not.
    """
    one = layout.page_bytes(config.page_size, jnp.dtype(kv_dtype).itemsize)
    is_cpu = jax.default_backend() == "cpu"
    left = max(_free_bytes(devices or jax.local_devices()[:1]) - weight_bytes, 0)
    asked = config.num_pages
    if asked is None and config.kv_cache_memory is not None:
        if config.kv_cache_memory < one:
            raise ConfigError(f"kv_cache_memory is {config.kv_cache_memory} bytes, but one page takes {one}")
        asked = config.kv_cache_memory // one
    least = layout.num_reserved + len(layout.groups)
    if asked is not None:
        if asked < least:
            raise ConfigError(f"the page pool has {asked} pages, but must have at least {least}: one for each group of layers")
        if is_cpu and config.warmup_mode == "all" and asked * one > left:
            raise ConfigError(
                f"the page pool is {asked * one} bytes, but {int(left)} are free; it takes memory as it fills where warmup is not 'all'"
            )
        return asked
    free = left * config.memory_share * (CPU_SHARE if is_cpu else 1)
    max_num_seqs, max_step_tokens = config.step_sizes
    useful = layout.num_pages_for(max_model_len, config.page_size, max_step_tokens) * max_num_seqs + layout.num_reserved
    fits = int(free // one)
    if fits < least:
        raise ConfigError(f"the device has {int(free)} bytes for the page pool, but one page takes {one}, and there must be {least}")
    return useful if useful <= fits else _round_down(fits)


def choose_num_slots(config: EngineConfig, num_pages: int, bytes_per_page: int) -> int:
    """Pages that the host keeps of preempted requests; ConfigError when swapping is asked for and not even one fits."""
    if config.preemption_mode == "recompute":
        return 0
    if config.swap_space is not None:
        if config.preemption_mode == "swap" and config.swap_space < bytes_per_page:
            raise ConfigError(f"swap_space is {config.swap_space} bytes, but one page takes {bytes_per_page}")
        return config.swap_space // bytes_per_page
    share = min(DEFAULT_SWAP_SPACE, int(host_free_bytes() * HOST_SHARE))
    return min(num_pages, max(share // bytes_per_page, 1))


def _round_down(count: int) -> int:
    """The largest number of 5 leading bits up to `count`.

    The pool's size is part of every compiled program: an odd page more or less of free memory must not miss the cache.
    """
    step = 1 << max(count.bit_length() - 5, 0)
    return count // step * step


def _free_bytes(devices: Sequence[Any]) -> float:
    """Memory that is free now on each of the devices; what JAX calls CPU devices share one machine's."""
    stats = [device.memory_stats() or {} for device in devices if device.platform != "cpu"]
    if stats and all("bytes_limit" in one for one in stats):
        return float(min(one["bytes_limit"] - one["bytes_in_use"] for one in stats))
    return float(host_free_bytes()) / len(devices)


def describe_pool(num_pages: int, page_size: int, max_model_len: int, layout: KVCacheLayout, max_step_tokens: int) -> str:
    """One line: what the pool holds, and where layers have windows what of a full cache a request takes."""
    each = layout.num_pages_for(max_model_len, page_size, max_step_tokens)
    requests = f"{(num_pages - layout.num_reserved) / each:.1f} requests of {max_model_len} tokens"
    if not layout.has_windows:
        return f"page pool: {num_pages} pages of {page_size} = {num_pages * page_size} tokens, {requests}"
    windows = sorted({group.sliding_window for group in layout.groups}, key=lambda window: window or 0)
    counts = {window: sum(len(group.layers) for group in layout.groups if group.sliding_window == window) for window in windows}
    kinds = ", ".join(f"{count} {'full' if window is None else f'with window {window}'}" for window, count in counts.items())
    num_layers = sum(counts.values())
    share = each * layout.num_layers / (-(-max_model_len // page_size) * num_layers)
    pages = f"{num_pages} pages of {page_size} tokens in {layout.num_layers} layers ({kinds})"
    return f"page pool: {pages}, {requests}, {share:.0%} of a full cache each"
