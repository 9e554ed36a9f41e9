"""What sampling parameters refuse, each by its name and value."""

from __future__ import annotations

from typing import Any

import pytest

from pjax import InvalidRequestError, SamplingParams

BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    ({"presence_penalty": 2.1}, "presence_penalty is 2.1"),
    ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
    ({"typical_p": 0}, r"typical_p is 0, but must be in \(0, 1\]"),
    ({"min_tokens": 17}, "min_tokens is 17, but must be at most max_tokens, which is 16"),
    ({"best_of": 1, "n": 2}, "best_of is 1"),
    ({"best_of": 2, "temperature": 0}, "best_of is 2, but must be 1 at temperature 0"),
    ({"logprobs": -1}, "logprobs is -1"),
    ({"prompt_logprobs": 21}, "prompt_logprobs is 21"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens is 0"),
    ({"logit_bias": {1: 101}}, "logit_bias of token 1 is 101"),
    ({"logit_bias": {-1: 1}}, "logit_bias is -1"),
    ({"logit_bias": [1]}, "logit_bias is"),
    ({"logit_bias": dict.fromkeys(range(1025), 1)}, "number of logit_bias tokens is 1025"),
    ({"allowed_token_ids": []}, "allowed_token_ids is"),
    ({"bad_words": "word"}, "bad_words is 'word', but must be a list"),
    ({"bad_words_ids": [[]]}, "bad_words_ids is"),
    ({"bad_words_ids": [3]}, "bad_words_ids is 3"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS)
def test_bad_values_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        SamplingParams(**fields)
