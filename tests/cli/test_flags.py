"""Flags of the command line: each field has one, and its value comes from the command line, the environment or a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest

from pjax import cli, native
from pjax.cli import collect_env
from pjax.cli.common import NO_FLAG, ONE_HOST, engine_options, server_config
from pjax.cli.flags import add_fields, field_docs, make_parser, size, values
from pjax.config import EngineConfig
from pjax.errors import ConfigError
from pjax.params import SamplingParams
from pjax.server import ServerConfig

ROOT = Path(__file__).resolve().parents[2]


def parse(*arguments: str) -> Any:
    return cli.parser(arguments[0]).parse_args(arguments)


@pytest.mark.parametrize(
    ("text", "number"),
    [("7", 7), ("-1", -1), ("32k", 32_000), ("32K", 32_768), ("1.5G", 3 << 29), ("4GB", 4 * 10**9), ("4GiB", 4 << 30), ("4 gib", 4 << 30)],
)
def test_sizes_have_units(text: str, number: int) -> None:
    assert size(text) == number


@pytest.mark.parametrize("text", ["", "k", "4i", "4iB", "1.5", "0.3k1", "1e3", "lots", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(Exception, match=r"is no size|whole number"):
        size(text)


@pytest.mark.parametrize("command", ["serve", "run-batch", "bench", "chat", "complete"])
def test_every_engine_field_has_a_flag_with_its_default_and_its_docstring(command: str) -> None:
    words = {"run-batch": ("--input", "a", "--output", "b"), "bench": ("latency",)}.get(command, ())
    given = engine_options(parse(command, *words))
    lazy = {"lazy": True} if command in ("chat", "complete") else {}
    rows: dict[str, Any] = {"max_num_seqs": 1} if command in ("chat", "complete") else {}
    rows |= {"warmup": "all"} if command == "bench" else {}  # what it measures is not to be disturbed
    left_out = (*NO_FLAG, *(ONE_HOST if command in ("chat", "complete", "run-batch") else ()))
    expected = {item.name: item.default for item in fields(EngineConfig) if item.name not in left_out} | lazy | rows
    assert {name: value for name, value in given.items() if name != "seed"} == {n: v for n, v in expected.items() if n != "seed"}
    assert set(field_docs(EngineConfig)) == {item.name for item in fields(EngineConfig)}, "a field without a docstring has no help"


@pytest.mark.parametrize("command", ["chat", "complete", "run-batch"])
def test_commands_of_one_host_refuse_several(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--input", "a", "--output", "b") if command == "run-batch" else ()
    with pytest.raises(SystemExit):
        parse(command, *words, "--nnodes", "2")
    assert "unrecognized arguments: --nnodes" in capsys.readouterr().err
    assert set(ONE_HOST) < {item.name for item in fields(EngineConfig)}


def test_every_server_field_has_a_flag() -> None:
    args = parse("serve", "./model")
    names = {item.name for item in fields(ServerConfig)} - {"engine"}
    assert names <= set(vars(args))
    assert server_config(parse("serve", "--model", "m")) == ServerConfig(model="m")


def test_a_new_field_becomes_a_flag_and_one_that_can_not_is_told() -> None:
    @dataclass
    class Settings:
        parallel: int = 1
        """Devices, 100% of them."""
        mode: str | None = None
        ids: tuple[int, ...] = ()
        bias: dict[str, float] | None = None
        sure: bool | None = None

    parser = make_parser("x", "")
    add_fields(parser, Settings, "settings")
    args = parser.parse_args("--parallel 2k --mode none --ids 1 --ids 2 --sure yes".split() + ["--bias", '{"5": 1}'])
    assert values(Settings, args) == {"parallel": 2000, "mode": None, "ids": [1, 2], "bias": {"5": 1}, "sure": True}
    assert "Devices, 100% of them. (default: 1)" in parser.format_help()
    assert values(Settings, parser.parse_args([])) == {"parallel": 1, "mode": None, "bias": None, "sure": None}

    @dataclass
    class Odd:
        strange: object = field(default_factory=object)

    with pytest.raises(TypeError, match=r"Odd\.strange"):
        add_fields(make_parser("x", ""), Odd, "settings")


def test_the_command_line_wins_over_the_environment_which_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pjax.yaml").write_text(
        "model: from-file\nmax-num-seqs: 3\nmax_num_batched_tokens: 1K\nkv-cache-memory: 2GiB\nlazy: true\n"
        "enable-prefix-caching: false\napi-key: [one, two]\ndtype: BFLOAT16\nport: 1\n"
    )
    monkeypatch.setenv("PJAX_MAX_NUM_SEQS", "4")
    monkeypatch.setenv("PJAX_PORT", "2")
    monkeypatch.setenv("PJAX_ASYNC_SCHEDULING", "false")
    config = server_config(parse("serve", "--config", str(tmp_path / "pjax.yaml"), "--port", "5"))
    assert (config.model, config.port, config.api_keys) == ("from-file", 5, ("one", "two"))
    engine = config.engine
    assert (engine.max_num_seqs, engine.max_num_batched_tokens, engine.kv_cache_memory) == (4, 1024, 2 << 30)
    assert (engine.lazy, engine.enable_prefix_caching, engine.async_scheduling, engine.dtype) == (True, False, False, "bfloat16")


def test_a_name_in_the_file_that_is_no_flag_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pjax.yaml").write_text("max-num-seq: 3\n")
    with pytest.raises(SystemExit) as left:
        parse("serve", "--config", str(tmp_path / "pjax.yaml"))
    assert left.value.code == 2
    assert "--max-num-seq" in capsys.readouterr().err


def test_a_key_in_the_environment_is_taken_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PJAX_API_KEY", "sesame")
    config = server_config(parse("serve", "m"))
    assert config.api_keys == ("sesame",)
    assert "sesame" not in repr(config)
    monkeypatch.setenv("PJAX_API_KEY", "")
    assert server_config(parse("serve", "m")).api_keys == ()


def test_values_out_of_bounds_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "m", "--max-num-seqs", "0"]) == 2
    assert capsys.readouterr().err == "pjax serve: max_num_seqs is 0, but must be an integer >= 1\n"
    assert cli.main(["serve", "m", "--model", "n"]) == 2
    assert "must be one" in capsys.readouterr().err


def test_sampling_flags_follow_the_fields() -> None:
    from pjax.cli.common import sampling_params

    args = parse(
        "generate", "x", "--temperature", "0.5", "--top-k", "3", "--stop", "a", "--stop", "b", "--stop-token-ids", "7", "--seed", "1"
    )
    expected = SamplingParams(temperature=0.5, top_k=3, stop=["a", "b"], stop_token_ids=[7], seed=1, max_tokens=128)
    assert sampling_params(args) == expected
    with pytest.raises(ConfigError, match="--top-p, --seed: no use"):
        sampling_params(parse("generate", "x", "--top-p", "0.5", "--seed", "2"))


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in cli.COMMANDS)], ids=" ".join)
def test_help_loads_no_heavy_library(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom pjax.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as left:\n    assert left.code == 0\n"
        "heavy = set('jax numpy flax transformers tokenizers fastapi pydantic yaml httpx2 tqdm'.split()) & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("usage: pjax", "pjax "))


def test_the_environment_is_collected_without_secrets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PJAX_API_KEY", "sesame")
    monkeypatch.setenv("HF_HUB_TOKEN", "sesame")
    monkeypatch.setenv("PJAX_PROXY", "http://user:sesame@example.org")
    monkeypatch.setenv("AWS_SECRET", "sesame")
    assert cli.main(["collect-env"]) == 0
    text = capsys.readouterr().out
    assert "sesame" not in text
    assert "AWS" not in text
    assert "cpu:0" in text
    found = collect_env.collect()
    assert found["environment"]["PJAX_API_KEY"] == "(set, not shown)"
    assert found["environment"]["PJAX_PROXY"] == "http://…@example.org"
    assert found["environment"]["TOKENIZERS_PARALLELISM"] == "false"
    json.dumps(found)


@pytest.mark.parametrize("arguments", ["generate", "serve m", "bench latency --model a", "convert a b", "verify a", "run-batch -i a -o b"])
def test_a_wrong_level_of_the_processor_is_one_line(
    arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "PJAX_CPU_LEVEL is 'avx3', but must be one of baseline, avx2, avx512, amx"

    def refuse() -> None:
        raise ValueError(message)

    monkeypatch.setenv("PJAX_CPU_LEVEL", "avx3")
    monkeypatch.setattr(native, "library", refuse)
    assert cli.main(arguments.split()) == 2
    assert capsys.readouterr().err == f"pjax {arguments.split()[0]}: {message}\n"
