"""Former names of modules that have moved: they still give what they gave, with a warning."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any


def attribute_of(old: str, *new: str) -> Callable[[str], Any]:
    """Returns a module's `__getattr__`: it takes names from the modules `new` and gives a DeprecationWarning.

    Args:
      old: name of the module that has moved.
      new: names of the modules that have its contents now.
    """

    def get(name: str) -> Any:
        for place in new:
            module = importlib.import_module(place)
            if not name.startswith("__") and hasattr(module, name):
                warnings.warn(f"{old}.{name} has moved to {place}.{name}; the old name goes in 0.3", DeprecationWarning, stacklevel=2)
                return getattr(module, name)
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return get
