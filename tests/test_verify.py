"""`pjax verify`: agreement with transformers, and where a checkpoint that was tampered with first departs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx

from pjax import cli, verify
from pjax.models import llama
from tests.checkpoints import gguf_files
from tests.models import hf


@pytest.mark.parametrize("family", ["Llama", "GPTNeoX", "OPT", "GPT2"])
def test_agreement(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf.make(tmp_path, family)
    assert cli.main(["verify", str(tmp_path), "--max-tokens", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("input of layer 0")
    assert [line.split()[0] for line in lines[-3:]] == ["logits", "greedy", "PASS"]


def test_the_first_layer_that_departs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Layer 1's attention is broken in pjax: the inputs of layers 0 and 1 still agree, that of layer 2 does not."""
    hf.make(tmp_path, "Llama", num_hidden_layers=4)
    load = verify.load

    def load_broken(*args: object, **options: object) -> nnx.Module:
        model = load(*args, **options)
        assert isinstance(model, llama.Model)
        kernel = model.blocks.layers[1].attention.out.kernel
        kernel[...] = jnp.flip(kernel[...])
        return model

    monkeypatch.setattr(verify, "load", load_broken)
    assert cli.main(["verify", str(tmp_path), "--max-tokens", "2"]) == 1
    report = verify.verify(tmp_path, max_tokens=2)
    departure = report.first_departure
    assert departure is not None
    assert departure.where == "input of layer 2"
    assert capsys.readouterr().out.splitlines()[-1] == "FAIL: first departs at input of layer 2"


def test_nan_is_no_agreement() -> None:
    report = verify.Report((verify.Finding("logits", float("nan")),), ((1,),), ((1,),))
    assert not report.passed
    assert not dataclasses.replace(report, findings=(), tokens=((2,),)).passed


def test_what_cannot_be_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err


def test_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What transformers reads is compared; the rest is no failure of pjax."""
    qwen = gguf_files.write_model(tmp_path / "qwen.gguf", hf.make(tmp_path / "qwen", "Qwen2"))
    assert cli.main(["verify", str(qwen), "--max-tokens", "2"]) == 0
    neox = gguf_files.write_model(tmp_path / "neox.gguf", hf.make(tmp_path / "neox", "GPTNeoX"))
    assert cli.main(["verify", str(neox), "--max-tokens", "2"]) == 2
    assert "neox.gguf: transformers does not read it, so there is nothing to compare with" in capsys.readouterr().err
