"""Every error that pjax raises on purpose.

    PjaxError
    ├── ConfigError            (ValueError)           a setting of the engine is wrong or does not fit
    ├── InvalidRequestError    (ValueError)           one request is wrong; nobody else is affected
    ├── CheckpointError        (ValueError)           a checkpoint is missing, damaged or not what its config says
    ├── QueueFullError         (RuntimeError)         too many requests wait already; try again later
    ├── RequestFailedError     (RuntimeError)         steps with this request failed, or gave no token; the engine goes on
    ├── EngineDeadError        (RuntimeError)         the engine died, or is shut down
    └── UnsupportedError       (NotImplementedError)  right, but not supported; the message names what is

Messages carry name, value, bound and place, for example
`prompt has 5120 tokens, but max_model_len is 4096 (request "7")`.
"""


class PjaxError(Exception):
    """Base of all errors that pjax raises on purpose."""


class ConfigError(PjaxError, ValueError):
    """A setting of the engine is wrong or does not fit the device."""


class InvalidRequestError(PjaxError, ValueError):
    """One request is wrong. Other requests are not affected."""


class CheckpointError(PjaxError, ValueError):
    """A checkpoint is missing, damaged, or not what its config says."""


class UnsupportedError(PjaxError, NotImplementedError):
    """The request is valid, but pjax does not support it; the message names what is supported."""


class QueueFullError(PjaxError, RuntimeError):
    """Too many requests wait already. The same request may be taken later."""


class RequestFailedError(PjaxError, RuntimeError):
    """Steps with this request failed again and again, or its next token could not be sampled; the engine goes on without it."""


class EngineDeadError(PjaxError, RuntimeError):
    """The engine died, or is shut down; the message says of what."""
