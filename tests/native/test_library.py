"""Loading the library of native kernels, and the instruction sets that it uses."""

from __future__ import annotations

import jax
import pytest

from pjax import native


def test_the_library_was_built() -> None:
    assert native.library() is not None, "make test builds it"


def test_a_level_can_be_hidden_and_a_higher_one_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """PJAX_CPU_LEVEL is read when the library is loaded."""
    library = native.library()
    assert library is not None
    before = native.cpu_level()
    try:
        for level in native.CPU_LEVELS[: native.CPU_LEVELS.index(before) + 1]:
            monkeypatch.setenv("PJAX_CPU_LEVEL", level)
            assert native._load.__wrapped__() is not None and native.cpu_level() == level
        native.limit_cpu_level(None)
        machine = native.cpu_level()
        for level in native.CPU_LEVELS[native.CPU_LEVELS.index(machine) + 1 :]:
            monkeypatch.setenv("PJAX_CPU_LEVEL", level)
            with pytest.raises(ValueError, match=f"PJAX_CPU_LEVEL is '{level}', but this machine has '{machine}' at most"):
                native._load.__wrapped__()
        with pytest.raises(ValueError, match="level is 'sse9', but must be one of baseline, avx2, avx512, amx"):
            native.limit_cpu_level("sse9")
        assert native.cpu_level() == machine
    finally:
        native.limit_cpu_level(before)


def test_a_library_for_a_later_jaxlib_is_left_aside(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA would refuse it, but where no backend is there yet only as that starts."""
    version = native.ffi_version()
    monkeypatch.setattr(native, "ffi_version", lambda: version - 1)
    assert native._load.__wrapped__() is None
    assert f"built for version {version} of XLA's calls, but that of jax {jax.__version__} is {version - 1}" in caplog.text
