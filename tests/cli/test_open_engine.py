"""What starts beside an engine ends with it: memory that was got ahead, and the time without collections."""

from __future__ import annotations

import gc
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pjax.engine
from pjax.checkpoints.arena import Arena
from pjax.cli import common
from pjax.cli.flags import make_parser
from tests.tiny import write_model


@pytest.fixture
def arenas(monkeypatch: pytest.MonkeyPatch) -> list[Arena]:
    """Every arena that is made."""
    made, plain = list[Arena](), Arena.__init__

    def remember(self: Arena, ahead: int = 0) -> None:
        made.append(self)
        plain(self, ahead)

    monkeypatch.setattr(Arena, "__init__", remember)
    monkeypatch.setattr(gc, "freeze", lambda: None)  # of a test worker much is garbage later
    return made


def flags(*given: str) -> Namespace:
    parser = make_parser("pjax", "")
    common.add_model(parser, lazy=True)
    return parser.parse_args(given)


def test_an_engine_uses_the_memory_and_closes_it(tmp_path: Path, arenas: list[Arena]) -> None:
    engine = common.open_engine(flags("--model", str(write_model(tmp_path)), "--num-pages", "16"), max_model_len=64)
    assert engine.params is not None
    assert len(arenas) == 1 and arenas[0]._closed
    assert gc.isenabled()
    engine.close()


@pytest.mark.parametrize("enabled", [True, False])
def test_an_error_leaves_nothing_behind(enabled: bool, tmp_path: Path, arenas: list[Arena], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        assert not gc.isenabled()
        raise RuntimeError("no")

    monkeypatch.setattr(pjax.engine, "LLMEngine", fail)
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(RuntimeError, match="no"):
            common.open_engine(flags("--model", str(tmp_path)))
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    assert len(arenas) == 1 and arenas[0]._closed


def test_a_warm_up_is_collected_as_ever(tmp_path: Path, arenas: list[Arena], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[bool]()
    monkeypatch.setattr(pjax.engine, "LLMEngine", lambda *_, **__: seen.append(gc.isenabled()) or SimpleNamespace())
    common.open_engine(flags("--model", str(tmp_path)), lazy=False)
    assert seen == [True]
