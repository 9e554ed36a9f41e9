"""Any checkpoint as safetensors or orbax: `convert`, resumable and checksummed. scripts/convert.py is its door.

Files are written into DESTINATION.partial, which gets its name at the very end. A shard counts as finished once its
checksum is in the state file; a later run with the same arguments and the same source keeps those whose checksum holds.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pjax.checkpoints.gguf_parts import parts_of
from pjax.checkpoints.orbax_folder import MANIFEST
from pjax.checkpoints.tensors import PARAMETER_DTYPES, ModelTensors, open_tensors
from pjax.checkpoints.weights import warn_of
from pjax.checkpoints.writers import FORMATS, Shard, make_writer
from pjax.errors import CheckpointError, ConfigError
from pjax.machine import expand_user
from pjax.models import find_family
from pjax.text.loading import load_tokenizer

log = logging.getLogger(__name__)

STATE = "conversion.json"
CHECKSUMS = "SHA256SUMS"
CARRIED = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md")
NOT_CARRIED = ("config.json", MANIFEST, "*.index.json", STATE, CHECKSUMS)
DEFAULT_SHARD_SIZE = 5 * 10**9  # as huggingface_hub's
BLOCK = 1 << 20
SPARE = 64 << 20  # of the disk, for all that is no weights


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    format: str = "safetensors",
    dtype: str = "auto",
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    progress: bool = True,
) -> Path:
    """Writes a checkpoint (folder, .gguf file or hub id) as a new folder, tokenizer and config files included.

    The host holds one tensor (safetensors) or one shard (orbax) at a time.

    Args:
      destination: a path where nothing is yet.
      format: "safetensors" (Hugging Face's names and layout) or "orbax" (pjax's own parameters).
      dtype: of all tensors; "auto" is the checkpoint's.
      max_shard_size: bytes of tensors in one file; a larger tensor has a file of its own.

    Raises ConfigError for wrong arguments or a full disk, CheckpointError or UnsupportedError for a source that pjax does not
    load. An interrupted conversion leaves only DESTINATION.partial, from where the same call goes on.
    """
    if format not in FORMATS:
        raise ConfigError(f"format is {format!r}, but must be one of {', '.join(FORMATS)}")
    if dtype not in ("auto", *PARAMETER_DTYPES):
        raise ConfigError(f"dtype is {dtype!r}, but must be one of auto, {', '.join(PARAMETER_DTYPES)}")
    if not isinstance(max_shard_size, int) or isinstance(max_shard_size, bool) or max_shard_size < 1:
        raise ConfigError(f"max_shard_size is {max_shard_size!r}, but must be an integer >= 1")
    target = expand_user(destination)
    if os.path.lexists(target):
        raise ConfigError(f"{target} exists, but must be a path where nothing is yet")
    partial = target.with_name(target.name + ".partial")
    tensors = open_tensors(source, find_family)
    with tensors.checkpoint:
        chosen = tensors.choose_dtype(dtype)
        plan = {"source": _fingerprint(tensors.checkpoint.path), "format": format, "dtype": chosen, "max_shard_size": max_shard_size}
        with _locked(partial):
            writer = make_writer(format, tensors, chosen, max_shard_size)
            shards = _write_shards(partial, writer, plan, progress)
            writer.finish(partial)
            _carry(tensors, partial, chosen)
            _finish(partial, target, shards)
    return target


def _write_shards(partial: Path, writer: Any, plan: Mapping[str, Any], progress: bool) -> dict[str, str]:
    """Writes the shards that are not there yet; the checksums of all their files."""
    state = _read_state(partial, plan)
    shards: Sequence[Shard] = writer.shards
    kept = [shard for shard in shards if _holds(partial, state.get(shard.name))]
    missing = sum(shard.num_bytes for shard in shards if shard not in kept)
    free = shutil.disk_usage(partial).free
    if missing + SPARE > free:
        raise ConfigError(f"{partial.parent} has {free} bytes free, but the conversion needs {missing + SPARE} more")
    if kept:
        log.info("%s: %d of %d shards are there already", partial, len(kept), len(shards))
    finished = {shard.name: state[shard.name] for shard in kept}
    bad: list[str] = []
    total = sum(shard.num_bytes for shard in shards)
    with tqdm(total=total, desc="Converting", unit="B", unit_scale=True, unit_divisor=1024, disable=None if progress else True) as bar:
        for shard in shards:
            if shard not in kept:
                _remove(partial / shard.name)
                writer.write(partial / shard.name, shard, bad)
                finished[shard.name] = {name: _sync_and_sum(partial / name) for name in _files(partial, shard.name)}
                _write_state(partial, {"plan": plan, "finished": finished})
            bar.update(shard.num_bytes)
    warn_of(bad)
    return {name: digest for shard in shards for name, digest in finished[shard.name].items()}


def _carry(tensors: ModelTensors, folder: Path, dtype: str) -> None:
    """config.json for the new type, and tokenizer and other small files as they are."""
    from pjax.checkpoints.hf_folder import check_inside

    hf = dict(tensors.hf)
    hf["torch_dtype" if "torch_dtype" in hf or "dtype" not in hf else "dtype"] = dtype
    _write_json(folder / "config.json", hf)
    path = tensors.checkpoint.path
    if path.is_dir():
        for file in sorted({file for pattern in CARRIED for file in path.glob(pattern)}):
            if not any(file.match(pattern) for pattern in NOT_CARRIED):
                shutil.copyfile(check_inside(path, file.name, "the checkpoint"), folder / file.name)
        return
    tokenizer = load_tokenizer(path)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    settings = {**tokenizer.special_tokens, "tokenizer_class": "PreTrainedTokenizerFast"}
    _write_json(folder / "tokenizer_config.json", settings)
    if tokenizer.chat_template is not None:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    if tokenizer.eos_token_ids:
        _write_json(folder / "generation_config.json", {"eos_token_id": list(tokenizer.eos_token_ids)})


def _finish(partial: Path, target: Path, sums: Mapping[str, str]) -> None:
    """Checksums as `sha256sum --check` reads them, and the name."""
    small = {file.name: _sync_and_sum(file) for file in partial.iterdir() if file.is_file() and file.name not in (STATE, *sums)}
    lines = [f"{digest}  {name}\n" for name, digest in sorted({**sums, **small}.items())]
    (partial / CHECKSUMS).write_text("".join(lines), encoding="utf-8")
    _sync_and_sum(partial / CHECKSUMS)
    (partial / STATE).unlink(missing_ok=True)
    _sync_folder(partial)
    if os.path.lexists(target):
        raise ConfigError(f"{target} appeared while it was made; the conversion is whole in {partial}")
    partial.rename(target)
    _sync_folder(target.parent)


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Keeps a second conversion out of the folder. ConfigError when one is there, or when the folder is somebody else's."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        folder = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError(f"{partial} can't be made: {error}") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(folder)
        raise ConfigError(f"another process is converting into {partial}") from error
    try:
        yield
    finally:
        os.close(folder)


def _read_state(partial: Path, plan: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The finished shards of an interrupted conversion with the same plan; the folder is emptied when it had another one."""
    path = partial / STATE
    if not path.is_file():
        if any(partial.iterdir()):
            raise ConfigError(f"{partial} is not empty and has no {STATE} of an interrupted conversion; remove it first")
        _write_state(partial, {"plan": plan, "finished": {}})
        return {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["plan"] == plan:
            return {str(shard): {str(name): str(digest) for name, digest in sums.items()} for shard, sums in state["finished"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("%s is damaged, so nothing of it is kept: %s", path, error)
    log.info("%s is of another conversion: it begins anew", partial)
    for file in partial.iterdir():
        _remove(file)
    _write_state(partial, {"plan": plan, "finished": {}})
    return {}


def _write_state(partial: Path, state: Mapping[str, Any]) -> None:
    new = partial / f"{STATE}.new"
    _write_json(new, state)
    new.replace(partial / STATE)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _fingerprint(path: Path) -> dict[str, Any]:
    """What tells that a source is still the same: its files' sizes and times."""
    files = parts_of(path) if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.resolve()): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _files(partial: Path, shard: str) -> list[str]:
    """A shard's files by their paths in the folder: itself, or all that a folder has."""
    path = partial / shard
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [file.relative_to(partial).as_posix() for file in files]


def _holds(partial: Path, sums: Mapping[str, str] | None) -> bool:
    """Whether a shard's files are there with these checksums."""
    return bool(sums) and all((partial / name).is_file() and _sum(partial / name) == digest for name, digest in (sums or {}).items())


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_and_sum(path: Path) -> str:
    """The checksum of a file that is on the disk then."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _sum(path)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def verify(folder: str | Path) -> None:
    """Reads every file of a converted checkpoint. CheckpointError names those whose checksum does not hold."""
    path = Path(folder)
    try:
        rows = [line.split("  ", 1) for line in (path / CHECKSUMS).read_text(encoding="utf-8").splitlines()]
        wrong = [name for digest, name in rows if not (path / name).is_file() or _sum(path / name) != digest]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / CHECKSUMS} is missing or damaged: {error}") from error
    if wrong:
        raise CheckpointError(f"{path}: {', '.join(wrong)} are missing or changed: their checksums do not hold")
