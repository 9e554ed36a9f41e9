"""Models of the Hugging Face hub: the ways in which people name them, and what is fetched."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pjax.checkpoints.gguf_parts import PART, parts_of
from pjax.errors import CheckpointError

DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
TORCH_FILES = ("pytorch_model*.bin",)  # fetched where there are no safetensors
NOT_DOWNLOADED = ("*/*", "consolidated*")  # other formats' folders; a second copy of the weights in Mistral's own layout
ADDRESS = re.compile(r"(https?://)?(www\.)?(huggingface\.co|hf\.co)/|hf://", re.IGNORECASE)
WORD = r"[A-Za-z0-9][A-Za-z0-9._-]*"
NAME = re.compile(
    rf"(?P<repository>{WORD}/{WORD}?)(:(?P<kind>[A-Za-z0-9_.-]+))?"
    rf"(/(tree|blob|resolve|raw)/(?P<revision>[^/]+))?(/(?P<file>.+\.gguf))?/?(\?.*|#.*)?"
)
USUAL_KIND = "Q4_K_M"  # what "latest" is, as in llama.cpp and ollama


@dataclass(frozen=True, kw_only=True)
class HubName:
    """A model of the hub: a repository, or one of the GGUF files that it has."""

    repository: str
    revision: str | None = None
    file: str | None = None
    """The path of a .gguf file in the repository."""
    kind: str | None = None
    """How the wanted GGUF file is quantised, as its name says it: Q4_K_M."""

    @classmethod
    def parse(cls, text: str) -> HubName | None:
        """From owner/name, owner/name:Q4_K_M, owner/name/file.gguf, with hf.co/ or https://huggingface.co/ before it; None for others."""
        address = ADDRESS.match(text)
        found = NAME.fullmatch(text[address.end() :] if address else text)
        if found is None or (not address and (found["revision"] or found["repository"].endswith(".gguf"))):
            return None
        return cls(repository=found["repository"], revision=found["revision"], file=found["file"], kind=found["kind"])


def download(text: str) -> Path:
    """The local folder or .gguf file of a model of the hub; only files that pjax reads are fetched, with a progress bar.

    Raises CheckpointError when `text` is no name of a model of the hub, when the download fails and no copy is cached, or when the
    repository has no such GGUF file.
    """
    name = HubName.parse(text)
    if name is None:
        raise CheckpointError(
            f"model {text} does not exist; give a folder, a .gguf file or a hub id such as owner/name or owner/name:Q4_K_M"
        )
    try:
        if name.file is not None:
            return _fetch(name, [part.as_posix() for part in parts_of(Path(name.file))]) / name.file
        return _quantised(name, text) if name.kind is not None else _folder(name)
    except CheckpointError:
        raise
    except Exception as error:  # the hub client lets errors of its HTTP library through, which is not the same in all versions
        raise CheckpointError(f"model {text} is neither a local path nor can it be downloaded from the hub: {error}") from error


def _folder(name: HubName) -> Path:
    folder = _fetch(name, list(DOWNLOADED), list(NOT_DOWNLOADED))
    if any(folder.glob("*.safetensors")):
        return folder
    if not (folder / "config.json").is_file() and (names := _gguf_names(name)):
        raise CheckpointError(
            f"{name.repository} has GGUF files only: give one of them, {name.repository}:{USUAL_KIND} say: {', '.join(names)}"
        )
    return _fetch(name, [*DOWNLOADED, *TORCH_FILES], list(NOT_DOWNLOADED))


def _quantised(name: HubName, text: str) -> Path:
    """The GGUF file whose name ends with the kind, the first part of one in parts."""
    kind = USUAL_KIND if name.kind is None or name.kind.lower() == "latest" else name.kind
    folder = _fetch(name, [f"*{spelt}*.gguf" for spelt in dict.fromkeys((kind, kind.upper(), kind.lower()))], ["*mmproj*"])
    files = sorted({parts_of(file)[0] for file in folder.rglob("*.gguf")})
    found = [file for file in files if is_kind(file.name, kind)]
    if len(found) != 1:
        names = ", ".join(file.relative_to(folder).as_posix() for file in found) or ", ".join(_gguf_names(name)) or "none"
        raise CheckpointError(f"model {text}: {len(found)} GGUF files of {name.repository} are {kind}, but must be one; there are: {names}")
    return found[0]


def is_kind(file: str, kind: str) -> bool:
    """Whether a GGUF file's name ends with a kind of quantisation: model-Q4_K_M.gguf, model.q4_k_m-00001-of-00002.gguf."""
    part = PART.fullmatch(file)
    stem = part["start"] if part else file.removesuffix(".gguf")
    return re.search(rf"(^|[-._]){re.escape(kind)}$", stem, re.IGNORECASE) is not None


def _gguf_names(name: HubName) -> list[str]:
    from huggingface_hub import list_repo_files

    try:
        files = list_repo_files(name.repository, revision=name.revision)
    except Exception:  # no network: the error that names them says less then
        return []
    return sorted(file for file in files if file.endswith(".gguf"))


def _fetch(name: HubName, patterns: list[str], ignored: list[str] | None = None) -> Path:
    from huggingface_hub import snapshot_download

    more: dict[str, Any] = {} if name.revision is None else {"revision": name.revision}
    return Path(snapshot_download(name.repository, allow_patterns=patterns, ignore_patterns=ignored or [], **more))
