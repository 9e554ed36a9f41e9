"""What fails in a step, at any point of it, costs time and nothing else; requests are told apart though they share an id."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest

from pjax import LLM, BeamSearchParams, LLMEngine, RequestOutput, SamplingParams
from pjax.engine import StepStats
from pjax.engine.engine import LONG_PAUSE
from pjax.scheduler import Request
from tests.engine import common
from tests.engine.common import greedy, ids

OPTIONS: dict[str, Any] = common.OPTIONS
REQUESTS: dict[str, tuple[str, SamplingParams]] = {
    "greedy": ("hello", greedy(12)),
    "sampled": ("world", SamplingParams(temperature=1, seed=1, max_tokens=10, ignore_eos=True)),
    "scored": ("a longer prompt, of several pages", greedy(6, prompt_logprobs=2, logprobs=1)),
    "two": ("both", SamplingParams(n=2, temperature=0.8, seed=3, max_tokens=8, ignore_eos=True)),
}


def seen(output: RequestOutput) -> Any:
    """All of an output that a caller may rely on."""
    chosen = [None if one is None else {token: entry.rank for token, entry in one.items()} for one in output.prompt_logprobs or ()]
    return [(one.text, one.token_ids, one.finish_reason) for one in output.outputs], chosen


def add_all(engine: LLMEngine) -> None:
    for name, (prompt, params) in REQUESTS.items():
        engine.add_request(prompt, params, name)


def run(engine: LLMEngine, failures: tuple[type[BaseException], ...] = ()) -> dict[str, Any]:
    """Steps to the end, through failures; what each request got last."""
    done: dict[str, Any] = {}
    for _ in range(300):
        if not engine.has_unfinished_requests:
            break
        try:
            done |= {output.request_id: seen(output) for output in engine.step() if output.finished}
        except failures:
            engine.scheduler.check()
    engine.scheduler.check()
    assert not engine.has_unfinished_requests and engine.scheduler.pool.num_used == 0, "something hangs"
    return done


@pytest.fixture(scope="module")
def expected(llm: LLM) -> dict[str, Any]:
    add_all(llm.engine)
    found = run(llm.engine)
    assert set(found) == set(REQUESTS)
    return found


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int, fail: Callable[[], None], *, after: bool) -> list[int]:
    """Makes one call of a method fail, before or after it did its work; counts the calls."""
    whole, calls = getattr(owner, name), [0]

    def method(*arguments: Any, **fields: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and not after:
            fail()
        made = whole(*arguments, **fields)
        if calls[0] == call and after:
            fail()
        return made

    monkeypatch.setattr(owner, name, method)
    return calls


def raise_error() -> None:
    raise RuntimeError("injected")


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", [1, 4])
@pytest.mark.parametrize(
    ("part", "method"),
    [("scheduler", "schedule"), ("runner", "dispatch"), ("runner", "_start"), ("runner", "fetch"), ("scheduler", "commit")],
    ids=str,
)
def test_a_failed_step_loses_nothing(
    llm: LLM, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, part: str, method: str, call: int, after: bool
) -> None:
    calls = fail_at(monkeypatch, getattr(llm.engine, part), method, call, raise_error, after=after)
    add_all(llm.engine)
    assert run(llm.engine, (RuntimeError,)) == expected
    assert calls[0] > call


@pytest.mark.parametrize("call", [1, 6])
@pytest.mark.parametrize(
    ("part", "method"),
    [("scheduler", "schedule"), ("scheduler", "_append"), ("_views", "observe"), ("_views", "output"), ("runner", "fetch")],
    ids=str,
)
def test_ctrl_c_loses_nothing(
    llm: LLM, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, part: str, method: str, call: int
) -> None:
    """Wherever it comes: while some requests have their token, and others do not, it waits."""
    # A shell that starts the tests in the background has SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        check_ctrl_c(llm, expected, monkeypatch, part, method, call)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def check_ctrl_c(llm: LLM, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, part: str, method: str, call: int) -> None:
    fail_at(monkeypatch, attrgetter(part)(llm.engine), method, call, press_ctrl_c, after=False)
    add_all(llm.engine)
    interrupted: list[int] = []
    step = llm.engine.step

    def counted() -> list[RequestOutput]:
        try:
            return step()
        except KeyboardInterrupt:
            interrupted.append(1)
            raise

    monkeypatch.setattr(llm.engine, "step", counted)
    assert run(llm.engine, (KeyboardInterrupt,)) == expected
    assert interrupted == [1]


HOST_PARTS = {
    ("scheduler", "_take_token"): ("scored", "two"),
    ("scheduler", "_take_candidates"): ("beams",),
    ("scheduler", "_why_it_ends"): ("scored", "two"),
    ("scheduler", "_append"): ("scored", "two", "beams"),
    ("scheduler", "_continue_beams"): ("beams",),
    ("_views", "observe"): ("scored", "two"),
    ("_views", "observe_prompt"): ("scored",),
    ("_views", "_entries"): ("scored",),
    ("_views", "_found"): ("beams",),
    ("_views", "output"): ("scored", "two"),
}
"""What is done on the host for one request, and for which of them."""


@pytest.mark.parametrize(
    ("part", "method", "victim"), [(*key, victim) for key, victims in HOST_PARTS.items() for victim in victims], ids=str
)
def test_what_fails_for_one_request_on_the_host_ends_that_request_alone(
    llm: LLM, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, part: str, method: str, victim: str
) -> None:
    """Where it takes its third token, or the log-probabilities of its prompt; with what it had by then."""
    owner: Any = attrgetter(part)(llm.engine)
    whole, calls, failed = getattr(owner, method), [0], list[str]()

    def fails_for_victim(*arguments: Any) -> Any:
        named = {one.request_id for one in arguments if isinstance(one, Request)} | {one for one in arguments if isinstance(one, str)}
        named |= {sequence.request_id for one in arguments if isinstance(one, list) for sequence in one if isinstance(sequence, Request)}
        calls[0] += victim in named or method in ("_entries", "_found")
        if calls[0] == (1 if method in ("observe_prompt", "_found") else 3) and not failed:
            failed.append(victim)
            raise RuntimeError("injected")
        return whole(*arguments)

    monkeypatch.setattr(owner, method, fails_for_victim)
    add_all(llm.engine)
    llm.engine.add_request("beams", BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True), "beams")
    found = run(llm.engine)
    monkeypatch.undo()
    assert failed
    llm.engine.add_request("beams", BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True), "beams")
    all_of_them = expected | run(llm.engine)
    ended = {name for name in all_of_them if found[name] != all_of_them[name]}
    assert ended == {victim}
    sequences, _ = found[ended.pop()]
    reasons = [reason for _, _, reason in sequences]
    assert "error" in reasons or not reasons, reasons


def test_a_recovery_that_fails_itself_loses_nothing(llm: LLM, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C comes while the pages are restored, or there is no memory for new ones."""
    fail_at(monkeypatch, llm.engine.runner, "fetch", 3, raise_error, after=False)
    fail_at(monkeypatch, llm.engine.runner, "restore_pages", 1, raise_error, after=False)
    add_all(llm.engine)
    assert run(llm.engine, (RuntimeError,)) == expected


def test_all_sequences_that_end_with_an_error_say_the_same(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, llm.engine._views, "observe", 4, raise_error, after=False)
    llm.engine.add_request(*REQUESTS["two"], "two")
    outputs: list[RequestOutput] = []
    while llm.engine.has_unfinished_requests:
        outputs = llm.engine.step()
    (output,) = outputs
    assert [one.stop_reason for one in output.outputs] == ["RuntimeError: injected (request 'two')"] * 2
    assert [one.finish_reason for one in output.outputs] == ["error"] * 2


def test_aborting_a_request_whose_output_fails_harms_nobody(llm: LLM, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    add_all(llm.engine)
    llm.engine.add_request("another", greedy(20), "another")
    for _ in range(4):
        llm.engine.step()
    with monkeypatch.context() as patched:
        patched.setattr(llm.engine._views, "output", lambda request_id: raise_error())
        output = llm.engine.abort_request("another")
    assert output is not None and output.finished
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("error", "RuntimeError: injected (request 'another')")
    assert run(llm.engine) == expected


def test_ctrl_c_while_a_request_is_aborted_leaves_nothing_of_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, before = llm.engine, signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        engine.add_request("hello", greedy(4), "a")
        engine.step()
        with monkeypatch.context() as patched:
            fail_at(patched, engine._views, "output", 1, press_ctrl_c, after=False)
            with pytest.raises(KeyboardInterrupt):
                engine.abort_request("a")
    finally:
        signal.signal(signal.SIGINT, before)
    assert "a" not in engine._views and not engine.has_unfinished_requests and engine.scheduler.pool.num_used == 0


def test_an_output_that_nobody_took_is_not_the_next_requests(llm: LLM) -> None:
    """It is ready when Ctrl-C or an update has ended the step, and its request is aborted then."""
    engine = llm.engine
    engine.add_request("hello", greedy(1), "a")
    with engine._recovery():
        engine._dispatch(engine._schedule())  # type: ignore[arg-type]
        while engine.scheduler.steps:  # an earlier test may have left one, whose requests have ended
            engine._end_oldest()
    output = engine.abort_request("a")
    assert output is not None and output.finished and len(output.outputs[0].token_ids) == 1
    assert engine.abort_request("a") is None and not engine.has_unfinished_requests


def test_a_step_that_is_not_scheduled_fails_for_those_that_it_was_for(
    llm: LLM, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for those of the step before."""
    engine = llm.engine
    engine.add_request("hello", greedy(1), "before")
    while engine.has_unfinished_requests:
        engine.step()
    add_all(engine)
    with monkeypatch.context() as patched:
        patched.setattr(engine.scheduler.kv, "find_cached", lambda request: raise_error())
        with pytest.raises(RuntimeError, match="injected"):
            engine.step()
    assert engine.scheduled_last == {"greedy"}, "the first that waits"
    engine.step()
    assert engine.scheduled_last == set(REQUESTS) - {"two"}, "there are four rows"
    with monkeypatch.context() as patched:
        patched.setattr(engine.scheduler.kv, "extend", lambda request, count: raise_error())
        with pytest.raises(RuntimeError, match="injected"):
            engine.step()
    assert engine.scheduled_last == set(REQUESTS), "all that run, and the first that waits"
    assert run(engine) == expected


def test_a_request_is_queued_whole_or_not_at_all(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails on the way takes no number, from which the next one's seed is made."""
    engine, sampled = llm.engine, SamplingParams(temperature=1, max_tokens=4, ignore_eos=True)
    numbers = iter([[7], [7]])
    monkeypatch.setattr(engine._intake, "_next_seed", lambda: next(numbers)[0])
    alone = ids(llm, "hello", sampled)
    with monkeypatch.context() as patched:
        patched.setattr("pjax.engine.views.Detokenizer", lambda *arguments: raise_error())
        with pytest.raises(RuntimeError, match="injected"):
            engine.add_request("hello", sampled, "half")
    engine.scheduler.check()
    assert not engine.has_unfinished_requests and "half" not in engine._views
    assert ids(llm, "hello", sampled) == alone


def test_what_is_ready_is_returned_without_a_step(llm: LLM, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A request whose timeout has passed does not wait for a device that fails."""
    engine = llm.engine
    add_all(engine)
    engine.add_request("late", greedy(4), "late", timeout=1e-9)
    with monkeypatch.context() as patched:
        patched.setattr(engine.runner, "fetch", lambda step: raise_error())
        num_steps = engine.num_steps
        (output,) = engine.step()
        assert (output.request_id, output.outputs[0].finish_reason, engine.num_steps) == ("late", "timeout", num_steps)
        with pytest.raises(RuntimeError, match="injected"):
            engine.step()
        assert engine.num_steps == num_steps
    assert run(engine) == expected and engine.num_steps > num_steps


def test_outputs_that_were_made_before_a_failure_come_with_the_next_step(
    llm: LLM, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the step was committed when its figures fail."""
    engine = llm.engine
    engine.add_request("hello", greedy(1), "a")
    with monkeypatch.context() as patched:
        patched.setattr(engine, "_count", lambda request: raise_error())
        with pytest.raises(RuntimeError, match="injected"):
            engine.step()
    (output,) = engine.step()
    assert (output.request_id, output.finished, output.outputs[0].token_ids) == ("a", True, expected["greedy"][0][0][1][:1])
    assert not engine.has_unfinished_requests


def test_a_callback_that_fails_is_the_callers_business(
    llm: LLM, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(llm.engine, "on_step", lambda stats: raise_error())
    add_all(llm.engine)
    assert run(llm.engine) == expected
    assert "on_step failed" in caplog.text


def test_an_update_whose_drain_fails_changes_nothing(llm: LLM, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The step under way is computed again, and the parameters are those of before."""
    engine = llm.engine
    add_all(engine)
    engine.step()
    assert engine.scheduler.steps, "a step is under way"
    before = engine.params
    with monkeypatch.context() as patched:
        patched.setattr(engine.runner, "fetch", lambda step: raise_error())
        with pytest.raises(RuntimeError, match="injected"):
            engine.update_params(before)
    engine.scheduler.check()
    assert run(engine) == expected


def test_an_id_that_is_used_again_while_its_step_is_under_way(llm: LLM) -> None:
    """The first one's prompt is longer, and its log-probabilities come with a step that ends after the second was added."""
    engine, (prompt, params) = llm.engine, REQUESTS["scored"]
    short = greedy(3, prompt_logprobs=1)
    engine.add_request("abc", short, "alone")
    alone = run(engine)["alone"]
    engine.add_request("hello", greedy(2), "first")
    engine.step()
    engine.add_request(prompt, params, "again")
    engine.step()
    assert any(request.request_id == "again" for plan in engine.scheduler.steps for request in plan.requests)
    engine.abort_request("again")
    assert "again" not in engine.scheduled_last
    engine.add_request("abc", short, "again")
    assert "again" not in engine.scheduled_last, "this one has not been scheduled yet"
    assert run(engine)["again"] == alone


def test_steps_that_were_not_timed_alone_have_no_time(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program was compiled, or the caller came back long after the step had ended."""
    engine, told = llm.engine, list[StepStats]()
    ids(llm, "hello", greedy(6))  # all is compiled
    monkeypatch.setattr(engine, "on_step", told.append)
    monkeypatch.setattr("pjax.engine.engine.LONG_PAUSE", 60.0)  # however busy the machine is
    ids(llm, "hello", greedy(6))
    assert len(told) == 6 and all(stats.seconds is not None and stats.seconds > 0 for stats in told)
    told.clear()
    engine.runner.programs._compiled.clear()
    ids(llm, "hello", greedy(6))
    assert [stats.seconds is None for stats in told[:2]] == [True, True] and told[-1].seconds is not None
    told.clear()
    for start in (1, 31):
        engine.add_request([*range(start, start + 30)], greedy(4))
    engine.step()
    cost = engine.scheduler.kv.swap.cost
    before = cost.seconds_per_token
    engine._dispatched[engine.scheduler.steps[0]].handle.wait()
    monkeypatch.setattr("pjax.engine.engine.LONG_PAUSE", LONG_PAUSE)
    time.sleep(3 * LONG_PAUSE)
    engine.step()
    assert told[-1].seconds is None and told[-1].num_prefill_tokens > 0
    assert cost.seconds_per_token == before
    run(engine)
