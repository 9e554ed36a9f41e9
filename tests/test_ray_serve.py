"""Settings of the Ray deployment and the manifests in deploy/, without Ray; tests/ray has the cluster."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from pjax.cli.flags import field_docs
from pjax.errors import ConfigError
from pjax.ray_serve import NAME, RayConfig, read
from tests.test_house import loaded_after

ROOT = Path(__file__).resolve().parents[1]
MANIFESTS = sorted((ROOT / "deploy").glob("kuberay-*.yaml"))


@pytest.mark.parametrize("lazy", [True, "true"])
@pytest.mark.parametrize("rows", [8, "8"])
def test_arguments_are_the_servers_flags_as_text_or_as_values(lazy: Any, rows: Any) -> None:
    given = {"model": "/m", "lazy": lazy, "max-num-seqs": rows, "kv_cache_memory": "2GiB", "api_key": ["a", "b"], "num_replicas": rows}
    ray, server = read({**given, "enable_prefix_caching": False, "served_model_name": "m", "chat_template": "{{ a }}\n{# b: c #}"})
    engine = server.engine
    assert (server.model, engine.lazy, engine.max_num_seqs, engine.kv_cache_memory) == ("/m", True, 8, 2 << 30)
    assert (server.api_keys, engine.enable_prefix_caching, ray.num_replicas) == (("a", "b"), False, 8)
    assert (server.model_names, server.chat_template) == (("m",), "{{ a }}\n{# b: c #}")


def test_the_environment_wins_over_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PJAX_API_KEY", "hidden")
    monkeypatch.setenv("PJAX_MAX_NUM_SEQS", "")
    _, server = read({"model": "/m", "max_num_seqs": 4})
    assert server.api_keys == ("hidden",) and server.engine.max_num_seqs == 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"modle": "x"}, "unrecognized arguments: --modle=x"),
        ({"port": 80}, "unrecognized arguments: --port=80"),
        ({"max_num_seqs": "many"}, "'many' is no size"),
        ({"max_num_seqs": -1}, "max_num_seqs is -1, but must be an integer >= 1"),
        ({"lazy": "perhaps"}, "lazy"),
        ({"model": Path("/m")}, "a setting is neither text, number, truth value nor a list of them"),
        ({"num_replicas": 0}, "num_replicas is 0, but must be an integer >= 1"),
        ({"num_replicas": 2, "max_replicas": 4}, "num_replicas is 2, but min_replicas or max_replicas is given too"),
        ({"min_replicas": 2}, "min_replicas is 2, but must be at most max_replicas, 1"),
        ({"target_ongoing_requests": 300}, "target_ongoing_requests is 300.0, but must be in (0, max_ongoing_requests], and that is 256"),
        ({"target_ongoing_requests": 0}, "target_ongoing_requests is 0.0, but must be in (0,"),
        ({"upscale_delay": -1}, "upscale_delay is -1.0, but must be a number >= 0"),
        ({"num_tpus": 3}, "num_tpus is 3, but must be 0, 1, 2, 4 or 8"),
        ({"num_gpus": 1, "num_tpus": 1}, "num_gpus is 1 and num_tpus is 1"),
        ({"num_gpus": 1, "tensor_parallel_size": 2}, "tensor_parallel_size is 2, but a replica has 1 devices"),
    ],
)
def test_what_is_wrong_is_told_before_anything_starts(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read({"model": "/m", **wrong})
    assert message in str(caught.value)


def test_half_a_gpu_is_a_device() -> None:
    assert read({"model": "/m", "num_gpus": 0.5})[0].options(30)["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 0.5}


def test_what_ray_is_told() -> None:
    fixed = RayConfig(num_replicas=2, num_tpus=4, accelerator_type="TPU-V6E").options(30)
    assert fixed["num_replicas"] == 2 and "autoscaling_config" not in fixed
    expected = {"num_cpus": 1.0, "num_gpus": 0.0, "resources": {"TPU": 4}, "accelerator_type": "TPU-V6E"}
    assert fixed["ray_actor_options"] == expected and fixed["graceful_shutdown_timeout_s"] == 40
    scaled = RayConfig(max_replicas=3, target_ongoing_requests=5).options(0)
    assert scaled["autoscaling_config"] == {
        "min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 5, "upscale_delay_s": 30.0, "downscale_delay_s": 600.0,
    }  # fmt: skip
    assert "num_replicas" not in scaled


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifests_ask_for_what_their_replicas_use(path: Path) -> None:
    service = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert service["kind"] == "RayService"
    [application] = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert application["import_path"] == "pjax.ray_serve:build_app"
    assert {one["name"] for one in application["deployments"]} == {NAME}
    ray, server = read(application["args"])
    [group] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert limits == container["resources"]["requests"]
    assert int(limits.get("nvidia.com/gpu", 0)) == ray.num_gpus and int(limits.get("google.com/tpu", 0)) == ray.num_tpus
    assert ray.num_gpus + ray.num_tpus == server.engine.tensor_parallel_size
    assert ray.num_cpus <= int(limits["cpu"]) and group["maxReplicas"] == ray.max_replicas
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > server.drain_seconds


def test_both_kinds_of_manifests_are_there() -> None:
    assert [path.name for path in MANIFESTS] == ["kuberay-gpu.yaml", "kuberay-tpu.yaml"]


def test_the_document_tells_every_setting_of_ray() -> None:
    text = (ROOT / "docs" / "ray.md").read_text(encoding="utf-8")
    for item in fields(RayConfig):
        default = "" if item.default is None else f"{item.default:g}"
        assert f"| `{item.name}` | {default} | {field_docs(RayConfig)[item.name]} |" in text


def test_importing_the_deployment_loads_neither_ray_nor_jax(tmp_path: Path) -> None:
    assert not loaded_after("import pjax.ray_serve", tmp_path) & {"ray", "jax", "fastapi"}
