"""What enters the engine: prompts and parameters, checked at once and made into the scheduler's requests."""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from pjax.errors import InvalidRequestError
from pjax.outputs import RequestMetrics
from pjax.params import MAX_CANDIDATES, MAX_SEED, BeamSearchParams, LogitRules, SamplingParams
from pjax.scheduler import Request
from pjax.scheduler.beam_search import BeamSearch, num_candidates
from pjax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Prompt = str | Sequence[int]
MAX_PRIORITY = 2**53


class Intake:
    """Makes requests for one model and its limits.

    Args:
      vocab_size: ids are in [0, vocab_size).
      eos_token_ids: tokens that end a sequence, unless a request ignores them. Those that the vocabulary does not have, as a
        tokenizer or config may name, are ignored with a warning.
      seed: requests without a seed of their own take one from this and their number.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        max_model_len: int,
        max_num_seqs: int,
        seed: int,
        logits_processors: frozenset[str] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self.eos_token_ids = frozenset(token for token in eos_token_ids if 0 <= token < vocab_size)
        if beyond := sorted(eos_token_ids - self.eos_token_ids):
            log.warning("end-of-sequence token ids %s are ignored: the model's token ids are in [0, %d)", beyond, vocab_size)
        self._max_model_len = max_model_len
        self._max_num_seqs = max_num_seqs
        self._seed = seed
        self._logits_processors = logits_processors
        self._numbers = itertools.count()

    def requests(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | BeamSearchParams | None,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> list[Request]:
        """The sequences of one prompt, still without a seed; InvalidRequestError when anything is wrong with it."""
        now = time.monotonic()
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams | BeamSearchParams):
            raise InvalidRequestError(f"params is {type(params).__name__}, but must be SamplingParams or BeamSearchParams")
        ids = self._prompt_ids(prompt, request_id)
        self._check_salt(cache_salt, request_id)
        _check_priority_and_timeout(priority, timeout, request_id)
        if isinstance(params, SamplingParams) and params.truncate_prompt_tokens is not None:
            keep = params.truncate_prompt_tokens
            ids = ids[-(self._max_model_len - 1 if keep == -1 else keep) :]
        eos = frozenset[int]() if params.ignore_eos else self.eos_token_ids
        room = max(self._max_model_len - len(ids), 0)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, max(room, 1))
        search = None
        if isinstance(params, BeamSearchParams):
            self._check_beams(params, len(eos), request_id)
            search = BeamSearch(params, max_tokens, eos)
            # Beams are chosen by the likeliest tokens' log-probabilities; nothing else of a step is read.
            params = SamplingParams(n=1, temperature=0, max_tokens=max_tokens, logprobs=0, detokenize=False)
        self._check_sampling(params, request_id)
        common: dict[str, Any] = {
            "request_id": request_id,
            "prompt_token_ids": ids,
            "params": params,
            "max_tokens": max_tokens,
            "stop_token_ids": frozenset(params.stop_token_ids or ()),
            "eos_token_ids": eos,
            "metrics": RequestMetrics(arrival_time=now),
            "cache_salt": cache_salt,
            "priority": int(priority),
            "deadline": None if timeout is None else now + timeout,
            "beam": search,
            "rules": self._rules(params, request_id),
        }
        return [Request(**common, index=index, seed=0) for index in range(search.width if search else params.num_sequences)]

    def give_seeds(self, requests: list[Request]) -> None:
        """Seeds for the sequences of an accepted prompt; only such a one takes a number: a refused one must not change others' draws."""
        first = requests[0]
        if first.beam is not None:
            return
        seed = self._next_seed() if first.params.seed is None else first.params.seed
        for request in requests:
            request.seed = (seed + request.index) & MAX_SEED

    def _check_salt(self, cache_salt: str | None, request_id: str) -> None:
        if cache_salt is not None and (not isinstance(cache_salt, str) or not cache_salt):
            raise InvalidRequestError(f"cache_salt is {cache_salt!r}, but must be a non-empty string (request {request_id!r})")

    def _check_sampling(self, params: SamplingParams, request_id: str) -> None:
        if params.stops and self._tokenizer is None:
            raise InvalidRequestError(f"stop strings need a tokenizer, but skip_tokenizer_init is set (request {request_id!r})")
        self._check_ids(params.stop_token_ids or (), "stop_token_ids", request_id)
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(params, name)
            if count is not None and count > self._vocab_size:
                raise InvalidRequestError(f"{name} is {count}, but the vocabulary has {self._vocab_size} tokens")
        for name in params.logits_processors or ():
            if name not in self._logits_processors:
                known = ", ".join(sorted(self._logits_processors)) or "none"
                raise InvalidRequestError(f"logits_processors has {name!r}, but the engine has {known} (request {request_id!r})")

    def _rules(self, params: SamplingParams, request_id: str) -> LogitRules | None:
        """What the parameters say of tokens, their ids checked; None when they say nothing."""
        where = f"(request {request_id!r})"
        self._check_ids(params.allowed_token_ids or (), "allowed_token_ids", request_id)
        self._check_ids(tuple(params.logit_bias or ()), "logit_bias", request_id)
        sequences = [tuple(ids) for ids in params.bad_words_ids or ()]
        for ids in sequences:
            self._check_ids(ids, "bad_words_ids", request_id)
        for word in params.bad_words or ():
            for ids in (words := self._bad_word(word, where)):
                self._check_ids(ids, f"bad_words (tokens of {word!r:.80})", request_id)
            sequences += words
        rules = LogitRules(
            allowed=None if params.allowed_token_ids is None else frozenset(params.allowed_token_ids),
            banned=frozenset(ids[0] for ids in sequences if len(ids) == 1),
            stops=self.eos_token_ids | frozenset(params.stop_token_ids or ()) if params.min_tokens else frozenset(),
            bias=tuple((params.logit_bias or {}).items()),
            bad_sequences=tuple(dict.fromkeys(ids for ids in sequences if len(ids) > 1)),
        )
        if rules == LogitRules():
            return None
        rules.check(self._vocab_size, where)
        return rules

    def _bad_word(self, word: str, where: str) -> list[tuple[int, ...]]:
        """As vLLM: at the beginning of a text, and after a space where that makes another first token of as many."""
        if self._tokenizer is None:
            raise InvalidRequestError(f"bad_words need a tokenizer, but skip_tokenizer_init is set: give bad_words_ids {where}")
        word = word.lstrip()
        plain, spaced = (tuple(self._tokenizer.encode(text, add_special_tokens=False)) for text in (word, " " + word))
        if not plain:
            raise InvalidRequestError(f"bad_words has a text without tokens {where}")
        return [plain, spaced] if len(spaced) == len(plain) and spaced[0] != plain[0] else [plain]

    def _check_beams(self, params: BeamSearchParams, num_eos: int, request_id: str) -> None:
        each = num_candidates(1, num_eos)
        limit = min(min(MAX_CANDIDATES, self._vocab_size) // each, self._max_num_seqs)
        if params.beam_width > limit:
            raise InvalidRequestError(
                f"beam_width is {params.beam_width}, but must be <= {limit}: {each} candidates for each, "
                f"at most {MAX_CANDIDATES} and the vocabulary, and max_num_seqs (request {request_id!r})"
            )

    def _next_seed(self) -> int:
        """The seed of a request without one: made of the engine's seed and the number of such requests before; never a small number."""
        text = f"{self._seed} {next(self._numbers)}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1

    def _prompt_ids(self, prompt: Prompt, request_id: str) -> list[int]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise InvalidRequestError(f"prompt is text, but skip_tokenizer_init is set: give token ids (request {request_id!r})")
            ids = self._tokenizer.encode(prompt)
            self._check_ids(ids, "prompt", request_id)
            return ids
        if hasattr(prompt, "__array__"):
            prompt = np.asarray(prompt).tolist()
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
            raise InvalidRequestError(f"prompt is {type(prompt).__name__}, but must be text or token ids (request {request_id!r})")
        ids = []
        for index, token in enumerate(prompt):
            if not isinstance(token, int | np.integer) or isinstance(token, bool):
                raise InvalidRequestError(f"prompt has {token!r} at {index}, but must have token ids (request {request_id!r})")
            ids.append(int(token))
        self._check_ids(ids, "prompt", request_id)
        return ids

    def _check_ids(self, ids: Sequence[int], name: str, request_id: str) -> None:
        vocab = self._vocab_size
        for index, token in enumerate(ids):
            if not 0 <= token < vocab:
                raise InvalidRequestError(
                    f"{name} has token id {token} at {index}, but ids must be in [0, {vocab}) (request {request_id!r})"
                )


def _check_priority_and_timeout(priority: int, timeout: float | None, request_id: str) -> None:
    if not isinstance(priority, int | np.integer) or isinstance(priority, bool) or abs(priority) > MAX_PRIORITY:
        raise InvalidRequestError(
            f"priority is {priority!r}, but must be an integer in [-{MAX_PRIORITY}, {MAX_PRIORITY}] (request {request_id!r})"
        )
    if timeout is None:
        return
    if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not 0 < timeout < float("inf"):
        raise InvalidRequestError(f"timeout is {timeout!r}, but must be seconds > 0 or None (request {request_id!r})")
