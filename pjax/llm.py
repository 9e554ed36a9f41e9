"""`LLM`: batch generation with vLLM's names and shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from pjax.config import EngineConfig
from pjax.engine import LLMEngine, Prompt, Replicas
from pjax.errors import ConfigError, InvalidRequestError
from pjax.logs import show_logs
from pjax.outputs import BeamSearchOutput, BeamSearchSequence, RequestOutput
from pjax.params import BeamSearchParams, SamplingParams
from pjax.scheduler.beam_search import score
from pjax.text.chat_template import read_template
from pjax.text.tokenizer import Tokenizer

Message = Mapping[str, Any]


class LLM:
    """A model ready to generate.

    Args:
      model: a Hugging Face folder, a .gguf file, or a hub id; or a model of pjax (`pjax.models.load`) that holds its parameters.
      params: parameters to use instead of the checkpoint's: a module, its state, or a tree of dictionaries with its names. They
        are used where they are, without a copy.
      tokenizer: a path or hub id, where it is not the model's.
      dtype: "auto", "float32", "bfloat16" or "float16".
      skip_tokenizer_init: token ids in, token ids out; the checkpoint needs no tokenizer.
      chat_template: a chat template, or the path of one, instead of the checkpoint's.
      progress: show progress bars and log messages.
      options: any other field of `pjax.config.EngineConfig` (max_model_len, max_num_seqs, max_num_batched_tokens, seed, …).

    Raises ConfigError, CheckpointError or UnsupportedError, and TypeError for an option that does not exist.
    """

    def __init__(
        self,
        model: Any,
        *,
        params: Any = None,
        tokenizer: str | Path | None = None,
        dtype: str = "auto",
        skip_tokenizer_init: bool = False,
        chat_template: str | Path | None = None,
        progress: bool = True,
        **options: Any,
    ) -> None:
        config = EngineConfig(dtype=dtype, **options)
        if chat_template is not None and skip_tokenizer_init:
            raise ConfigError("chat_template needs a tokenizer, but skip_tokenizer_init is set")
        template = None if chat_template is None else read_template(chat_template)
        if progress:
            show_logs()
        make = LLMEngine if config.data_parallel_size == 1 else Replicas
        self.engine: Any = make(
            model, config, params=params, tokenizer=tokenizer, skip_tokenizer_init=skip_tokenizer_init, progress=progress
        )
        if template is not None:
            self.get_tokenizer().chat_template = template

    def update_params(self, params: Any, *, restart: bool = False) -> None:
        """Swaps the parameters; see `LLMEngine.update_params`."""
        self.engine.update_params(params, restart=restart)

    def start_profile(self, folder: str | Path) -> None:
        """Starts a trace of JAX's profiler: device, host and Python; TensorBoard, XProf and Perfetto show it."""
        jax.profiler.start_trace(str(folder))

    def stop_profile(self) -> None:
        """Ends the trace and writes it into the folder."""
        jax.profiler.stop_trace()

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer; InvalidRequestError when it was skipped."""
        if self.engine.tokenizer is None:
            raise InvalidRequestError("there is no tokenizer: skip_tokenizer_init is set")
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when it is given no parameters."""
        return SamplingParams()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] | None = None,
        timeout: float | None = None,
    ) -> list[RequestOutput]:
        """Generates for every prompt, in one continuous batch; outputs come in the order of the prompts.

        A sequence whose next token cannot be sampled, because its logits are NaN or infinite, has `finish_reason` "error" and the message
        as its `stop_reason`; the others are not affected.

        Args:
          prompts: text, a list of texts, a list of token ids, or a list of such lists; instead of a text or a list of ids also
            vLLM's {"prompt": text} and {"prompt_token_ids": ids}, with a "cache_salt" if wanted, and arrays instead of lists of ids.
          sampling_params: one for all, or one each.
          priority: one for all, or one each; the lower, the earlier a prompt is served.
          timeout: seconds after which each ends with reason "timeout" and what it has by then.

        Raises InvalidRequestError, before anything runs, when a prompt or its parameters are wrong.
        """
        return self._generate(_as_list(prompts), sampling_params, use_tqdm, priority, timeout)

    def _generate(
        self,
        listed: list[Any],
        sampling_params: Any,
        use_tqdm: bool,
        priority: int | Sequence[int] | None = None,
        timeout: float | None = None,
    ) -> list[RequestOutput]:
        if self.engine.has_unfinished_requests:
            raise InvalidRequestError("the engine has unfinished requests of add_request: step() them to their end first")
        if sampling_params is None or isinstance(sampling_params, SamplingParams | BeamSearchParams):
            params: list[Any] = [sampling_params] * len(listed)
        elif isinstance(sampling_params, Sequence):
            params = list(sampling_params)
        else:
            raise InvalidRequestError(f"sampling_params is {type(sampling_params).__name__}, but must be SamplingParams or a list of them")
        if len(params) != len(listed):
            raise InvalidRequestError(f"there are {len(params)} sampling_params for {len(listed)} prompts")
        priorities = list(priority) if isinstance(priority, Sequence) else [priority or 0] * len(listed)
        if len(priorities) != len(listed):
            raise InvalidRequestError(f"there are {len(priorities)} priorities for {len(listed)} prompts")
        ids: list[str] = []
        try:
            for prompt, one, level in zip(listed, params, priorities, strict=True):
                prompt, cache_salt = _salted(prompt)
                ids.append(self.engine.add_request(prompt, one, cache_salt=cache_salt, priority=level, timeout=timeout))
            self.engine.prefetch()
        except BaseException:
            for request_id in ids:
                self.engine.abort_request(request_id)
            raise
        return self._run(ids, use_tqdm)

    def beam_search(self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, use_tqdm: bool = False) -> list[BeamSearchOutput]:
        """The `beam_width` best sequences that beam search finds for every prompt, in the order of the prompts.

        Args:
          prompts: as for `generate`.

        Raises InvalidRequestError, before anything runs, when a prompt or the parameters are wrong.
        """
        if not isinstance(params, BeamSearchParams):
            raise InvalidRequestError(f"params is {type(params).__name__}, but must be BeamSearchParams")
        return [self._as_beams(output, params) for output in self._generate(_as_list(prompts), params, use_tqdm)]

    def _as_beams(self, output: RequestOutput, params: BeamSearchParams) -> BeamSearchOutput:
        sequences = []
        for found in output.outputs:
            tokens = output.prompt_token_ids + found.token_ids
            cum_logprob = found.cumulative_logprob or 0.0
            sequences.append(
                BeamSearchSequence(
                    tokens=tokens,
                    text=self.engine.tokenizer.decode(tokens) if self.engine.tokenizer else "",
                    cum_logprob=cum_logprob,
                    score=score(cum_logprob, max(len(found.token_ids), 1), params.length_penalty),
                    finish_reason=found.finish_reason or "length",
                    stop_reason=found.stop_reason,
                )
            )
        return BeamSearchOutput(sequences)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | Path | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Like `generate`, for one conversation or a list of them, through a chat template.

        Args:
          chat_template: a template, or the path of one, instead of the model's.
          chat_template_kwargs: variables that the template may name, such as Qwen 3's enable_thinking.
        """
        conversations = _as_conversations(messages)
        tokenizer = self.get_tokenizer()
        options = dict(chat_template_kwargs or {}) | {"add_generation_prompt": add_generation_prompt}
        options["chat_template"] = None if chat_template is None else read_template(chat_template)
        prompts = [tokenizer.encode(tokenizer.apply_chat_template(c, **options), add_special_tokens=False) for c in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def _run(self, ids: list[str], use_tqdm: bool) -> list[RequestOutput]:
        finished: dict[str, RequestOutput] = {}
        num_in = num_out = 0
        with tqdm(total=len(ids), desc="Generating", unit="req", disable=not use_tqdm, dynamic_ncols=True) as bar:
            try:
                while self.engine.has_unfinished_requests:
                    for output in self.engine.step():
                        if not output.finished:
                            continue
                        finished[output.request_id] = output
                        num_in += len(output.prompt_token_ids)
                        num_out += len(output.outputs[0].token_ids)
                        elapsed = max(bar.format_dict["elapsed"], 1e-9)
                        bar.set_postfix_str(f"in {num_in / elapsed:.1f} tok/s, out {num_out / elapsed:.1f} tok/s", refresh=False)
                        bar.update()
            except BaseException:
                for request_id in ids:
                    self.engine.abort_request(request_id)
                raise
        return [finished[request_id] for request_id in ids]


def _as_conversations(messages: Any) -> list[Any]:
    if not isinstance(messages, list | tuple):
        raise InvalidRequestError(f"messages is {type(messages).__name__}, but must be a list of messages or a list of such lists")
    conversations = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
    for index, conversation in enumerate(conversations or [[]]):
        if not isinstance(conversation, list | tuple) or not conversation or not all(isinstance(m, Mapping) for m in conversation):
            raise InvalidRequestError(f"conversation {index} is {conversation!r:.80}, but must be a list of one message or more")
    return conversations


def _as_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if hasattr(prompts, "__array__"):
        prompts = np.asarray(prompts)
        if prompts.ndim not in (1, 2) or prompts.dtype.kind not in "iu":
            raise InvalidRequestError(f"prompts is {prompts.dtype}{list(prompts.shape)}, but must be integers of one or two dimensions")
        prompts = prompts.tolist()
    if not isinstance(prompts, list | tuple):
        raise InvalidRequestError(f"prompts is {type(prompts).__name__}, but must be text, token ids, or a list of either")
    if prompts and isinstance(prompts[0], int | float | np.number):
        return [prompts]  # token ids of one prompt
    return list(prompts)


def _salted(prompt: Any) -> tuple[Any, Any]:
    """Prompt and cache salt of vLLM's dictionaries; anything else is left to the engine's checks."""
    if not isinstance(prompt, Mapping):
        return prompt, None
    named = set(prompt) - {"cache_salt"}
    if named not in ({"prompt"}, {"prompt_token_ids"}):
        keys = sorted(map(str, prompt))
        raise InvalidRequestError(f"prompt has keys {keys}, but must have one of prompt and prompt_token_ids, and may have cache_salt")
    return prompt[named.pop()], prompt.get("cache_salt")
