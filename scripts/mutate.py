"""Breaks one thing at a time in the parts that matter most, and tells which breakages their tests do not notice.

    python scripts/mutate.py                              # 100 mutants of all parts, an hour on two cores
    python scripts/mutate.py --seed 3 --count 20 --part scheduler --part swap
    python scripts/mutate.py --show 17                    # a mutant's change, without running it

A mutant is a copy of the checkout in which one comparison, condition, number or statement differs. It is killed when a test of its part
fails, hangs or cannot be collected. The seed says which mutants are drawn: the same seed and sources give the same ones. Exits with 1
when more than `--most` percent survive.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import contextlib
import difflib
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Part:
    """Sources that are broken, and the tests that have to notice, the quickest first."""

    sources: tuple[str, ...]
    tests: tuple[str, ...]


PARTS = {
    "scheduler": Part(
        ("scheduler/scheduler.py", "scheduler/queues.py", "scheduler/sequence_table.py", "scheduler/request.py"),
        ("tests/scheduler/test_scheduler.py", "tests/scheduler/test_priorities.py", "tests/scheduler"),
    ),
    "beams": Part(("scheduler/beam_search.py",), ("tests/scheduler", "tests/engine/test_beam_search.py")),
    "page pool": Part(("kv_cache/page_pool.py", "kv_cache/kv_manager.py"), ("tests/kv_cache/test_page_pool.py", "tests/scheduler")),
    "prefix keys": Part(
        ("kv_cache/prefix.py",), ("tests/scheduler/test_prefix_caching.py", "tests/scheduler", "tests/engine/test_sharing.py")
    ),
    "swap": Part(
        ("kv_cache/swap_space.py", "runner/page_copies.py"),
        ("tests/scheduler/test_swap.py", "tests/runner/test_page_copies.py", "tests/scheduler"),
    ),
    "engine": Part(
        ("engine/engine.py", "engine/views.py"),
        ("tests/engine/test_failures.py", "tests/engine/test_fault_machine.py", "tests/engine/test_deadlines.py", "tests/engine"),
    ),
    "sampler": Part(
        ("sampling/sampler.py", "sampling/filters.py", "sampling/parameters.py"),
        ("tests/sampling/test_sampler.py", "tests/runner/test_batch.py", "tests/engine/test_sampling.py"),
    ),
    "penalties": Part(
        ("sampling/adjust.py", "sampling/token_rules.py", "params/logit_rules.py"),
        ("tests/sampling/test_adjust.py", "tests/engine/test_sampling.py"),
    ),
    "detokenizer": Part(("text/detokenizer.py",), ("tests/text/test_detokenizer.py",)),
    "tool parser": Part(("server/tools.py",), ("tests/server/test_chat_completions.py",)),
    "server": Part(
        (
            "server/chat_completions.py",
            "server/completions.py",
            "server/prompts.py",
            "server/sampling.py",
            "server/errors.py",
            "server/bridge.py",
        ),
        ("tests/server",),
    ),
}

OTHERS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Add,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum", "maximum": "minimum"}
SILENT = {"log", "logger", "warnings"}
"""What is called on these says something, and changes nothing."""
CHECKS = {"strict"}
"""Arguments that only check what holds in any case."""

Change = Callable[[], None]


def changes_of(node: ast.AST) -> Iterator[Change]:
    """Yields the ways to break one node, in place; the same tree gives the same ones in the same order."""

    def put(field: str, value: object) -> Change:
        return lambda: setattr(node, field, value)

    match node:
        case ast.Compare(ops=[op]) if type(op) in OTHERS:
            yield put("ops", [OTHERS[type(op)]()])
        case ast.BinOp(left=left, op=op) | ast.AugAssign(target=left, op=op) if type(op) in OTHERS and not _is_text(left):
            yield put("op", OTHERS[type(op)]())
        case ast.BoolOp(op=op):
            yield put("op", OTHERS[type(op)]())
        case ast.If(test=test) | ast.IfExp(test=test):
            yield put("test", ast.UnaryOp(ast.Not(), test))
        case ast.comprehension(ifs=[_, *_]):
            yield put("ifs", [])
        case ast.Constant(value=bool(value)):
            yield put("value", not value)
        case ast.Constant(value=int(value)):
            yield put("value", value + 1)
        case ast.Return(value=value) if value is not None and not (isinstance(value, ast.Constant) and value.value is None):
            yield put("value", ast.Constant(None))
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in CALLS:
            yield lambda: setattr(node.func, "id" if isinstance(node.func, ast.Name) else "attr", CALLS[name])


def statement_changes(body: list[ast.stmt]) -> Iterator[Change]:
    """Yields the ways to leave a statement of a block out."""
    for index, statement in enumerate(body):
        match statement:
            case ast.Expr(value=ast.Call(func=func)) if not (_root(func) & SILENT):
                pass
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) | ast.AugAssign() | ast.Break() | ast.Continue():
                pass
            case _:
                continue
        yield lambda index=index: body.__setitem__(index, ast.Pass())


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _root(node: ast.AST) -> set[str]:
    while isinstance(node, ast.Attribute | ast.Call):
        node = node.value if isinstance(node, ast.Attribute) else node.func
    return {node.id} if isinstance(node, ast.Name) else set()


def code_in(tree: ast.Module) -> Iterator[ast.AST]:
    """All nodes inside of functions but types, decorators, and what errors and log lines say, in the order of the text."""

    def below(node: ast.AST) -> Iterator[ast.AST]:
        yield node
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list") or isinstance(node, ast.Raise):
                continue
            if isinstance(node, ast.keyword) and node.arg in CHECKS:
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not (isinstance(child, ast.Expr) and _says_something(child)):
                    yield from below(child)

    def functions(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.Module(child.body, [])  # the same list: a statement of it can be left out
                for statement in child.body:
                    if not (isinstance(statement, ast.Expr) and _says_something(statement)):
                        yield from below(statement)
            elif isinstance(child, ast.ClassDef | ast.If):
                yield from functions(child)

    return functions(tree)


def _says_something(node: ast.Expr) -> bool:
    return isinstance(node.value, ast.Constant) or bool(_root(node.value) & SILENT)


def changes_in(tree: ast.Module) -> list[tuple[int, Change]]:
    """Line and change of every way to break a module. Make one change, then parse the source anew."""
    found: list[tuple[int, Change]] = []
    for node in code_in(tree):
        line = getattr(node, "lineno", 0)
        found += [(line, change) for change in changes_of(node)]
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                found += [(line, change) for change in statement_changes(block)]
    return found


@dataclass
class Mutant:
    """One broken source, and what became of it."""

    number: int
    part: str
    source: str
    text: str
    """The whole file."""
    difference: str
    outcome: str = ""
    seconds: float = 0.0


def draw(seed: int, count: int, parts: list[str]) -> list[Mutant]:
    """As many of each part as of any other, or nearly; no change twice."""
    rng, made, seen = random.Random(seed), list[Mutant](), set[tuple[str, int]]()
    places = {
        part: [(source, index) for source in PARTS[part].sources for index in range(len(changes_in(parse(source))))] for part in parts
    }
    while len(made) < min(count, sum(map(len, places.values()))):
        part = parts[len(made) % len(parts)]
        left = [place for place in places[part] if place not in seen]
        if not left:
            parts = [other for other in parts if other != part]
            continue
        source, index = rng.choice(left)
        seen.add((source, index))
        tree = parse(source)
        before = ast.unparse(tree)
        changes_in(tree)[index][1]()
        after = ast.unparse(ast.fix_missing_locations(tree))
        lines = difflib.unified_diff(before.splitlines(), after.splitlines(), f"pjax/{source}", lineterm="", n=2)
        if before != after:
            made.append(Mutant(len(made), part, source, after + "\n", "\n".join(list(lines)[2:])))
    return made


def parse(source: str) -> ast.Module:
    """A file of the package."""
    return ast.parse((ROOT / "pjax" / source).read_text(encoding="utf-8"))


class Copies:
    """Copies of the checkout, in each of which one mutant at a time is tried."""

    def __init__(self, folder: Path, tests: Path, tests_of: dict[str, list[str]], count: int) -> None:
        self._folder, self._tests, self._tests_of = folder, tests, tests_of
        self._free: queue.SimpleQueue[Path] = queue.SimpleQueue()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._is_closed = False
        self.limits: dict[str, float] = {}
        for number in range(count):
            self._free.put(self._make(folder / str(number)))
        kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pjax-tests"
        self._cache = folder / "pjax-tests"  # mutants compile steps of their own, which are not to be kept
        if kept.exists():
            shutil.copytree(kept, self._cache)

    def _make(self, copy: Path) -> Path:
        ignored = shutil.ignore_patterns("__pycache__", ".*cache*", "build")
        for name in ("pjax", "scripts", "benchmarks", "examples", "docs", "deploy", "docker"):
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        shutil.copytree(self._tests, copy / "tests", ignore=ignored)
        for name in ("pyproject.toml", "README.md", "LICENSE", "Makefile", "setup.py"):
            shutil.copyfile(ROOT / name, copy / name)
        for name in ("models", "pallas_kernels"):
            (copy / name).symlink_to(f"pjax/{name}")
        return copy

    def test(self, part: str, source: str = "", text: str = "") -> tuple[str, float]:
        """What became of a part's tests with that source replaced, and the seconds that it took."""
        copy = self._free.get()
        target = copy / "pjax" / source
        before = target.read_text(encoding="utf-8") if source else ""
        if source:
            target.write_text(text, encoding="utf-8")
        environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "XDG_CACHE_HOME": str(self._cache)}
        options = "-x -q -p no:cacheprovider -p no:xdist -o addopts=--import-mode=importlib".split()
        command = [sys.executable, "-m", "pytest", *options, "-m", "not extended", *self._tests_of[part]]
        started, limit = time.monotonic(), self.limits.get(part, 1800)
        with (copy / "printed.txt").open("w+b") as file:
            process = subprocess.Popen(command, cwd=copy, env=environment, stdout=file, stderr=file, start_new_session=True)
            self._running.add(process)
            try:
                if self._is_closed:
                    raise KeyboardInterrupt
                status = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:  # servers that a failing test has left, too
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self._running.discard(process)
            file.seek(0)
            printed = file.read().decode(errors="replace")
        if source:
            target.write_text(before, encoding="utf-8")
        shutil.rmtree(copy / ".hypothesis", ignore_errors=True)  # examples that failed for one mutant say nothing of the next
        self._free.put(copy)
        failed = [line for line in printed.splitlines() if line.startswith(("FAILED", "ERROR"))]
        if status in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
            raise RuntimeError(f"pytest could not run the tests of {part}: {printed[-2000:]}")
        why = f"over {limit:.0f} s" if status is None else failed[0] if failed else printed.strip()[-200:]
        return ("survived" if status == 0 else f"killed: {why}"), time.monotonic() - started

    def close(self) -> None:
        """Ends what runs."""
        self._is_closed = True
        for process in list(self._running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def main() -> int:
    """Draws, tests and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100, help="mutants (100)")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="a part to break; may be repeated (all)")
    parser.add_argument("--number", action="append", type=int, help="try only this mutant of those drawn; may be repeated")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (2)")
    parser.add_argument("--tests", type=Path, default=ROOT / "tests", help="another folder of tests, of an earlier commit say")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--most", type=float, default=5, help="percent that may survive (5)")
    parser.add_argument("--show", type=int, help="print this mutant's change and stop")
    args = parser.parse_args()
    mutants = draw(args.seed, args.count, args.part or list(PARTS))
    if args.show is not None:
        print(f"{mutants[args.show].part}\n{mutants[args.show].difference}")
        return 0
    if args.number:
        mutants = [mutant for mutant in mutants if mutant.number in args.number]
    tests_of = {part: [name for name in PARTS[part].tests if (args.tests.parent / name).exists()] for part in PARTS}
    if missing := [part for part in {mutant.part for mutant in mutants} if not tests_of[part]]:
        parser.error(f"{args.tests} has no tests of {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        copies = Copies(Path(folder), args.tests.resolve(), tests_of, args.jobs)

        def run(mutant: Mutant) -> Mutant:
            mutant.outcome, mutant.seconds = copies.test(mutant.part, mutant.source, mutant.text)
            return mutant

        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(mutants), desc="Mutants") as bar:
            whole = {part: pool.submit(copies.test, part) for part in sorted({mutant.part for mutant in mutants})}
            for part, future in tqdm(whole.items(), desc="Tests as they are", leave=False):
                outcome, seconds = future.result()
                if outcome != "survived":
                    pool.shutdown(cancel_futures=True)
                    print(f"the tests of {part} fail without any change: {outcome}", file=sys.stderr)
                    return 2
                copies.limits[part] = 120 + 5 * seconds
            try:
                for future in concurrent.futures.as_completed([pool.submit(run, mutant) for mutant in mutants]):
                    bar.update()
                    mutant = future.result()
                    if mutant.outcome == "survived":
                        bar.write(f"mutant {mutant.number} survived ({mutant.part}):\n{mutant.difference}\n")
            except BaseException:  # Ctrl-C: what runs is ended, and no more begins
                pool.shutdown(wait=False, cancel_futures=True)
                copies.close()
                raise
    survived = [mutant for mutant in mutants if mutant.outcome == "survived"]
    if args.out:
        args.out.write_text(json.dumps([{k: v for k, v in vars(mutant).items() if k != "text"} for mutant in mutants], indent=1))
    share = 100 * len(survived) / max(len(mutants), 1)
    print(f"{len(mutants) - len(survived)} of {len(mutants)} mutants killed; survivors: {[mutant.number for mutant in survived]}")
    return int(share > args.most)


if __name__ == "__main__":
    sys.exit(main())
