"""Which layers share a page of the KV cache: layers of one kind form groups, each with its own block tables and page lifetime.

A page of any group holds G tokens of as many layers as a group has, so all groups take their pages from one pool and nothing is divided
beforehand: a request of which a group needs few pages leaves the rest to others. (vLLM's hybrid KV cache manager does the same.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pjax.errors import UnsupportedError

NULL_PAGE = 0
"""What block tables hold for pages that a window has passed: a page of zeros that nobody writes. Only where a group has a window."""

MOST_UNEVEN = 1.25  # kinds of layers whose numbers differ by less are padded to the larger number, not divided by the smaller one


@dataclass(frozen=True, kw_only=True)
class KVCacheSpec:
    """What one layer keeps of each token."""

    num_kv_heads: int  # K
    head_size: int  # H, of keys and of values
    sliding_window: int | None = None  # tokens that a token sees, itself included; None: all before it


@dataclass(frozen=True)
class KVCacheGroup:
    """Layers whose keys and values of a token lie in one page and are needed equally long."""

    layers: tuple[int, ...]
    sliding_window: int | None = None

    def first_needed(self, num_computed: int) -> int:
        """Returns the first position that tokens from position `num_computed` on see."""
        return 0 if self.sliding_window is None else max(num_computed - self.sliding_window + 1, 0)


@dataclass(frozen=True)
class KVCacheLayout:
    """Groups of layers that share one pool of pages; each group has at most `num_layers` layers."""

    groups: tuple[KVCacheGroup, ...]
    num_kv_heads: int
    head_size: int

    @classmethod
    def uniform(cls, num_layers: int, num_kv_heads: int = 1, head_size: int = 1) -> KVCacheLayout:
        """Returns the layout of layers that all see everything: one group."""
        return cls((KVCacheGroup(tuple(range(num_layers))),), num_kv_heads, head_size)

    @property
    def num_layers(self) -> int:
        """Layers of a page, those included that the smaller groups lack."""
        return max(len(group.layers) for group in self.groups)

    @property
    def has_windows(self) -> bool:
        """Whether some group lets go of pages that its window has passed."""
        return any(group.sliding_window is not None for group in self.groups)

    @property
    def num_reserved(self) -> int:
        """Pages of the pool that no sequence gets: NULL_PAGE, where there are windows."""
        return int(self.has_windows)

    @cached_property
    def places(self) -> dict[int, tuple[int, int]]:
        """(group, place in the group) of each layer that has keys and values."""
        return {layer: (number, place) for number, group in enumerate(self.groups) for place, layer in enumerate(group.layers)}

    def page_bytes(self, page_size: int, itemsize: int) -> int:
        """Returns the bytes of one page: `2·G·K·H·itemsize` for each of its layers."""
        return 2 * self.num_layers * page_size * self.num_kv_heads * self.head_size * itemsize

    def num_pages_for(self, num_tokens: int, page_size: int, max_step_tokens: int) -> int:
        """Returns the pages that a sequence of so many tokens has at most at one time, over all groups.

        Args:
          max_step_tokens: tokens of a sequence that one step computes at most. All of them are written before any is passed.
        """
        every = -(-num_tokens // page_size)
        total = 0
        for group in self.groups:
            window = group.sliding_window
            total += every if window is None else min(every, -(-(window - 1 + max_step_tokens) // page_size) + 1)
        return total

    def max_tokens_in(self, num_pages: int, page_size: int, max_step_tokens: int, limit: int) -> int:
        """Returns the tokens of the longest sequence that fits a pool of so many pages: `limit`, or fewer, in whole pages."""
        usable = num_pages - self.num_reserved
        low, high = 0, -(-limit // page_size)  # pages of one group
        while low < high:
            middle = (low + high + 1) // 2
            if self.num_pages_for(middle * page_size, page_size, max_step_tokens) <= usable:
                low = middle
            else:
                high = middle - 1
        return min(low * page_size, limit)


def specs_of(config: Any) -> list[KVCacheSpec | None]:
    """Returns the spec of each layer of a model's config; None for layers without keys and values.

    A config may have them as `kv_cache_specs`; else all layers have `num_kv_heads` and `head_size`, and the windows of
    `sliding_window`, where it has that: a number, None, or a tuple with one for each layer.
    """
    specs = getattr(config, "kv_cache_specs", None)
    windows = getattr(config, "sliding_window", None)
    by_layer = tuple(windows) if isinstance(windows, tuple | list) else (windows,) * config.num_layers
    for name, values in (("kv_cache_specs", specs), ("sliding_window", by_layer)):
        if values is not None and len(values) != config.num_layers:
            raise UnsupportedError(f"{name} has {len(values)} values, but must have one for each of the {config.num_layers} layers")
    if specs is not None:
        return list(specs)
    return [KVCacheSpec(num_kv_heads=config.num_kv_heads, head_size=config.head_size, sliding_window=window) for window in by_layer]


def make_layout(specs: Sequence[KVCacheSpec | None], max_model_len: int) -> KVCacheLayout:
    """Returns the groups of a model's layers.

    Each kind of layer is divided into groups of equal size: the number of layers of the rarest kind, or of the commonest where the
    numbers are nearly equal. A window that nothing outgrows is none.

    Raises UnsupportedError where layers differ in KV heads or head size, so that their pages would differ in size.
    """
    kinds: dict[int | None, list[int]] = {}
    sizes = {(spec.num_kv_heads, spec.head_size) for spec in specs if spec is not None}
    if len(sizes) != 1:
        shown = ", ".join(f"{heads} heads of {size}" for heads, size in sorted(sizes)) or "none"
        raise UnsupportedError(f"KV caches of the layers are {shown}, but must be of one size: pages of several sizes are not supported")
    for layer, spec in enumerate(specs):
        if spec is not None:
            window = spec.sliding_window
            kinds.setdefault(None if window is None or window >= max_model_len else window, []).append(layer)
    counts = [len(layers) for layers in kinds.values()]
    size = max(counts) if max(counts) < MOST_UNEVEN * min(counts) else min(counts)
    groups = [
        KVCacheGroup(tuple(layers[first : first + size]), window)
        for window, layers in sorted(kinds.items(), key=lambda item: item[0] is not None)  # those without a window first
        for first in range(0, len(layers), size)
    ]
    return KVCacheLayout(tuple(groups), *sizes.pop())
