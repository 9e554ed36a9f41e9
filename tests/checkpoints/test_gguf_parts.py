"""GGUF models in several files, split as llama-gguf-split does, against the same model in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from pjax import CheckpointError
from pjax.checkpoints.gguf_parts import parts_of
from pjax.convert import _fingerprint
from pjax.hosts.facts import of_model
from pjax.models import open_model
from pjax.text.loading import load_tokenizer
from tests.checkpoints.test_gguf_models import TOKENS, make
from tests.models import hf
from tests.models.test_families import logits_of


def split(path: Path, count: int, *, first_is_empty: bool = False, **changes: Any) -> list[Path]:
    """Parts of a file: the first has the metadata, each has its number, the count and the number of all tensors.

    `changes` replace fields of the second part.
    """
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    filled = count - 1 if first_is_empty else count
    pieces = [list(piece) for piece in np.array_split(np.arange(len(reader.tensors)), filled)]
    pieces = [[], *pieces] if first_is_empty else pieces
    made = []
    for number, piece in enumerate(pieces):
        made.append(path.with_name(f"{path.stem}-{number + 1:05}-of-{count:05}.gguf"))
        writer = gguf.GGUFWriter(made[-1], architecture)
        for field in reader.fields.values():
            if number == 0 and not field.name.startswith("GGUF.") and field.name != "general.architecture":
                writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        values = {"no": number, "count": count, "tensors_count": len(reader.tensors)} | (changes if number == 1 else {})
        writer.add_uint16("split.no", values["no"])
        writer.add_uint16("split.count", values["count"])
        writer.add_int32("split.tensors.count", values["tensors_count"])
        for index in piece:
            tensor = reader.tensors[index]
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return made


@pytest.mark.parametrize("first_is_empty", [False, True])  # llama-gguf-split --no-tensor-first-split
def test_any_part_names_the_model(first_is_empty: bool, tmp_path: Path) -> None:
    model, path = make(tmp_path, "llama, tied, biases")
    parts = split(path, 3, first_is_empty=first_is_empty)
    want = hf.torch_logits(model, TOKENS)
    tokenizer = load_tokenizer(path)
    for part in parts:
        source = open_model(part, dtype="float32")
        assert source.path == parts[0]
        assert parts_of(part) == parts
        np.testing.assert_allclose(logits_of(part, TOKENS), want, atol=2e-4, rtol=2e-4)
        assert load_tokenizer(part).encode("abc") == tokenizer.encode("abc")
    facts = of_model(source.config, "float32", parts[0])
    assert [key for key in facts if key.startswith("file ")] == [f"file {part.name}" for part in parts]
    assert len(_fingerprint(parts[0])) == 3


def test_a_file_in_one_part(tmp_path: Path) -> None:
    model, path = make(tmp_path, "llama")
    (part,) = split(path, 1)
    np.testing.assert_allclose(logits_of(part, TOKENS), hf.torch_logits(model, TOKENS), atol=2e-4, rtol=2e-4)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    parts = split(make(tmp_path, "llama")[1], 3)
    parts[1].unlink()
    with pytest.raises(
        CheckpointError, match=r"a-00003-of-00003\.gguf is one of 3 parts, of which these are missing: a-00002-of-00003\.gguf"
    ):
        open_model(parts[2], dtype="float32")


def test_a_part_with_another_name(tmp_path: Path) -> None:
    parts = split(make(tmp_path, "llama")[1], 2)
    other = parts[0].rename(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=r"other\.gguf is one of 2 parts, but its name does not end with -00001-of-00002\.gguf"):
        open_model(other, dtype="float32")


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    path = make(tmp_path, "llama")[1]
    parts = split(path, 2, no=0)
    with pytest.raises(CheckpointError, match=r"a-00002-of-00002\.gguf is named part 2, but its split\.no is 0, and must be 1"):
        open_model(parts[0], dtype="float32")
    parts = split(path, 3)
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(CheckpointError, match=r"a-00003-of-00003\.gguf is named part 3, but its split\.no is 1"):
        open_model(parts[0], dtype="float32")


def test_a_truncated_part_is_named(tmp_path: Path) -> None:
    parts = split(make(tmp_path, "llama")[1], 2)
    parts[1].write_bytes(parts[1].read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"a-00002-of-00002\.gguf is damaged or truncated: tensor"):
        open_model(parts[0], dtype="float32")
