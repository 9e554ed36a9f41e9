"""Texts and conversations as token ids, off the event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any, cast

from pjax.engine import AsyncLLM
from pjax.errors import ConfigError, InvalidRequestError
from pjax.server.errors import ApiError, invalid
from pjax.server.schemas import Conversation, Message
from pjax.server.server_config import ServerConfig
from pjax.server.templates import Renderer, TooLongError
from pjax.server.threads import Unjoined
from pjax.text.tokenizer import Tokenizer

LONG_TEXT = 1 << 16  # characters of a text that waits for other long ones, so that short ones wait for none
NUM_THREADS = 2  # in which short texts become tokens
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize")


class Prompts:
    """Makes prompts for one model, and checks whose they are and how long."""

    def __init__(self, llm: AsyncLLM, config: ServerConfig) -> None:
        if llm.engine.tokenizer is None:
            raise ConfigError("the server needs a tokenizer, but skip_tokenizer_init is set")
        self.tokenizer: Tokenizer = llm.engine.tokenizer
        self.max_model_len = llm.engine.max_model_len
        self._names = config.model_names
        self._max_prompts = config.max_prompts
        self.renderer = Renderer()
        self._short = Unjoined(NUM_THREADS, thread_name_prefix="pjax-text")
        self._long = Unjoined(1, thread_name_prefix="pjax-long-text")

    def close(self) -> None:
        """Ends the processes and threads that make prompts; what they work on fails."""
        self.renderer.close()
        self._short.shutdown()
        self._long.shutdown()

    def model(self, name: str | None) -> str:
        """The name that the answer gives; ApiError 404 when it is another model's."""
        if name is not None and name not in self._names:
            raise ApiError(404, f"there is no model {name!r:.200}; there is {self._names[0]!r}", param="model", code="model_not_found")
        return self._names[0] if name is None else name

    async def of_completion(self, prompt: Any, add_special_tokens: bool, *, may_be_cut: bool = False) -> list[tuple[str | None, list[int]]]:
        """(text, ids) of each prompt of a completion; the text is None where ids were given."""
        listed = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
        if not 1 <= len(listed) <= self._max_prompts:
            raise invalid("prompt", f"prompt has {len(listed)} prompts, but must have 1 to {self._max_prompts}")
        for one in listed:  # all of them before the first is worked on
            if not may_be_cut and len(one) >= self.max_model_len:
                await self._check_length(one, "prompt")
        return [(one, await self.encode(one, add_special_tokens)) if isinstance(one, str) else (None, one) for one in listed]

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        return cast(list[int], await self.run(len(text), self.tokenizer.encode, text, add_special_tokens))

    async def encode_whole(self, text: str, add_special_tokens: bool, param: str) -> list[int]:
        """Token ids of a text; ApiError 400 when its length says already that the model cannot take it."""
        if len(text) >= self.max_model_len:
            await self._check_length(text, param)
        return await self.encode(text, add_special_tokens)

    async def run(self, length: int, work: Callable[..., Any], *arguments: Any) -> Any:
        """The result of some work on a text or token ids of this length, in a thread; long ones run one after the other."""
        return await asyncio.get_running_loop().run_in_executor(self._long if length >= LONG_TEXT else self._short, work, *arguments)

    async def _max_chars(self) -> int:
        """Characters of the longest text that fits the model."""
        return self.max_model_len * cast(int, await self.run(0, lambda: self.tokenizer.longest_token))

    async def _check_length(self, prompt: str | list[int], param: str) -> None:
        """ApiError 400 for a prompt that cannot fit the model, whatever its tokens are."""
        if not isinstance(prompt, str):
            self.check(prompt, None, param)
        elif len(prompt) > await self._max_chars():
            raise self._too_long(len(prompt), param)

    def _too_long(self, num_chars: int, param: str) -> ApiError:
        message = f"{param} has {num_chars} characters, more than max_model_len, {self.max_model_len} tokens, can hold"
        return invalid(param, message, "context_length_exceeded")

    async def of_chat(self, chat: Conversation, *, with_tools: bool = True, may_be_cut: bool = False) -> list[int]:
        """Token ids of a conversation."""
        messages, template, names = await self.run(0, self._chat_of, chat, with_tools)
        try:
            text = await self.renderer.render(template, names, None if may_be_cut else await self._max_chars())
        except TooLongError as error:
            raise self._too_long(error.num_chars, "messages") from None
        except (InvalidRequestError, RecursionError) as error:
            raise invalid("messages", str(error)) from None
        if chat.continue_final_message:
            text = _continued(text, messages)
        return await self.encode(text, chat.add_special_tokens)

    def _chat_of(self, chat: Conversation, with_tools: bool) -> tuple[list[dict[str, Any]], str, dict[str, Any]]:
        """(messages as templates read them, template, what it may name)."""
        messages = [_plain(message) for message in chat.messages]
        if chat.continue_final_message and chat.add_generation_prompt and "add_generation_prompt" in chat.model_fields_set:
            raise invalid("continue_final_message", "continue_final_message and add_generation_prompt can't both be true")
        variables = dict(chat.chat_template_kwargs or {})
        for name in RESERVED:
            if name in variables:
                raise invalid(
                    "chat_template_kwargs", f"chat_template_kwargs has {name}, which is a field of the request or not to be given"
                )
        if chat.tools and with_tools:
            variables["tools"] = [tool.model_dump(exclude_unset=True) for tool in chat.tools]
        if chat.documents is not None:
            variables["documents"] = chat.documents
        variables["add_generation_prompt"] = chat.add_generation_prompt and not chat.continue_final_message
        try:
            return (messages, *self.tokenizer.chat_of(messages, variables))
        except InvalidRequestError as error:
            raise invalid("messages", str(error)) from None

    def truncate(self, ids: list[int], limit: int | None, max_tokens: int | None) -> list[int]:
        """The last `limit` tokens; with -1 as many as leave room for the answer."""
        if limit is None:
            return ids
        if limit == 0:
            raise invalid("truncate_prompt_tokens", "truncate_prompt_tokens is 0, but must be >= 1, or -1 for what fits")
        return ids[-(limit if limit > 0 else max(self.max_model_len - (max_tokens or 1), 1)) :]

    def check(self, ids: Sequence[int], max_tokens: int | None, param: str) -> None:
        """ApiError 400 when a prompt, or with it the tokens that were asked for, can't fit the model."""
        length = len(ids)
        if length >= self.max_model_len:
            message = f"{param} has {length} tokens, but max_model_len is {self.max_model_len}, of which one is for the answer"
            raise invalid(param, message, "context_length_exceeded")
        if max_tokens is not None and length + max_tokens > self.max_model_len:
            message = f"max_tokens is {max_tokens}, but {param} has {length} tokens and max_model_len is {self.max_model_len}"
            raise invalid("max_tokens", message, "context_length_exceeded")


def _continued(text: str, messages: Sequence[dict[str, Any]]) -> str:
    """A rendered conversation up to the end of its last message."""
    final = str(messages[-1].get("content") or "").strip()
    at = text.rfind(final)
    if not final or at < 0:
        raise invalid("continue_final_message", "the chat template does not show the final message's content, so it can't be continued")
    return text[: at + len(final)]


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates read it: one text, and the arguments of calls as mappings."""
    plain = message.model_dump(exclude_none=True, exclude={"annotations"})
    if isinstance(message.content, list):
        plain["content"] = "\n".join(part.text for part in message.content)
    plain.setdefault("content", "" if message.tool_calls is None else None)
    for call in plain.get("tool_calls", ()):
        call.pop("index", None)
        try:
            arguments = json.loads(call["function"].get("arguments") or "{}")
        except (ValueError, RecursionError):
            raise invalid("messages", f"arguments of the call {call['id']!r:.80} are not JSON") from None
        call["function"]["arguments"] = arguments
    return plain
