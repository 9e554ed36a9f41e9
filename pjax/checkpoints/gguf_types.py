"""The types of GGUF tensors that pjax reads, as the format's specification has them.

The `gguf` package knows them too, and dequantises what the native library does not; importing it takes 0.1 s of a start.
"""

from __future__ import annotations

from enum import IntEnum


class GGUFType(IntEnum):
    """A tensor's type, by GGML's number of it."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30


BLOCKS = {
    GGUFType.F32: (1, 4),
    GGUFType.F16: (1, 2),
    GGUFType.BF16: (1, 2),
    GGUFType.Q8_0: (32, 34),
    GGUFType.Q4_0: (32, 18),
    GGUFType.Q4_1: (32, 20),
    GGUFType.Q2_K: (256, 84),
    GGUFType.Q3_K: (256, 110),
    GGUFType.Q4_K: (256, 144),
    GGUFType.Q5_K: (256, 176),
    GGUFType.Q6_K: (256, 210),
}
"""Numbers and bytes of a block; in the order in which messages name the types."""
