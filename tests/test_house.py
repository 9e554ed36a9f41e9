"""The house rules of design: who may import whom, what an import costs, what is installed.

Imports are read from the syntax trees, so lazy and type-only imports count too.
"""

from __future__ import annotations

import ast
import fnmatch
import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pjax"

# part -> the parts it may import besides itself. A dotted name opens that one module only.
# A new part gets a line here; pjax/__init__.py is not a part: it names its exports lazily.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "logs": {"errors"},
    "params": {"errors"},
    "outputs": {"errors"},
    "config": {"errors"},
    "native": set(),
    "pallas_kernels": {"native", "moved"},
    "machine": set(),
    "ending": set(),
    "moved": set(),
    "layers": {"pallas_kernels", "native", "kv_cache.layout", "errors"},
    "checkpoints": {"native", "errors", "machine"},
    "models": {"layers", "checkpoints", "errors", "machine", "moved"},
    "kv_cache": {"errors"},
    "scheduler": {"kv_cache", "errors", "params", "outputs"},
    "hosts": {"errors", "config", "checkpoints.gguf_parts"},
    "sampling": {"errors", "params"},
    "runner": {
        "machine",
        "hosts",
        "models",
        "layers",
        "native",
        "kv_cache.layout",
        "pallas_kernels",
        "sampling",
        "scheduler.plan",
        "errors",
        "config",
        "params",
    },
    "text": {"errors", "params", "machine", "checkpoints.gguf_header", "checkpoints.gguf_parts", "checkpoints.magic"},
    "convert": {"models", "checkpoints", "text", "errors", "machine"},
    "memory": {"kv_cache", "errors", "config", "machine"},
    "metrics": {"errors", "config", "outputs"},
}
MAY_IMPORT["engine"] = {*MAY_IMPORT}
MAY_IMPORT["llm"] = {*MAY_IMPORT}
MAY_IMPORT["server"] = {*MAY_IMPORT} - {"llm"}
MAY_IMPORT["verify"] = {"models", "checkpoints", "errors"}
MAY_IMPORT["cli"] = {*MAY_IMPORT}
MAY_IMPORT["__main__"] = {*MAY_IMPORT}
MAY_IMPORT["ray_serve"] = {"server", "engine", "cli", "errors"}

# part -> the only third-party packages it may import; parts that are not named may import any but torch.
MAY_IMPORT_OUTSIDE: dict[str, set[str]] = {
    "errors": set(),
    "params": set(),
    "outputs": set(),
    "config": {"numpy"},
    "native": {"jax", "numpy"},
    "pallas_kernels": {"jax", "numpy"},
    "sampling": {"jax", "numpy"},
    "kv_cache": {"numpy"},
    "scheduler": {"numpy"},
}


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, module: str, *, is_package: bool) -> Iterator[str]:
    """Dotted names that a module imports anywhere in its text. `from a import b` gives a.b, whether b is a module or a name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")
                above = above[: len(above) - node.level + is_package]
                base = ".".join([*above, base] if base else above)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0].value
            if called in ("import_module", "__import__") and isinstance(name, str) and not name.startswith("."):
                yield name


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def import_graph() -> dict[str, set[str]]:
    """Module of pjax -> what it imports: modules of pjax by their full name, anything else by its top-level name."""
    files = {module_name(path, ROOT): path for path in python_files("pjax")}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        graph[module] = set()
        for name in imports_of(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py"):
            if name.split(".")[0] != "pjax":
                graph[module].add(name.split(".")[0])
                continue
            while name not in files and name != "pjax.__version__":  # a name inside a module; "pjax" itself always is a module
                name = name.rpartition(".")[0]
            graph[module].add(name)
    return graph


def is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of some cycle in the order of import, or an empty list."""
    finished: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in finished:
            return []
        for target in sorted(graph.get(module, ())):
            if cycle := visit(target, [*path, module]):
                return cycle
        finished.add(module)
        return []

    return next((cycle for module in sorted(graph) if (cycle := visit(module, []))), [])


def run_python(code: str, *, cwd: Path, path: list[Path]) -> dict[str, object]:
    """What `code` prints as JSON, in a fresh interpreter with `path` first on sys.path."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert isinstance(result, dict)
    return result


def loaded_after(statement: str, cwd: Path) -> set[str]:
    """Top-level packages, and modules of pjax, that one statement loads."""
    code = f"{statement}\nimport sys, json\nprint(json.dumps({{name: 1 for name in sys.modules}}))"
    names = run_python(code, cwd=cwd, path=[ROOT])
    return {name if name.startswith("pjax") else name.split(".")[0] for name in names}


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import a.b
from typing import TYPE_CHECKING
from . import sibling
from ..up import thing
if TYPE_CHECKING:
    from c import d
def f():
    import e
    importlib.import_module("g.h")
"""
    expected = {"a.b", "typing.TYPE_CHECKING", "pjax.x.sibling", "pjax.up.thing", "c.d", "e", "g.h"}
    assert set(imports_of(source, "pjax.x.y", is_package=False)) == expected
    assert set(imports_of("from . import z", "pjax.x", is_package=True)) == {"pjax.x.z"}


def test_a_cycle_is_found() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_every_part_of_the_house_has_its_place() -> None:
    parts = {module.split(".")[1] for module in import_graph() if module != "pjax"}
    assert parts <= set(MAY_IMPORT), "give the new part a line in MAY_IMPORT"


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_go_downwards(part: str) -> None:
    allowed = {f"pjax.{name}" for name in {part, *MAY_IMPORT[part]}}
    if MAY_IMPORT[part]:
        allowed.add("pjax.__version__")
    wrong = [
        f"{module} imports {target}"
        for module, targets in import_graph().items()
        if is_inside(module, f"pjax.{part}")
        for target in sorted(targets)
        if is_inside(target, "pjax") and not any(is_inside(target, name) for name in allowed)
    ]
    assert not wrong


@pytest.mark.parametrize("part", MAY_IMPORT_OUTSIDE)
def test_lower_parts_import_few_libraries(part: str) -> None:
    allowed = MAY_IMPORT_OUTSIDE[part] | sys.stdlib_module_names | {"pjax"}
    wrong = [
        f"{module} imports {target}"
        for module, targets in import_graph().items()
        if is_inside(module, f"pjax.{part}")
        for target in sorted(targets)
        if target.split(".")[0] not in allowed
    ]
    assert not wrong


def test_the_table_itself_has_no_way_up() -> None:
    assert find_cycle({part: {name.split(".")[0] for name in below} for part, below in MAY_IMPORT.items()}) == []


def test_there_are_no_import_cycles() -> None:
    assert find_cycle(import_graph()) == []


def test_nothing_imports_torch() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in python_files("pjax", "scripts")
        if path.name != "verify.py"
        for name in imports_of(path.read_text(encoding="utf-8"), module_name(path, ROOT), is_package=path.name == "__init__.py")
        if name.split(".")[0] == "torch" and path.name != "verify.py"
    ]
    assert not wrong


def test_importing_pjax_loads_no_library(tmp_path: Path) -> None:
    loaded = loaded_after("import pjax", tmp_path)
    assert "pjax" in loaded
    assert not loaded & {"jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers"}


def test_importing_the_kernels_loads_only_jax(tmp_path: Path) -> None:
    loaded = loaded_after("import pjax.pallas_kernels", tmp_path)
    assert "jax" in loaded
    assert not loaded & {"flax", "transformers", "tokenizers", "gguf", "torch", "fastapi"}
    assert {name for name in loaded if name.startswith("pjax") and not is_inside(name, "pjax.pallas_kernels")} == {"pjax", "pjax.native"}


def test_every_export_is_where_the_package_says() -> None:
    import pjax

    for name in pjax.__all__:
        assert getattr(pjax, name) is not None
    with pytest.raises(AttributeError, match="'pjax' has no attribute 'LLMM'"):
        _ = pjax.LLMM
    assert pjax.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.mark.parametrize("shape", ["module", "package"])
def test_a_models_module_of_the_user_does_not_meet_ours(tmp_path: Path, shape: str) -> None:
    local = tmp_path / ("models.py" if shape == "module" else "models/__init__.py")
    local.parent.mkdir(exist_ok=True)
    local.write_text("WHOSE = 'mine'\n")
    code = """
import json, sys
assert sys.path[0] == ""
import models, pjax, pjax.models
print(json.dumps([models.__file__, models.WHOSE, pjax.__file__, pjax.models.__file__]).join(('{"files": ', "}")))
"""
    result = run_python(code, cwd=tmp_path, path=[tmp_path, ROOT])
    assert result["files"] == [str(local), "mine", str(PACKAGE / "__init__.py"), str(PACKAGE / "models" / "__init__.py")]


def test_only_pjax_is_installed() -> None:
    include = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {module_name(path, ROOT) for path in ROOT.glob("*/__init__.py")}
    assert {"pjax", "models", "pallas_kernels"} <= packages, "the links at the root are part of the layout"
    assert {name for name in packages if any(fnmatch.fnmatch(name, pattern) for pattern in include)} == {"pjax"}
    for distribution in importlib.metadata.distributions(name="pjax"):
        assert (distribution.read_text("top_level.txt") or "").split() == ["pjax"]


def test_links_at_the_root_lead_into_the_package() -> None:
    for name in ("models", "pallas_kernels"):
        assert (ROOT / name).resolve() == PACKAGE / name


def test_steps_on_disk_are_keyed_by_all_code_that_they_follow_from() -> None:
    """What a step imports beside `STEP_PARTS` imports no JAX itself, so nothing of it is traced (hosts.codec packs arrays)."""
    from pjax.runner.executables import STEP_PARTS

    graph, found, left = import_graph(), set[str](), ["pjax.runner.runner"]
    while left:
        module = left.pop()
        if module in graph and module not in found:
            found.add(module)
            left += graph[module]
    keyed = tuple(f"pjax.{part.removesuffix('.py')}" for part in STEP_PARTS)
    rest = {module for module in found if not any(is_inside(module, part) for part in keyed)} - {"pjax.hosts.codec"}
    assert "pjax.scheduler.plan" in rest
    assert not {module for module in rest if graph[module] & {"jax", "flax"}}


def test_choices_of_settings_are_those_of_the_parts_that_they_are_for() -> None:
    """`config` imports nothing heavy, so it repeats them."""
    from pjax import config
    from pjax.kv_cache import swap_space
    from pjax.pallas_kernels.paged_attention import api

    assert config.ATTENTION_BACKENDS == api.BACKENDS
    assert config.PREEMPTION_MODES == swap_space.MODES


def test_no_docstring_begins_with_of() -> None:
    """Docstrings, of fields and constants too, name their subject first."""
    found = []
    for path in python_files("pjax", "tests", "benchmarks", "scripts", "examples"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and str(node.value.value).startswith("Of "):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found
