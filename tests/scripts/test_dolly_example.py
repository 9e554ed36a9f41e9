"""examples/dolly.py on a small random GPT-NeoX with Dolly's special tokens."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pjax import LLM, InvalidRequestError, SamplingParams
from tests.models import hf
from tests.text import test_gguf_tokenizers as tokenizers

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "dolly.py"
ENDS = {"### End", "### Instruction:", "### Response:\n"}


@pytest.fixture(scope="module")
def dolly() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dolly", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder whose model says one word of three tokens, then "### End", whatever it is asked; and its tokenizer."""
    folder = tmp_path_factory.mktemp("dolly")
    tokenizer = tokenizers.make("olmo")
    torch_model = hf.make(folder, "GPTNeoX", vocab_size=len(tokenizer), max_position_embeddings=256, bos_token_id=0, eos_token_id=0)
    order = [*tokenizer("the red").input_ids, tokenizer.convert_tokens_to_ids("### End")]
    response = tokenizer.convert_tokens_to_ids("### Response:\n")
    with torch.no_grad():  # each layer adds nothing, so the last token alone says the next
        for parameter in torch_model.gpt_neox.layers.parameters():
            parameter.zero_()
        embedding, head = torch_model.gpt_neox.embed_in.weight, torch_model.lm_head.weight
        embedding.zero_()
        head.zero_()
        for place, (token, following) in enumerate(zip([response, *order], order)):
            embedding[token, place] = 1
            head[following, place] = 100
    torch_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, tokenizer


def load(folder: Path, dolly: ModuleType) -> LLM:
    return LLM(folder, chat_template=dolly.TEMPLATE, max_num_seqs=1, max_num_batched_tokens=128, lazy=True, progress=False)


def test_the_format_is_databricks(dolly: ModuleType, model: tuple[Path, Any]) -> None:
    """The text of PROMPT_FOR_GENERATION_FORMAT in Databricks' instruct_pipeline.py."""
    folder, tokenizer = model
    llm = load(folder, dolly)
    intro = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    output = llm.chat([dolly.as_message("Name three colours.")], SamplingParams(max_tokens=1), use_tqdm=False)[0]
    expected = f"{intro}\n\n### Instruction:\nName three colours.\n\n### Response:\n"
    assert output.prompt_token_ids == tokenizer(expected, add_special_tokens=False).input_ids
    tokens = tokenizer.convert_ids_to_tokens(output.prompt_token_ids)
    assert [token for token in tokens if token in ENDS] == ["### Instruction:", "### Response:\n"]
    template = dolly.TEMPLATE.read_text()
    with_context = llm.get_tokenizer().apply_chat_template([dolly.as_message("Sum up.", "It is red.")], chat_template=template)
    assert with_context == f"{intro}\n\n### Instruction:\nSum up.\n\nInput:\nIt is red.\n\n### Response:\n"
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert llm.get_tokenizer().apply_chat_template(system) == "Be brief.\n\n### Instruction:\nWhy?\n\n### Response:\n"
    with pytest.raises(InvalidRequestError, match="Dolly v2 takes one instruction"):
        llm.chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}])


def test_an_answer_ends_at_its_own_token(dolly: ModuleType, model: tuple[Path, Any]) -> None:
    folder, tokenizer = model
    llm = load(folder, dolly)
    params = dolly.sampling_params(llm)
    end = tokenizer.convert_tokens_to_ids("### End")
    assert params.stop_token_ids == (end,) and not params.stop
    (output,) = llm.chat([dolly.as_message("Name a colour.")], params, use_tqdm=False)
    assert (output.outputs[0].text, output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("the red", "stop", end)


@pytest.mark.slow
def test_as_a_program(model: tuple[Path, Any]) -> None:
    command = [sys.executable, str(EXAMPLE), "Name a colour.", "--context", "Paint.", "--model", str(model[0])]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert (result.returncode, result.stdout) == (0, "the red\n"), result.stderr


def test_it_names_dolly_v2(dolly: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["dolly.py", "--help"])
    with pytest.raises(SystemExit):
        dolly.main()
    assert "default: databricks/dolly-v2-3b" in capsys.readouterr().out
