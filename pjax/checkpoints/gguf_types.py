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
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39


BLOCKS = {
    GGUFType.F32: (1, 4),
    GGUFType.F16: (1, 2),
    GGUFType.BF16: (1, 2),
    GGUFType.F64: (1, 8),
    GGUFType.Q8_0: (32, 34),
    GGUFType.Q4_0: (32, 18),
    GGUFType.Q4_1: (32, 20),
    GGUFType.Q5_0: (32, 22),
    GGUFType.Q5_1: (32, 24),
    GGUFType.Q2_K: (256, 84),
    GGUFType.Q3_K: (256, 110),
    GGUFType.Q4_K: (256, 144),
    GGUFType.Q5_K: (256, 176),
    GGUFType.Q6_K: (256, 210),
    GGUFType.IQ1_S: (256, 50),
    GGUFType.IQ1_M: (256, 56),
    GGUFType.IQ2_XXS: (256, 66),
    GGUFType.IQ2_XS: (256, 74),
    GGUFType.IQ2_S: (256, 82),
    GGUFType.IQ3_XXS: (256, 98),
    GGUFType.IQ3_S: (256, 110),
    GGUFType.IQ4_NL: (32, 18),
    GGUFType.IQ4_XS: (256, 136),
    GGUFType.TQ1_0: (256, 54),
    GGUFType.TQ2_0: (256, 66),
    GGUFType.MXFP4: (32, 17),
}
"""Numbers and bytes of a block; in the order in which messages name the types."""
