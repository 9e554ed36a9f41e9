"""Compiled programs: each is compiled once, what is needed goes first, and the background thread takes the rest."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from pjax.runner.batch import Bucket, SampleShape
from pjax.runner.programs import Programs, Shape

A, B, C, D = (SampleShape(rows) for rows in (1, 2, 4, 8))


class Compiler:
    """Stands in for a compiler: notes its calls, and lets each go on when told."""

    def __init__(self, *held: Shape) -> None:
        self.calls: list[Shape] = []
        self.held = {shape: threading.Event() for shape in held}
        self.began: dict[Shape, threading.Event] = {shape: threading.Event() for shape in (A, B, C, D)}

    def __call__(self, shape: Shape) -> str:
        self.calls.append(shape)
        self.began[shape].set()
        if shape in self.held:
            assert self.held[shape].wait(30)
        return shape.name


class FailingOnce:
    """Stands in for a compiler whose first compilation fails."""

    def __init__(self) -> None:
        self.calls: list[Shape] = []

    def __call__(self, shape: Shape) -> str:
        self.calls.append(shape)
        if len(self.calls) == 1:
            raise RuntimeError("no memory")
        return shape.name


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_each_is_compiled_once() -> None:
    compiler = Compiler()
    programs = Programs(compiler)
    programs.prefetch(A, B, A)
    assert [programs.get(shape) for shape in (B, A, B, C)] == ["sample_2", "sample_1", "sample_2", "sample_4"]
    assert sorted(shape.name for shape in compiler.calls) == ["sample_1", "sample_2", "sample_4"]
    assert programs.num_compilations == 3 and not programs.is_compiling and not programs.is_waiting
    assert programs.has(A, B, C) and not programs.has(A, D)
    programs.close()


def test_what_was_prefetched_is_there_when_it_is_done() -> None:
    compiler = Compiler(A)
    programs = Programs(compiler)
    programs.prefetch(A, B)
    until(lambda: programs.has(B))
    assert not programs.has(A) and not programs.has(A, B) and programs.num_compilations == 1 and programs.is_compiling
    compiler.held[A].set()
    until(lambda: programs.has(A, B))
    assert programs.num_compilations == 2 and programs.get(A) == "sample_1" and programs.num_compilations == 2
    programs.close()


def test_a_compilation_that_failed_is_tried_again() -> None:
    compiler = FailingOnce()
    programs = Programs(compiler)
    with pytest.raises(RuntimeError, match="no memory"):
        programs.get(A)
    assert not programs.is_waiting and not programs.has(A) and programs.num_compilations == 0
    assert programs.get(A) == "sample_1"
    programs.close()


def test_the_background_compiles_in_order_and_what_is_hurried_first(caplog: pytest.LogCaptureFixture) -> None:
    compiler = Compiler(A)
    programs = Programs(compiler)
    with caplog.at_level(logging.INFO, "pjax"):
        programs.warm_in_background([A, B, C, D])
        assert compiler.began[A].wait(30)
        assert programs.is_warming and not programs.is_compiling and programs.num_queued == 3
        programs.hurry(D, A)
        compiler.held[A].set()
        until(lambda: not programs.is_warming)
    assert compiler.calls == [A, D, B, C]
    assert programs.has(A, B, C, D) and programs.num_compilations == 4
    assert "all 4 programs are compiled" in caplog.text
    programs.close()


def test_what_is_needed_does_not_wait_for_the_background() -> None:
    compiler = Compiler(A, C)
    programs = Programs(compiler)
    programs.warm_in_background([A, B])
    assert compiler.began[A].wait(30)
    assert programs.get(B) == "sample_2" and programs.is_warming, "the background is at A still"
    waiting = threading.Thread(target=lambda: programs.get(A))
    waiting.start()  # for the compilation that runs already
    until(lambda: programs.is_waiting)
    compiler.held[A].set()
    waiting.join(30)
    until(lambda: not programs.is_warming)
    assert compiler.calls == [A, B] and programs.num_compilations == 2
    programs.close()


def test_what_fails_in_the_background_is_named_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    compiler = FailingOnce()
    programs = Programs(compiler)
    ended: list[int] = []
    programs.warm_in_background([A, B], lambda: ended.append(programs.num_compilations))
    until(lambda: not programs.is_warming)
    assert ended == [1]
    assert "sample_1 was not compiled" in caplog.text and "no memory" in caplog.text
    assert not programs.has(A) and programs.has(B)
    assert programs.get(A) == "sample_1" and compiler.calls == [A, B, A]
    programs.close()


def test_what_comes_after_all_programs_may_fail(caplog: pytest.LogCaptureFixture) -> None:
    programs = Programs(Compiler())
    programs.warm_in_background([A], lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    until(lambda: not programs.is_warming)
    assert programs.has(A) and "copies to the host were not compiled" in caplog.text
    programs.close()


def test_the_background_ends_with_its_owner() -> None:
    """Closed, or dropped by everybody."""
    for close in (True, False):
        compiler = Compiler(A)
        programs = Programs(compiler)
        programs.warm_in_background([A, B])
        assert compiler.began[A].wait(30)
        thread = programs._background
        assert thread is not None
        if close:
            programs.close()
        ref = weakref.ref(programs)
        del programs
        compiler.held[A].set()
        gc.collect()
        thread.join(30)
        assert not thread.is_alive()
        if close:
            assert compiler.calls == [A]
        gc.collect()
        assert ref() is None


LEAVING = """
import sys
from pjax import LLM, SamplingParams
llm = LLM(sys.argv[1], compilation_cache_dir=None, max_model_len=96, num_pages=16, max_num_seqs=64, progress=False)
print(len(llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)[0].outputs[0].token_ids))
assert llm.engine.runner.programs.is_warming
"""


def test_a_process_ends_in_the_middle_of_its_warm_up(tmp_path: Path) -> None:
    from tests.tiny import write_model

    write_model(tmp_path)
    done = subprocess.run([sys.executable, "-c", LEAVING, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


def test_names_of_shapes_differ() -> None:
    assert len({shape.name for shape in (A, B, Bucket(True, 1, 1), Bucket(False, 16, 4))}) == 4
