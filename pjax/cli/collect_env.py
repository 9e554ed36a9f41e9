"""Prints what a bug report needs: versions, devices, memory, processor, and the settings of the environment. Nothing secret."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

from pjax import __version__
from pjax.cli.flags import Parser
from pjax.machine import num_cpus

PACKAGES = (
    "jax jaxlib jax-cuda12-plugin jax-cuda13-plugin libtpu flax numpy ml_dtypes orbax-checkpoint safetensors gguf tokenizers transformers "
    "huggingface_hub torch fastapi starlette uvicorn pydantic sse-starlette prometheus-client"
).split()
VARIABLES = re.compile(
    r"(JAX|XLA|PJAX|LIBTPU|TPU|CUDA|NVIDIA|NCCL|TF_CPP|OMP|MKL|OPENBLAS|HF_HUB|TOKENIZERS)_\w+|HF_HOME|XDG_CACHE_HOME|LD_LIBRARY_PATH"
)
SECRET = re.compile(r"KEY|TOKEN(?!IZERS)|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
CPU_FLAGS = "avx avx2 fma f16c avx512f avx512_bf16 avx512_fp16 avx512_vnni amx_bf16 amx_int8 asimd bf16 sve".split()


def add_arguments(parser: Parser) -> None:
    """How it is printed."""
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints everything."""
    found = collect()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    for title, entries in found.items():
        print(f"{title}:")
        for name, value in entries.items():
            print(f"  {name:<22} {value}")
    return 0


def collect() -> dict[str, dict[str, Any]]:
    """All that is printed, by section."""
    return {
        "system": {
            "platform": platform.platform(),
            "python": sys.version.split()[0],
            **_processor(),
            **_memory(),
        },
        "packages": {"pjax": __version__} | _versions(),
        "devices": _devices(),
        "environment": _environment(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> dict[str, Any]:
    found: dict[str, Any] = {"processor": platform.processor() or platform.machine(), "usable cores": num_cpus()}
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return found
    if name := re.search(r"^model name\s*: (.*)$", text, re.MULTILINE):
        found["processor"] = name[1]
    if flags := re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE):
        found["extensions"] = " ".join(flag for flag in CPU_FLAGS if flag in flags[1].split())
    return found


def _memory() -> dict[str, str]:
    import psutil

    now = psutil.virtual_memory()
    return {"memory": f"{now.total / 2**30:.1f} GiB, {now.available / 2**30:.1f} GiB available"}


def _devices() -> dict[str, str]:
    """Device by device. A backend that does not start is what the report is about, so its error is told."""
    try:
        import jax

        devices = jax.devices()
        limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    memory = [f", {limit / 2**30:.1f} GiB" if limit else "" for limit in limits]
    found = {f"{device.platform}:{device.id}": f"{device.device_kind}{more}" for device, more in zip(devices, memory, strict=True)}
    return found | {"backend": jax.default_backend(), "native kernel": _native_kernel()}


def _native_kernel() -> str:
    from pjax import native

    try:
        level = native.cpu_level()
    except ValueError as error:  # PJAX_CPU_LEVEL
        return str(error)
    return f"built, {level} in use" if level is not None else "none, so CPUs are slower: it " + native.MISSING


def _environment() -> dict[str, str]:
    named = {name: value for name, value in sorted(os.environ.items()) if VARIABLES.fullmatch(name)}
    return {name: "(set, not shown)" if SECRET.search(name) else re.sub(r"//[^/@\s]+@", "//…@", value) for name, value in named.items()}
