"""Compiled programs on disk, whole: a process that finds them needs neither to trace nor to lower nor to compile.

JAX's compilation cache keeps what the compiler made, by the program that it was made from; that program has to be made first, which
takes Python longer than anything else at start-up (docs/decisions/0014-start-up.md). Here the key is what the program follows from.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import pickle
import platform
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib.version
from jax.experimental import serialize_executable

from pjax import native
from pjax.config import EngineConfig
from pjax.models import ModelSource

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 30  # of all files; those used longest ago go
DIGEST_BYTES = 32
SAVES_PER_LOOK = 16  # the folder is looked through after so many new files
STEP_PARTS = (
    "checkpoints",
    "config.py",
    "kv_cache",
    "layers",
    "machine.py",
    "models",
    "native",
    "pallas_kernels",
    "params",
    "runner",
    "sampling",
)
"""The parts of pjax whose code is traced, or decides what is: what a step imports beside them knows nothing of JAX."""


def can_keep(model: ModelSource, config: EngineConfig, platform: str) -> bool:
    """Whether a step follows from what `Executables` knows: on one CPU device (others were not tried), and from pjax's code alone."""
    types = [getattr(node, "type", None) for node in model.graph.nodes]  # of modules and variables; arrays have none
    own_code = not config.logits_processors and all(one is None or one.__module__.partition(".")[0] in ("pjax", "flax") for one in types)
    return platform == "cpu" and model.shares is None and own_code


class Executables:
    """Compiled programs, each in a file whose name has the hash of all that it follows from: `facts`, pjax's code, the machine.

    Code counts by its content, wherever it lies and whenever it was written. All files together take MAX_BYTES at most. A file begins
    with the SHA-256 of its content, and one that is damaged is compiled again. A folder that is read only is used as it is. Files are
    pickles, as JAX's own loader takes them: their folder must be as trusted as JAX's cache, which holds machine code too.
    """

    def __init__(self, folder: Path | None, *facts: object) -> None:
        self._folder = folder
        self._facts = "\n".join(map(repr, (*facts, *_environment()))) if folder is not None else ""
        self._num_saved = 0

    def get(self, name: str, compile_it: Callable[[], Any]) -> Any:
        """The compiled program of that name: from its file, or compiled and saved."""
        if self._folder is None or getattr(jax.config, "jax_compilation_cache_dir", None):  # its results can't be saved again
            return compile_it()
        native.library()  # whose kernels steps call: they load only where these are registered
        path = self._folder / f"{name}-{hashlib.sha256(self._facts.encode()).hexdigest()[:32]}"
        loaded = _load(path)
        if loaded is None:
            loaded = compile_it()
            self._save(path, loaded)
        return loaded

    def _save(self, path: Path, compiled: Any) -> None:
        part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = pickle.dumps(serialize_executable.serialize(compiled))
            part.write_bytes(hashlib.sha256(content).digest() + content)
            part.replace(path)
            if self._num_saved % SAVES_PER_LOOK == 0:
                _drop_oldest(path.parent)
            self._num_saved += 1
        except Exception as error:  # a full disk or a folder that is read only, say: the step itself is there
            log.debug("%s: %s", path, error)
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def _load(path: Path) -> Any:
    """The step in a file; None when there is no such file, or something is wrong with it: it can be compiled again."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):  # the latter where there is no home
        return None
    except OSError as error:
        log.warning("a compiled program cannot be read, and is compiled again: %s: %s", path, error)
        return None
    digest, content = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:  # machine code that is damaged may do anything
        log.warning("a compiled program is damaged, and is compiled again: the content of %s does not have its SHA-256", path)
        return None
    try:
        payload, in_tree, out_tree = pickle.loads(content)
        devices = jax.local_devices()[:1]  # of several CPU devices, which a flag of XLA makes, a kept program has one
        loaded = serialize_executable.deserialize_and_load(payload, in_tree, out_tree, execution_devices=devices)
    except Exception as error:
        log.warning("a compiled program does not load, and is compiled again: %s: %s", path, error)
        return None
    with contextlib.suppress(OSError):  # of a folder that is read only
        os.utime(path)
    return loaded


def _drop_oldest(folder: Path) -> None:
    """Leaves files of MAX_BYTES together, those used last."""
    found = []
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process drops files too
            found.append((file.stat().st_mtime, file.stat().st_size, file))
    left = MAX_BYTES
    for _, size, file in sorted(found, reverse=True):
        left -= size
        if left < 0:
            file.unlink(missing_ok=True)


@functools.cache
def _code_digest() -> str:
    """The hash of what is in the files of `STEP_PARTS`, tuned sizes too."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    parts = [root / part for part in STEP_PARTS]
    files = [file for part in parts for file in ([part] if part.is_file() else part.rglob("*")) if file.suffix in (".py", ".json")]
    for file in sorted(files):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _environment() -> tuple[object, ...]:
    """What every compiled program follows from beside the model and the engine's sizes."""
    cpu = Path("/proc/cpuinfo")
    flags = next((line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features"))), "") if cpu.exists() else ""
    settings = sorted((name, value) for name, value in jax.config.values.items() if "cache" not in name and "traceback" not in name)
    variables = [os.environ.get(name) for name in ("XLA_FLAGS", "PJAX_ATTENTION_BACKEND", "PJAX_DEBUG")]
    versions = (jax.__version__, jaxlib.version.__version__, flax.__version__, platform.python_version(), platform.machine())
    return versions, flags, len(jax.devices()), settings, variables, native.cpu_level(), _code_digest()


_code_digest()  # of the code that is being imported, not of what its files hold when the first engine is made
