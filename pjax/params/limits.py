"""Bounds of parameters, and what a refusal says."""

from __future__ import annotations

import numbers
import sys

from pjax.errors import InvalidRequestError

MAX_LOGPROBS = 20  # as OpenAI's and vLLM's default bound
MAX_N = 1024
MAX_CANDIDATES = 32  # likeliest tokens that a step gives for each row, where any row asks
MAX_STOP_STRINGS = 64
MAX_SEED = 2**63 - 1
MAX_PENALTY = 2.0  # of presence and frequency, as OpenAI and vLLM
MAX_BIAS = 100.0  # as OpenAI
MAX_BIASED_TOKENS = 1024
MAX_BAD_SEQUENCES = 256  # of two tokens and more; a text may be two of them, with a space before it and without
MAX_BAD_LENGTH = 16  # tokens of one of them


def bad(name: str, value: object, bound: str) -> InvalidRequestError:
    """The refusal of a value."""
    return InvalidRequestError(f"{name} is {value!r:.200}, but must be {bound}")


def is_int(value: object) -> bool:
    """Whether it is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a finite number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def plain(value: object) -> object:
    """Numbers of numpy and the like as Python's own."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value
