"""Ways to name a model: addresses, kinds of quantisation, files without a suffix, and pointers that Git left."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.utils._paths import filter_repo_objects

from pjax import CheckpointError
from pjax.checkpoints import open_checkpoint
from pjax.checkpoints.hub import HubName, is_kind
from pjax.text.loading import load_tokenizer
from tests.checkpoints.test_gguf_models import TOKENS, make
from tests.checkpoints.test_gguf_parts import split
from tests.models import hf
from tests.models.test_families import logits_of
from tests.tiny import write_model

REPO = "Qwen/Qwen2.5-0.5B-Instruct-GGUF"
FILE = "qwen2.5-0.5b-instruct-q4_k_m.gguf"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 538090408\n"


@pytest.mark.parametrize(
    "address", ["", "hf.co/", "huggingface.co/", "https://huggingface.co/", "https://hf.co/", "http://www.huggingface.co/", "hf://"]
)
@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        (REPO, {}),
        (f"{REPO}:Q4_K_M", {"kind": "Q4_K_M"}),
        (f"{REPO}:latest", {"kind": "latest"}),
        (f"{REPO}/{FILE}", {"file": FILE}),
        (f"{REPO}/sub/{FILE}", {"file": f"sub/{FILE}"}),
    ],
)
def test_names(address: str, rest: str, expected: dict[str, str]) -> None:
    assert HubName.parse(address + rest) == HubName(repository=REPO, **expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"https://huggingface.co/{REPO}/", {}),
        (f"https://huggingface.co/{REPO}/tree/main", {"revision": "main"}),
        (f"https://huggingface.co/{REPO}/tree/v1.0/", {"revision": "v1.0"}),
        (f"https://huggingface.co/{REPO}/blob/main/{FILE}", {"revision": "main", "file": FILE}),
        (f"https://huggingface.co/{REPO}/resolve/main/{FILE}?download=true", {"revision": "main", "file": FILE}),
        (f"https://huggingface.co/{REPO}?show_file_info={FILE}", {}),
    ],
)
def test_addresses(text: str, expected: dict[str, str]) -> None:
    assert HubName.parse(text) == HubName(repository=REPO, **expected)


@pytest.mark.parametrize(
    "text",
    [
        "word",
        "./a/b",
        "/a/b",
        "~/a/b",
        "a/b.gguf",
        "a/b/c",
        "a/b/tree/main",
        "../a/b",
        "https://example.com/a/b",
        "",
        "a/",
        "/b",
        "hf.co/a",
    ],
)
def test_what_is_no_name_of_the_hub(text: str) -> None:
    assert HubName.parse(text) is None
    if text:
        with pytest.raises(CheckpointError, match=r"does not exist; give a folder, a \.gguf file or a hub id"):
            open_checkpoint(text)


@pytest.mark.parametrize(
    ("file", "kind", "expected"),
    [
        ("a-Q4_K_M.gguf", "Q4_K_M", True),
        ("a.q4_k_m.gguf", "Q4_K_M", True),
        ("a-Q4_K_M-00001-of-00002.gguf", "q4_k_m", True),
        ("a-UD-Q4_K_M.gguf", "UD-Q4_K_M", True),
        ("Q4_K_M.gguf", "Q4_K_M", True),
        ("a-IQ4_NL.gguf", "Q4_NL", False),
        ("a-Q4_K_M-imat.gguf", "Q4_K_M", False),
        ("a-Q4_K_S.gguf", "Q4_K_M", False),
        ("a-Q4_K.gguf", "Q4_K_M", False),
    ],
)
def test_kinds_of_files(file: str, kind: str, expected: bool) -> None:
    assert is_kind(file, kind) == expected


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub of one repository, the folder that is given: what is fetched appears in another one."""
    stored, cache = tmp_path / "hub", tmp_path / "cache"
    stored.mkdir()

    def names(repo: str, revision: str | None) -> list[str]:
        if (repo, revision) not in ((REPO, None), (REPO, "main")):
            raise RuntimeError("404")
        return sorted(file.relative_to(stored).as_posix() for file in stored.rglob("*") if file.is_file())

    def snapshot_download(repo: str, *, revision: str | None = None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        for name in filter_repo_objects(names(repo, revision), allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(stored / name, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo, *, revision: names(repo, revision))
    return stored


def test_gguf_files_of_the_hub(hub: Path, tmp_path: Path) -> None:
    model, path = make(tmp_path, "llama")
    for name in ("m-Q8_0.gguf", "m-q4_k_m.gguf", "mmproj-m-Q8_0.gguf", "README.md"):
        shutil.copyfile(path, hub / name)
    cache = tmp_path / "cache"
    assert open_checkpoint(f"{REPO}:Q4_K_M").path == cache / "m-q4_k_m.gguf"
    assert open_checkpoint(f"hf.co/{REPO}:latest").path == cache / "m-q4_k_m.gguf"
    assert sorted(file.name for file in cache.iterdir()) == ["m-q4_k_m.gguf"], "nothing else is fetched"
    assert open_checkpoint(f"https://huggingface.co/{REPO}/blob/main/m-Q8_0.gguf").path == cache / "m-Q8_0.gguf"
    np.testing.assert_allclose(logits_of(f"{REPO}:q8_0", TOKENS), hf.torch_logits(model, TOKENS), atol=2e-4, rtol=2e-4)
    with pytest.raises(
        CheckpointError, match=r":Q2_K: 0 GGUF files of .* are Q2_K, but must be one; there are: m-Q8_0\.gguf, m-q4_k_m\.gguf, mm"
    ):
        open_checkpoint(f"{REPO}:Q2_K")
    with pytest.raises(CheckpointError, match=r"has GGUF files only: give one of them, .*:Q4_K_M say: m-Q8_0\.gguf, m-q4_k_m\.gguf, mm"):
        open_checkpoint(REPO)
    with pytest.raises(CheckpointError, match=r"a/b:Q8_0 is neither a local path nor can it be downloaded from the hub: 404"):
        open_checkpoint("a/b:Q8_0")


@pytest.mark.parametrize("name", [f"{REPO}:Q8_0", f"{REPO}/Q8_0/a-Q8_0-00002-of-00002.gguf"])
def test_parts_of_the_hub(name: str, hub: Path, tmp_path: Path) -> None:
    path = make(tmp_path, "llama")[1].rename(tmp_path / "a-Q8_0.gguf")
    (hub / "Q8_0").mkdir()
    for part in split(path, 2):
        part.rename(hub / "Q8_0" / part.name)
    assert open_checkpoint(name).path == tmp_path / "cache" / "Q8_0" / "a-Q8_0-00001-of-00002.gguf"


def test_a_blob_without_a_suffix(tmp_path: Path) -> None:
    """As ollama keeps it."""
    model, path = make(tmp_path, "llama")
    blob = path.rename(tmp_path / f"sha256-{64 * '0'}")
    np.testing.assert_allclose(logits_of(blob, TOKENS), hf.torch_logits(model, TOKENS), atol=2e-4, rtol=2e-4)
    assert load_tokenizer(blob).vocab_size > 0


def test_a_folder_of_gguf_files_names_them(tmp_path: Path) -> None:
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"has no config\.json; give one of its GGUF files: a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pytorch_model.bin", "model.safetensors.index.json"])
def test_pointers_in_a_folder_are_named(name: str, tmp_path: Path) -> None:
    write_model(tmp_path)
    if name != "config.json":
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer and not the file itself: run `git lfs pull` in its folder"):
        open_checkpoint(tmp_path).hf_config()


@pytest.mark.parametrize("name", ["a.gguf", "a"])
def test_a_pointer_to_a_gguf_file_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer"):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_pointer_to_a_tokenizer_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer"):
        load_tokenizer(tmp_path)
