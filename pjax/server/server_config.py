"""The server's settings, checked once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pjax.config import EngineConfig, check_step_timeout, is_number
from pjax.errors import ConfigError

TOOL_PARSERS = ("auto", "none", "hermes", "llama3_json", "mistral")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
LOG_FORMATS = ("text", "json")
MAX_CLIENT_PRIORITY = 2**31 - 1
_ORIGIN = re.compile(r"https?://[^/\s*?#]+")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of one server, named as vLLM's flags where vLLM has them. Raises ConfigError when a value is out of its bounds."""

    model: str
    """A Hugging Face folder, a .gguf file or a hub id."""
    tokenizer: str | None = None
    """A path or hub id, where it is not the model's."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    served_model_name: Sequence[str] = ()
    """Names that requests may use for the model, the first of which answers give; `model` by default."""
    chat_template: str | None = None
    """A jinja2 template's file or its text, instead of the checkpoint's. No request can give one."""
    tool_parser: str = "auto"
    """How the model writes tool calls: "hermes" (Qwen too), "llama3_json" or "mistral"; "auto" goes by the chat template, and
    "none" refuses tools."""

    host: str = "127.0.0.1"
    """0.0.0.0 or :: serve other machines too; then give keys, unless something in front checks them."""
    port: int = 8000
    """0 takes a free one, which the log names."""
    root_path: str = ""
    """The path under which a proxy shows the server."""
    api_keys: Sequence[str] = field(default=(), repr=False)
    """Any of them opens everything; without one, or by none, /health, /ready, /version, /metrics and the page's files are open,
    and all else only if there are no keys."""
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = field(default=None, repr=False)
    allowed_origins: Sequence[str] = ()
    """Origins whose web pages may ask (CORS), or "*" for all; none by default."""

    max_waiting: int = 512
    """Requests that may wait in the engine; one more is answered with 429 and Retry-After."""
    max_body_bytes: int = 4 << 20
    """Most bytes of a request."""
    max_prompts: int = 256
    """Most prompts in one request."""
    max_n: int = 128
    """Most sequences of one prompt, `best_of` and beams too."""
    max_client_priority: int = 0
    """Largest priority, and smallest negative one, that a request may ask for in its field `priority`; 0 ignores the field, so that no
    client overtakes the others."""
    max_stop_length: int = 256
    """Most characters of one stop string; `pjax.params` bounds their number."""
    request_timeout: float = 3600.0
    """Seconds until a request is aborted and answered with 504."""
    header_timeout: float = 10.0
    """Seconds in which a request's line and headers must have come, from the connection's start or from their first byte on."""
    body_timeout: float = 30.0
    """Seconds in which a request's body must have come."""
    send_timeout: float = 60.0
    """Seconds that a stream waits for a client that does not read, before it is cut and its pages are freed."""
    keep_alive_seconds: float = 15.0
    """A stream that has nothing to say sends a comment this often; 0 never. An idle connection is closed after as long."""
    drain_seconds: float = 30.0
    """After SIGTERM, requests that run have this long to end; new ones get 503."""
    step_timeout: float | None = 300.0
    """Seconds that a step may take until the device counts as hung and the server ends with status 1; 0 or none is no bound. Loading
    and compiling do not count."""

    log_level: str = "info"
    log_format: str = "text"
    """"json" is one object a line."""
    disable_log_requests: bool = False
    """Leaves out the line that each request has in the log; it never holds prompts or answers."""

    def __post_init__(self) -> None:
        for name in ("served_model_name", "api_keys", "allowed_origins"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        self._check_counts()
        self._check_times()
        self._check_texts()
        self._check_files()

    def _check_counts(self) -> None:
        for name in ("max_waiting", "max_body_bytes", "max_prompts", "max_n", "max_stop_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}, but must be an integer >= 1")
        if not isinstance(self.max_client_priority, int) or not 0 <= self.max_client_priority <= MAX_CLIENT_PRIORITY:
            raise ConfigError(f"max_client_priority is {self.max_client_priority!r}, but must be an integer in [0, {MAX_CLIENT_PRIORITY}]")
        if not isinstance(self.port, int) or isinstance(self.port, bool) or not 0 <= self.port < 65536:
            raise ConfigError(f"port is {self.port!r}, but must be an integer in [0, 65535]")

    def _check_times(self) -> None:
        for name in ("request_timeout", "header_timeout", "body_timeout", "send_timeout", "keep_alive_seconds", "drain_seconds"):
            value = getattr(self, name)
            above = name not in ("keep_alive_seconds", "drain_seconds")
            if not is_number(value) or not 0 <= value <= 1e9 or (above and value == 0):
                raise ConfigError(f"{name} is {value!r}, but must be seconds {'>' if above else '>='} 0")
        check_step_timeout(self.step_timeout)

    def _check_texts(self) -> None:
        for name, choices in (("tool_parser", TOOL_PARSERS), ("log_level", LOG_LEVELS), ("log_format", LOG_FORMATS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, but must be one of {', '.join(choices)}")
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError(f"model is {self.model!r}, but must be a folder, a .gguf file or a hub id")
        for index, key in enumerate(self.api_keys):  # the message must not hold the key
            if not isinstance(key, str) or not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(f"api_keys[{index}] is empty or holds characters other than printable ASCII without spaces")
        for name in self.served_model_name:
            if not isinstance(name, str) or not name:
                raise ConfigError(f"served_model_name has {name!r}, but must have non-empty names")
        for origin in self.allowed_origins:
            if origin != "*" and not (isinstance(origin, str) and _ORIGIN.fullmatch(origin)):
                raise ConfigError(f"allowed_origins has {origin!r}, but must have origins as https://example.org, or *")

    def _check_files(self) -> None:
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ConfigError("ssl_keyfile is given, but ssl_certfile is not")
        for name in ("ssl_certfile", "ssl_keyfile"):
            value = getattr(self, name)
            if value is not None and not Path(value).is_file():
                raise ConfigError(f"{name} is {value!r}, but there is no such file")

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names that requests may use; the first is the one that answers give."""
        return tuple(self.served_model_name) or (self.model,)
