"""What requests may hold. A field that is not here is refused by its name; so is one that the engine does not apply."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from pjax.params import MAX_LOGPROBS, MAX_N, MAX_SEED, MAX_STOP_STRINGS
from pjax.server.errors import UNKNOWN_FIELD

MAX_BAD_WORDS = 256
MAX_BIASED = 1024  # as OpenAI; `pjax.params` has the same bound
MAX_TOKEN_IDS = 1 << 20  # of one list; the model's length bounds prompts further
MAX_MESSAGES = 16_384
MAX_TOOLS = 1024
T = TypeVar("T")
# Lists end at their first wrong item, and their length is checked before their items are: a hostile body makes few errors.
Items = Annotated[list[T], Field(fail_fast=True)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKEN_IDS, fail_fast=True)]
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


def _few(value: Any) -> Any:
    """Refuses a mapping that is too long before each of its keys can make an error."""
    if isinstance(value, dict) and len(value) > MAX_BIASED:
        raise PydanticCustomError("too_long", "it must have at most {most} tokens", {"most": MAX_BIASED})
    return value


class Strict(BaseModel):
    """No unknown field, no conversion of types, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _first_unknown(cls, value: Any) -> Any:
        """One error for the first unknown field, where pydantic would make one for each."""
        if isinstance(value, dict):
            for name in value:
                if name not in cls.model_fields:
                    raise PydanticCustomError(UNKNOWN_FIELD, "unknown field", {"name": name[:100].encode("utf-8", "replace").decode()})
        return value


class StreamOptions(Strict):
    """OpenAI's options of a stream; the second field is vLLM's."""

    include_usage: bool = False
    """A last chunk without choices tells the usage."""
    continuous_usage_stats: bool = False
    """Every chunk tells the usage so far."""
    include_obfuscation: Literal[False] = False


class Sampling(Strict):
    """Fields that completions and chats share. Those that are not OpenAI's have vLLM's names."""

    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_N)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None = Field(
        None, description="a text or a list of texts"
    )
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: (
        Annotated[dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_few)]
        | None
    ) = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=256)] | None = Field(None, description="stands in the request's line of the log")

    best_of: int | None = Field(None, ge=1, le=MAX_N)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS, fail_fast=True)] | None = None
    bad_words: Annotated[list[Text], Field(max_length=MAX_BAD_WORDS, fail_fast=True)] | None = None
    allowed_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: Literal[True] = True
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    truncate_prompt_tokens: int | None = Field(None, ge=-1, lt=2**31)
    return_token_ids: bool | None = None
    use_beam_search: bool = False
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    cache_salt: Name | None = None
    priority: int = Field(0, ge=-(2**31), lt=2**31)


class CompletionRequest(Sampling):
    """Body of /v1/completions."""

    prompt: str | Items[str] | TokenIds | Items[TokenIds] = Field(description="a text, token ids, or a list of either")
    max_tokens: int | None = Field(16, ge=0, lt=2**31)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = False
    suffix: Literal[""] | None = None
    add_special_tokens: bool = True


class Function(Strict):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]+$", max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(Strict):
    """Something that the model may use: a function."""

    type: Literal["function"]
    function: Function


class CalledFunction(Strict):
    """A call that the model made earlier."""

    name: Name
    arguments: str | None = None


class ToolCall(Strict):
    """A call in an assistant's message."""

    id: Name
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class TextPart(Strict):
    """The only kind of part that pjax reads."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One message of a conversation. The fields that may only be null are those of OpenAI's own answers."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Items[TextPart] | None = Field(None, description="a text, a list of parts of type text, or null")
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_call_id: Name | None = None
    reasoning_content: str | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0, fail_fast=True)] | None = None
    audio: None = None
    function_call: None = None


class ResponseFormat(Strict):
    """Free text is the only one."""

    type: Literal["text"]


class Conversation(Strict):
    """Fields that decide how messages become a prompt."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    documents: Items[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatRequest(Sampling, Conversation):
    """Body of /v1/chat/completions."""

    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tool_choice: Literal["none", "auto"] | None = Field(None, description="none or auto: pjax can't force a call")
    parallel_tool_calls: bool | None = True
    response_format: ResponseFormat | None = None
    echo: bool | None = False
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: Annotated[dict[str, Any], Field(max_length=0)] | None = None


class TokenizeText(Strict):
    """Body of /tokenize for a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


class TokenizeChat(Conversation):
    """Body of /tokenize for a conversation."""

    model: str | None = None
    return_token_strs: bool | None = False


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer other than 200, as OpenAI gives it."""

    error: ErrorDetail


class DetokenizeRequest(Strict):
    """Body of /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS, fail_fast=True)]
