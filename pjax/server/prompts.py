"""Texts and conversations as token ids, off the event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from pjax.engine import AsyncLLM
from pjax.errors import ConfigError, InvalidRequestError
from pjax.server.errors import ApiError, invalid
from pjax.server.schemas import Conversation, Message
from pjax.server.server_config import ServerConfig
from pjax.text.tokenizer import Tokenizer

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

    def model(self, name: str | None) -> str:
        """The name that the answer gives; ApiError 404 when it is another model's."""
        if name is not None and name not in self._names:
            raise ApiError(404, f"there is no model {name!r:.200}; there is {self._names[0]!r}", param="model", code="model_not_found")
        return self._names[0] if name is None else name

    async def of_completion(self, prompt: Any, add_special_tokens: bool) -> list[tuple[str | None, list[int]]]:
        """(text, ids) of each prompt of a completion; the text is None where ids were given."""
        listed = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
        if not 1 <= len(listed) <= self._max_prompts:
            raise invalid("prompt", f"prompt has {len(listed)} prompts, but must have 1 to {self._max_prompts}")
        return [(one, await self.encode(one, add_special_tokens)) if isinstance(one, str) else (None, one) for one in listed]

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)

    async def of_chat(self, chat: Conversation, *, with_tools: bool = True) -> list[int]:
        """Token ids of a conversation."""
        text = await asyncio.to_thread(self._render, chat, with_tools)
        return await self.encode(text, chat.add_special_tokens)

    def _render(self, chat: Conversation, with_tools: bool) -> str:
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
        messages = [_plain(message) for message in chat.messages]
        ask = chat.add_generation_prompt and not chat.continue_final_message
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=ask, **variables)
        except (InvalidRequestError, RecursionError) as error:
            raise invalid("messages", str(error)) from None
        if not chat.continue_final_message:
            return text
        final = str(messages[-1].get("content") or "").strip()
        at = text.rfind(final)
        if not final or at < 0:
            raise invalid("continue_final_message", "the chat template does not show the final message's content, so it can't be continued")
        return text[: at + len(final)]

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
