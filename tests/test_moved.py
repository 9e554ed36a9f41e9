"""Modules that have moved are found by their former names."""

from __future__ import annotations

import importlib

import pytest

MOVED = [
    ("pjax.models.layers", "Linear", "pjax.layers.linear"),
    ("pjax.models.layers", "RMSNorm", "pjax.layers.norms"),
    ("pjax.models.layers", "LayerStack", "pjax.layers.stack"),
    ("pjax.models.attention", "LayerOptions", "pjax.layers.attention"),
    ("pjax.models.kernels", "FloatKernel", "pjax.layers.kernels"),
    ("pjax.models.rope", "rotate", "pjax.layers.rope"),
    ("pjax.models.weights", "Weight", "pjax.checkpoints.weights"),
    ("pjax.models.config", "ConfigReader", "pjax.models.hf_config"),
    ("pjax.models.config", "RopeConfig", "pjax.layers.rope"),
    ("pjax.pallas_kernels.products", "product", "pjax.native.products"),
]


@pytest.mark.parametrize(("old", "name", "new"), MOVED)
def test_a_former_name_gives_the_same_with_a_warning(old: str, name: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{old}.{name} has moved to {new}.{name}"):
        found = getattr(importlib.import_module(old), name)
    assert found is getattr(importlib.import_module(new), name)


def test_a_name_that_was_never_there_is_not_found() -> None:
    with pytest.raises(AttributeError, match=r"module 'pjax.models.layers' has no attribute 'Lineer'"):
        _ = importlib.import_module("pjax.models.layers").Lineer
