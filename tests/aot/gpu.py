"""Compiles functions for NVIDIA GPUs that are not there, and says what the compiler made of them.

An LLVM error aborts the process, so compilations run in a process of their own: one for each call of
`compile_in_process`, and a fresh one for the rest after a crash. This file is that process too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# From JAX 0.12 on XLA dumps no PTX of Triton's kernels: what they spill is checked with the version of constraints.txt.
SEES_TRITON = tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) < (0, 12)


@dataclass(frozen=True, kw_only=True)
class Target:
    """Facts of one GPU from its data sheet and the CUDA programming guide; sizes in bytes."""

    name: str
    major: int  # compute capability
    minor: int
    ptxas_arch: str
    cores: int  # streaming multiprocessors
    shared_memory: int  # of one core
    l2_cache: int
    memory: int
    bandwidth: int  # bytes a second
    clock_ghz: float

    def text(self) -> str:
        """XLA's GpuTargetConfig, as a text proto."""
        extension = "feature_extension: ACCELERATED_FEATURES" if self.major >= 9 else ""
        return f"""gpu_device_info {{
            threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {1536 if self.minor == 9 else 2048}
            shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_memory}
            shared_memory_per_block_optin: {self.shared_memory - 1024} core_count: {self.cores}
            fpus_per_core: {64 if (self.major, self.minor) == (8, 0) else 128}
            registers_per_core_limit: 65536 registers_per_block_limit: 65536
            block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
            memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2_cache} device_memory_size: {self.memory}
            clock_rate_ghz: {self.clock_ghz} name: "{self.name}"
            cuda_compute_capability {{ major: {self.major} minor: {self.minor} {extension} }}
            driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        device_description_str: "{self.name}"
        """


TARGETS = {
    "a100": Target(
        name="NVIDIA A100-SXM4-80GB", major=8, minor=0, ptxas_arch="sm_80", cores=108, shared_memory=164 << 10,
        l2_cache=40 << 20, memory=80 << 30, bandwidth=2_039_000_000_000, clock_ghz=1.41,
    ),
    "l40s": Target(
        name="NVIDIA L40S", major=8, minor=9, ptxas_arch="sm_89", cores=142, shared_memory=100 << 10,
        l2_cache=96 << 20, memory=48 << 30, bandwidth=864_000_000_000, clock_ghz=2.52,
    ),
    "h100": Target(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, ptxas_arch="sm_90a", cores=132, shared_memory=228 << 10,
        l2_cache=50 << 20, memory=80 << 30, bandwidth=3_352_000_000_000, clock_ghz=1.98,
    ),
    "b200": Target(
        name="NVIDIA B200", major=10, minor=0, ptxas_arch="sm_100a", cores=148, shared_memory=228 << 10,
        l2_cache=126 << 20, memory=180 << 30, bandwidth=7_672_000_000_000, clock_ghz=1.965,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One thing to compile.

    `build` is "module:function"; the function takes the target's devices (8 of them) and `arguments` (what JSON can
    hold), and returns (a jitted function, its arguments as sharded ShapeDtypeStructs).
    """

    name: str
    build: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What became of a job; bytes are those of one device."""

    name: str
    seconds: float = 0.0  # to trace, lower and compile
    argument_bytes: int = 0
    output_bytes: int = 0
    temp_bytes: int = 0
    alias_bytes: int = 0
    # Bytes that ptxas spills (stores + loads), by kernel: all of XLA's kernels and those of Pallas.
    spills: dict[str, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)
    collectives: list[list[Any]] = field(default_factory=list)  # [kind, shape] of each
    error: str = ""

    def __str__(self) -> str:
        if self.error:
            return f"{self.name:48} {self.error}"
        sizes = f"{self.argument_bytes / 2**20:7.1f} MiB in {self.temp_bytes / 2**20:7.2f} MiB temp"
        kernels = " ".join(f"{k}:{n}r/{self.spills[k]}s" for k, n in self.registers.items() if k.startswith("paged"))
        return f"{self.name:48} {self.seconds:5.2f} s {sizes} spills {sum(self.spills.values()):4} {kernels}"


def compile_in_process(target: str, jobs: Sequence[Job], *, timeout: float = 480) -> dict[str, Compiled]:
    """Each job's outcome by its name. A job that kills the compiler gets an error; those after it still run.

    Raises:
      subprocess.TimeoutExpired: one process took longer than `timeout` seconds.
    """
    outcomes: dict[str, Compiled] = {}
    left = list(jobs)
    while left:
        with tempfile.TemporaryDirectory() as folder:
            done, crash = _run(target, left, Path(folder), timeout)
        for outcome in done:
            outcomes[outcome.name] = outcome
        left = left[len(done) :]
        if left:
            outcomes[left[0].name] = Compiled(name=left[0].name, error=f"the compiler's process ended: {crash}")
            left = left[1:]
    return outcomes


def _run(target: str, jobs: Sequence[Job], folder: Path, timeout: float) -> tuple[list[Compiled], str]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_hlo_as_text=false --xla_dump_max_hlo_modules=0",
    }
    request = {"target": target, "folder": str(folder), "jobs": [dataclasses.asdict(job) for job in jobs]}
    with (folder / "errors").open("w") as errors:
        process = subprocess.run(
            [sys.executable, "-m", "tests.aot.gpu"],
            input=json.dumps(request), stdout=subprocess.PIPE, stderr=errors, text=True, timeout=timeout, cwd=ROOT, env=environment,
        )  # fmt: skip
    done = [Compiled(**json.loads(line)) for line in process.stdout.splitlines()]
    tail = (folder / "errors").read_text(errors="replace").strip()[-800:]
    return done, f"exit status {process.returncode}: {tail}"


# ---- in the process


def _main() -> None:
    request = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w")  # descriptor 1 itself is the compilers': Mosaic GPU prints to it
    folder = Path(request["folder"])
    for job in request["jobs"]:
        with _output_to(folder / "printed"):
            outcome = _compile(TARGETS[request["target"]], Job(**job), folder)
        print(json.dumps(dataclasses.asdict(outcome)), file=out, flush=True)


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(file, 1)
    os.close(file)
    yield


@functools.cache
def _devices(target: str) -> tuple[Any, ...]:
    from jax.experimental import topologies

    return tuple(topologies.get_topology_desc(platform="cuda", target_config=TARGETS[target].text(), topology="1x1x8").devices)


def _compile(target: Target, job: Job, folder: Path) -> Compiled:
    import jax

    for path in folder.glob("*.ptx"):
        path.unlink()
    name = next(key for key, value in TARGETS.items() if value == target)
    module, function = job.build.split(":")
    begin = time.perf_counter()
    try:
        build: Callable[..., Any] = getattr(importlib.import_module(module), function)
        call, arguments = build(_devices(name), **job.arguments)
        mesh = jax.tree.leaves(arguments)[0].sharding.mesh
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            compiled = call.lower(*arguments).compile()
    except Exception as error:
        return Compiled(name=job.name, error=f"{type(error).__name__}: {str(error).strip()[:800]}")
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    printed = (folder / "printed").read_text(errors="replace")
    for path in folder.glob("*.ptx"):
        if path.stat().st_size:
            printed += _ptxas(target, path)
    usage = parse_ptxas(printed)
    from tests.collectives import collectives

    return Compiled(
        name=job.name,
        seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        spills={kernel: spilled for kernel, (spilled, _) in usage.items()},
        registers={kernel: registers for kernel, (_, registers) in usage.items()},
        collectives=[[kind, list(shape)] for kind, shape in collectives(compiled.as_text())],
    )


def parse_ptxas(text: str) -> dict[str, tuple[int, int]]:
    """(bytes spilled, registers) by kernel in what `ptxas -v` prints."""
    usage: dict[str, tuple[int, int]] = {}
    kernel, spilled = "", 0
    for line in text.splitlines():
        if match := re.search(r"(?:entry function|Function properties for) '?(\w+)", line):
            kernel = match[1]
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = int(match[1]) + int(match[2])
        elif match := re.search(r"Used (\d+) registers", line):
            before = usage.get(kernel, (0, 0))  # two kernels may have one name
            usage[kernel] = max(before[0], spilled), max(before[1], int(match[1]))
    return usage


def _ptxas(target: Target, path: Path) -> str:
    import nvidia

    found = next(place for root in nvidia.__path__ for place in Path(root).glob("*/bin/ptxas"))
    command = [str(found), "-v", f"-arch={target.ptxas_arch}", str(path), "-o", os.devnull]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


if __name__ == "__main__":
    _main()
