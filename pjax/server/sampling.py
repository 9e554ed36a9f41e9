"""A request's fields as the engine's parameters: each is applied, or refused by its name."""

from __future__ import annotations

from typing import Any

from pjax.params import BeamSearchParams, SamplingParams
from pjax.server.errors import invalid
from pjax.server.schemas import Sampling
from pjax.server.server_config import ServerConfig

PASSED = (
    *("n", "best_of", "temperature", "top_p", "top_k", "min_p", "typical_p", "seed", "stop", "stop_token_ids", "bad_words"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "min_tokens", "allowed_token_ids"),
    *("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "prompt_logprobs"),
)
BEAM_FIELDS = ("n", "best_of", "temperature", "ignore_eos", "length_penalty", "early_stopping")
# Values that change nothing, and so are fine where beam search has no such parameter.
BEAM_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "min_tokens"), (None, 0)),
    **dict.fromkeys(("repetition_penalty", "typical_p"), (None, 1)),
    "logit_bias": (None, {}),
    "bad_words": (None, []),
    "top_p": (None, 1),
    "top_k": (None, 0, -1),
    "min_p": (None, 0),
    "stop": (None, []),
    "stop_token_ids": (None, []),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
}


def sampling_params(body: Sampling, config: ServerConfig, *, max_tokens: int | None, **more: Any) -> SamplingParams | BeamSearchParams:
    """What the engine gets.

    Args:
      max_tokens: None is up to the model's length.
      more: logprobs and the like, which completions and chats ask for in different ways.
    """
    _check_limits(body, config)
    if body.use_beam_search:
        return _beams(body, max_tokens, more)
    for name in ("length_penalty", "early_stopping"):
        if getattr(body, name) is not None:
            raise invalid(name, f"{name} is for beam search: set use_beam_search")
    given: dict[str, Any] = {name: value for name in PASSED if (value := getattr(body, name)) is not None}
    given |= {name: value for name, value in more.items() if value is not None}
    if given.get("best_of") == given.get("n"):
        given.pop("best_of", None)
    if body.logit_bias:
        given["logit_bias"] = biases = {int(token): bias for token, bias in body.logit_bias.items()}
        if len(biases) < len(body.logit_bias):
            raise invalid("logit_bias", "logit_bias has a token id twice, spelt in two ways")
    return SamplingParams(max_tokens=max_tokens, **given)


def _check_limits(body: Sampling, config: ServerConfig) -> None:
    for name in ("n", "best_of"):
        value = getattr(body, name)
        if value is not None and value > config.max_n:
            raise invalid(name, f"{name} is {value}, but must be <= {config.max_n}")
    for name in ("stop", "bad_words"):
        value = getattr(body, name) or ()
        for text in (value,) if isinstance(value, str) else value:
            if len(text) > config.max_stop_length:
                raise invalid(name, f"{name} has a text of {len(text)} characters, but they must be <= {config.max_stop_length}")
    if body.stream and body.best_of not in (None, body.n):
        raise invalid("best_of", f"best_of is {body.best_of}, but must be n, which is {body.n}, in a stream: the best are known at the end")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "stream_options is given, but stream is not set")


def _beams(body: Sampling, max_tokens: int | None, more: dict[str, Any]) -> BeamSearchParams:
    if body.stream:
        raise invalid("stream", "stream is set, but beam search knows no text before its end")
    for name in PASSED:
        if name not in BEAM_FIELDS and getattr(body, name) not in (None, *BEAM_NEUTRAL.get(name, ())):
            raise invalid(name, f"{name} is not applied by beam search")
    for name, value in more.items():
        if value is not None:
            raise invalid(name, f"{name} is not applied by beam search")
    width = max(body.n, body.best_of or 1)
    if body.best_of is not None and body.best_of < body.n:
        raise invalid("best_of", f"best_of is {body.best_of}, but must be >= n, which is {body.n}")
    if max_tokens is None:
        raise invalid("max_tokens", "max_tokens must be given for beam search")
    given: dict[str, Any] = {"length_penalty": body.length_penalty, "early_stopping": body.early_stopping, "temperature": body.temperature}
    given = {name: value for name, value in given.items() if value is not None}
    return BeamSearchParams(beam_width=width, max_tokens=max_tokens, ignore_eos=body.ignore_eos, **given)
