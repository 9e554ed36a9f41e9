"""pjax beside vLLM, llama.cpp, CTranslate2 and transformers: the same token ids, weights, dtype and threads, in turns.

    make bench-peers                                # sets up the environments, then runs this
    python -m benchmarks.peers.run --folder .peers --rounds 5

Each engine is a process; all but the one that is measured are stopped by a signal. A run in which other programs took more than
--quiet cores is thrown away and done again; where they go on, it ends with a report of what was measured until then. Greedy tokens
are compared with transformers', which runs once: it takes as long as all the others. Each round has other token ids, so that no
engine finds a prompt in its cache of an earlier round. pjax alone has longer workloads too.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.peers.report import START, new_page, write_report
from benchmarks.throughput import many

HERE = Path(__file__).parent
Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """A column of the table."""

    name: str
    prompts: list[list[int]]
    num_out: list[int]
    engines: tuple[str, ...]
    n: int = 1
    beam: int = 0

    @property
    def asked(self) -> str:
        """For a worker."""
        return json.dumps({"prompts": self.prompts, "num_out": self.num_out, "n": self.n, "beam": self.beam})

    @property
    def num_tokens(self) -> int:
        """To be made."""
        return sum(self.num_out) * self.n

    def in_round(self, number: int, vocab: int) -> Work:
        """The same with other ids; prompts share what they shared."""
        return replace(self, prompts=[[(token + 7919 * number) % vocab for token in prompt] for prompt in self.prompts])


def works(vocab: int) -> list[Work]:
    """The workloads; the engines that have what each needs."""
    rng = np.random.default_rng(0)
    batch = many(32, vocab)
    prefix = rng.integers(0, vocab, 384).tolist()
    sharing = [prefix + rng.integers(0, vocab, 16).tolist() for _ in range(16)]

    def one(length: int) -> list[list[int]]:
        return [rng.integers(0, vocab, length).tolist()]

    every = ("pjax", "vllm", "llama_cpp", "ctranslate2", "transformers")
    return [
        Work("one stream, 128 + 128", one(128), [128], every),
        Work("32 requests", batch.prompts, batch.num_out, ("pjax", "vllm", "transformers")),
        Work("16 of a 384-token prefix", sharing, [64] * 16, ("pjax", "vllm", "ctranslate2", "transformers")),
        Work("n = 8, 256 + 64", one(256), [64], ("pjax", "vllm", "ctranslate2", "transformers"), n=8),
        Work("beam 4, 128 + 64", one(128), [64], ("pjax", "vllm", "ctranslate2", "transformers"), beam=4),
    ]


def long_works(vocab: int) -> list[Work]:
    """What pjax has for itself."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, vocab, 4096).tolist() for _ in range(4)]
    batch = many(256, vocab)
    return [
        Work("4 prompts of 4,096 + 64", prompts, [64] * 4, ("pjax",)),
        Work("256 requests", batch.prompts, batch.num_out, ("pjax",)),
    ]


def chosen(some: list[Work], args: argparse.Namespace) -> list[Work]:
    """Those whose names begin as they were asked for."""
    return [work for work in some if work.name.startswith(tuple(args.works))]


LAZY = {"PEERS_LAZY": "1"}
TRIES, TRIED_SECONDS = 20, 600.0  # of a run that other programs disturb
PATIENCE = 60  # seconds that they get to end
LONG_SIZES = {"PEERS_MAX_SEQS": "256", "PEERS_MAX_LEN": "8192"}


@dataclass
class Engine:
    """A worker; stopped but for its own turns."""

    name: str
    process: subprocess.Popen[str]
    starts: list[float] = field(default_factory=list)

    def signal(self, number: int) -> None:
        """To it and its children."""
        os.killpg(self.process.pid, number)

    def ask(self, text: str) -> Row:
        """What it answers."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} has ended; its last words are in the log")
        answer: Row = json.loads(line)
        return answer

    def cpu_seconds(self) -> float:
        """Processor seconds of the process and its children."""
        total = 0.0
        for process in [(root := psutil.Process(self.process.pid)), *root.children(recursive=True)]:
            times = process.cpu_times()
            total += times.user + times.system
        return total


def command_of(name: str, folder: Path, dtype: str) -> tuple[list[str], dict[str, str]]:
    """The worker's command line and environment."""
    threads = len(os.sched_getaffinity(0))
    environment = {"ctranslate2": "transformers"}.get(name, name)
    python = sys.executable if name == "pjax" else str(folder / environment / "bin" / "python")
    model = {"llama_cpp": f"{dtype}.gguf", "ctranslate2": "ct2"}.get(name, dtype)
    env = os.environ | {"PEERS_THREADS": str(threads), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # a source tree keeps what was compiled too, as installed packages do
    if name == "pjax":
        env["PYTHONPATH"] = str(HERE.parents[1])
    if name == "vllm":
        env |= {"VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        preloaded = [*folder.glob("vllm/lib/libiomp5.so"), *Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")]
        env["LD_PRELOAD"] = ":".join(map(str, preloaded))
    return [python, str(HERE / "worker.py"), name, str(folder / model), dtype], env


def start(name: str, folder: Path, dtype: str, settings: dict[str, str] | None = None) -> Engine:
    """A worker that is ready, and what its process took from its start to one token."""
    command, env = command_of(name, folder, dtype)
    env |= settings or {}
    started = time.perf_counter()
    with (folder / f"{name}-{dtype}.log").open("w") as log:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
    assert process.stdout is not None
    engine = Engine(name, process)
    if not process.stdout.readline():
        raise RuntimeError(f"{name} did not start: {folder / f'{name}-{dtype}.log'}")
    engine.ask(json.dumps({"prompts": [[1, 2, 3, 4]], "num_out": [1]}))
    engine.starts.append(time.perf_counter() - started)
    return engine


def machine_seconds() -> float:
    """CPU time that anybody took, or that was taken from this machine."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


def measure(engine: Engine, work: Work) -> tuple[Row, float]:
    """An answer, and how many cores others took meanwhile."""
    engine.signal(signal.SIGCONT)
    before, own, started = machine_seconds(), engine.cpu_seconds(), time.perf_counter()
    answer = engine.ask(work.asked)
    taken = machine_seconds() - before - (engine.cpu_seconds() - own)
    seconds = time.perf_counter() - started
    engine.signal(signal.SIGSTOP)
    return answer, taken / seconds


def wait_until_quiet(quiet: float) -> None:
    """Until other programs take so many cores at most; all engines are stopped. Raises RuntimeError after a while."""
    others = 0.0
    for _ in range(PATIENCE):
        before, started = machine_seconds(), time.perf_counter()
        time.sleep(1)
        others = (machine_seconds() - before) / (time.perf_counter() - started)
        if others <= quiet:
            return
    raise RuntimeError(f"other programs take {others:.2f} cores, more than --quiet {quiet}: nothing can be measured here")


def undisturbed(engine: Engine, work: Work, vocab: int, quiet: float, row: Row) -> Row:
    """The answer of a run with new prompts. Counts row's "runs" and those "thrown" away, and keeps the "tokens" of the first, which are
    right in any case."""
    began = time.perf_counter()
    for number in range(TRIES):
        if number and time.perf_counter() - began > TRIED_SECONDS:
            break
        wait_until_quiet(quiet)
        row["runs"] += 1
        answer, others = measure(engine, work.in_round(row["runs"], vocab))
        row.setdefault("tokens", answer["tokens"])
        if others <= quiet:
            return answer
        row["thrown"] += 1
    raise RuntimeError(f"other programs took more than --quiet {quiet} cores in {row['thrown']} runs; nothing can be measured here")


def compare(engines: dict[str, Engine], work: Work, vocab: int, rounds: int, quiet: float) -> dict[str, Row]:
    """Speeds of each engine, in turns, and how far its greedy tokens of the first round are transformers'."""
    found: dict[str, Row] = {name: {"speeds": [], "runs": 0, "thrown": 0} for name in work.engines if name in engines}
    for name in found:
        if name != "transformers":
            measure(engines[name], work)  # compiles
    for done in range(rounds):
        for name, row in found.items():
            if name == "transformers" and done:
                continue
            answer = undisturbed(engines[name], work, vocab, quiet, row)
            row["speeds"].append(work.num_tokens / answer["seconds"])
            print(f"{work.name:<26}{name:<14}{row['speeds'][-1]:8.1f} tokens/s", file=sys.stderr, flush=True)
    reference = found.get("transformers", {}).get("tokens")
    for row in found.values():
        row["median"] = statistics.median(row["speeds"])
        tokens = row.pop("tokens")
        if reference is not None and work.n == 1:
            row["same"] = f"{sum(a == b for a, b in zip(tokens, reference, strict=True))} of {len(reference)}"
    return found


def start_all(names: list[str], folder: Path, dtype: str, times: int) -> dict[str, Engine]:
    """A worker of each, stopped; started so many times before."""
    engines: dict[str, Engine] = {}
    try:
        for name in names:
            starts: list[float] = []
            for _ in range(times):
                if name in engines:
                    engines.pop(name).signal(signal.SIGKILL)
                engines[name] = start(name, folder, dtype, LAZY)
                starts += engines[name].starts
            if name == "pjax":  # the others have no lazy start
                engines.pop(name).signal(signal.SIGKILL)
                engines[name] = start(name, folder, dtype)
            engines[name].starts = starts
            engines[name].signal(signal.SIGSTOP)
    except BaseException:
        end_all(engines)
        raise
    return engines


def end_all(engines: dict[str, Engine]) -> None:
    """Workers that are stopped would stay for ever."""
    for engine in engines.values():
        engine.signal(signal.SIGKILL)


def figures_of(dtype: str, vocab: int, args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Row]]]:
    """Each workload's name and figures, as they come."""
    names = [name for name in args.engines if dtype == "float32" or name != "ctranslate2"]  # its weights are float32
    engines = start_all(names, args.folder, dtype, args.starts)
    try:
        yield START, {name: {"speeds": one.starts, "median": statistics.median(one.starts)} for name, one in engines.items()}
        for work in chosen(works(vocab), args):
            yield work.name, compare(engines, work, vocab, args.rounds, args.quiet)
    finally:
        end_all(engines)
    if "pjax" in args.engines and chosen(long_works(vocab), args) and not args.short:
        alone = {"pjax": start("pjax", args.folder, dtype, LONG_SIZES)}
        try:
            for work in chosen(long_works(vocab), args):
                yield work.name, compare(alone, work, vocab, 1, args.quiet)
        finally:
            end_all(alone)


def main() -> None:
    """Runs all and writes a report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="what setup.sh made")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=3, help="times that each engine is started (default: 3)")
    parser.add_argument("--quiet", type=float, default=0.1, help="cores that other programs may take (default: 0.1)")
    parser.add_argument("--engines", nargs="+", default=["pjax", "vllm", "llama_cpp", "ctranslate2", "transformers"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--works", nargs="+", default=[""], help='only columns whose names begin so, as "one stream"')
    parser.add_argument("--short", action="store_true", help="without the workloads that pjax has for itself")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results", help="folder of the report (default: %(default)s)")
    args = parser.parse_args()
    vocab = json.loads((args.folder / "float32" / "config.json").read_text())["vocab_size"]
    names = [work.name for work in [*works(vocab), *long_works(vocab)]]
    if unknown := [begin for begin in args.works if not any(name.startswith(begin) for name in names)]:
        parser.error(f"no column begins with {unknown[0]!r}; there are: {', '.join(names)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # so that workers are ended too
    page, command = new_page(args.out), shlex.join(sys.argv[1:])
    figures: dict[str, dict[str, dict[str, Row]]] = {}
    for dtype in args.dtypes:
        for name, row in figures_of(dtype, vocab, args):
            figures.setdefault(dtype, {})[name] = row
            write_report(figures, args.folder, page, command, is_whole=False)  # whatever ends it, this is kept
    print(write_report(figures, args.folder, page, command))


if __name__ == "__main__":
    main()
