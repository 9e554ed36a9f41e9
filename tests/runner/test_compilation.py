"""Where compiled programs are kept: a user without a home has none, and everything else works."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from pjax.machine import expand_user, user_folder
from pjax.runner.compilation import use_compilation_cache
from tests.tiny import write_model

NO_HOME = "compiled programs are not kept: there is no home folder; name a folder by compilation_cache_dir or XDG_CACHE_HOME"


@pytest.fixture
def unknown_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id that the system does not know, and no HOME: containers of OpenShift run so."""

    def getpwuid(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def no_cache_of_jax() -> None:
    """Tests run with JAX's own cache off."""
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert use_compilation_cache(str(tmp_path / "a"), whole_steps=True) == tmp_path / "a" / "steps"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert use_compilation_cache("auto", whole_steps=True) == tmp_path / "b" / "pjax" / "xla" / "steps"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert use_compilation_cache("auto", whole_steps=True) == tmp_path / "c" / ".cache" / "pjax" / "xla" / "steps"
    assert use_compilation_cache(None, whole_steps=True) is None


@pytest.mark.parametrize("whole_steps", [False, True])
def test_an_unknown_user_keeps_nothing(unknown_user: None, whole_steps: bool, caplog: pytest.LogCaptureFixture) -> None:
    assert use_compilation_cache("auto", whole_steps=whole_steps) is None
    assert caplog.messages == [NO_HOME]
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("whole_steps", [False, True])
@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME"])
def test_a_home_that_is_no_folder(
    variable: str, whole_steps: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, "/dev/null")
    assert use_compilation_cache("auto", whole_steps=whole_steps) is None
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("compiled programs are not kept: [Errno 20] Not a directory: '/dev/null/")
    assert jax.config.jax_compilation_cache_dir is None


def test_folders_of_a_user_without_a_home(unknown_user: None) -> None:
    assert user_folder("XDG_STATE_HOME", ".local/state") is None
    assert expand_user("~/model") == Path("~/model")
    assert expand_user("~nobody-of-this-name/model") == Path("~nobody-of-this-name/model")


PROGRAM = """
import os, pwd, sys
if sys.argv[2] == "unknown":
    def getpwuid(uid):
        raise KeyError(uid)
    pwd.getpwuid = getpwuid
from pjax.cli import main
sys.exit(main(["generate", "a", "--model", sys.argv[1], "--max-tokens", "3", "--max-model-len", "64", "--num-pages", "8"]))
"""


@pytest.mark.parametrize("home", ["/dev/null", "unknown"])
def test_text_is_generated_without_a_home(home: str, tmp_path: Path) -> None:
    names = ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "JAX_COMPILATION_CACHE_DIR", "USER", "LOGNAME")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {} if home == "unknown" else {"HOME": home}
    made = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(write_model(tmp_path)), home], env=environment, capture_output=True, text=True, timeout=300
    )
    assert made.returncode == 0, made.stderr
    assert "Traceback" not in made.stderr
    assert made.stderr.count("compiled programs are not kept") == 1
