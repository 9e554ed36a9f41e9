"""pjax logs to the logger "pjax" as libraries do; the doors that people start by hand show it."""

from __future__ import annotations

import logging
import os

from pjax.errors import ConfigError

LEVEL_VARIABLE = "PJAX_LOG_LEVEL"


def show_logs() -> None:
    """Shows pjax's messages on standard error, from the level that PJAX_LOG_LEVEL names (INFO) on.

    An application that has set up logging keeps its own way. ConfigError when there is no such level.
    """
    logger = logging.getLogger("pjax")
    if logger.handlers or logging.getLogger().handlers:
        return
    level = os.environ.get(LEVEL_VARIABLE, "INFO").upper()
    if level not in logging.getLevelNamesMapping():
        raise ConfigError(f"{LEVEL_VARIABLE} is {level!r}, but must be one of {', '.join(logging.getLevelNamesMapping())}")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(level)
