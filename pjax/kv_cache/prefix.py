"""Keys of full pages: a page's key names the weights, its tokens and all tokens before it, so equal keys mean equal keys and values."""

from __future__ import annotations

import hashlib
from array import array

from pjax.kv_cache.sequence import CachedSequence


def root_key(cache_salt: str | None, epoch: int) -> bytes:
    """Returns what the first page's key is made from. Sequences of different salts, or of different weights, never share a page."""
    salt = b"" if cache_salt is None else b"salt" + cache_salt.encode()
    return hashlib.blake2b(epoch.to_bytes(8, "little") + salt, digest_size=32).digest()


def page_keys(sequence: CachedSequence, page_size: int, num_pages: int) -> list[bytes]:
    """The sequence's keys, at least of its first `num_pages` pages; each is made once and kept with the sequence.

    Key i = BLAKE2b-256(key i - 1, tokens of page i): nobody can make two different beginnings with one key, which a hash of
    64 bits would not promise.
    """
    keys = sequence.page_keys
    for index in range(len(keys), num_pages):
        parent = keys[-1] if keys else root_key(sequence.cache_salt, sequence.epoch)
        tokens = array("i", sequence.tokens_between(index * page_size, (index + 1) * page_size))
        keys.append(hashlib.blake2b(parent + tokens.tobytes(), digest_size=32).digest())
    return keys


def group_key(key: bytes, group: int) -> bytes:
    """Returns the key of a page of one group of layers: pages of different groups hold different layers."""
    return key if group == 0 else key + group.to_bytes(2, "little")
