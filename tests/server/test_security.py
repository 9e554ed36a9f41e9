"""Who may ask, and what a request can't do."""

from __future__ import annotations

import socket
import ssl
import subprocess
import time
from pathlib import Path

import httpx2
import pytest

from pjax import ConfigError
from pjax.server import ServerConfig
from tests.server.common import Running, ScriptedLLM, start

KEYS = ("first-key", "second-key")
OPEN = ("/health", "/ready", "/version", "/metrics")
GUARDED = ("/v1/models", "/v1/nothing", "/openapi.json", "/engine/state", "/tokenize")


def test_keys(tmp_path: Path) -> None:
    with start(ScriptedLLM(tmp_path, "x"), api_keys=KEYS, root_path="/proxy") as server:

        def status(path: str, key: str | None) -> int:
            headers = {} if key is None else {"Authorization": key}
            return httpx2.get(server.url + path, headers=headers).status_code

        for path in OPEN:
            assert status(path, None) == 200
        for path in (*GUARDED, "/proxy/v1/models", "/v1/../v1/models", "//v1/models", "/%76%31/models"):
            for key in (None, "", "Bearer", "Bearer wrong", "Basic first-key", "first-key", "Bearer first-key2", "Bearer first"):
                assert status(path, key) == 401, (path, key)
        for key in KEYS:
            assert status("/v1/models", f"Bearer {key}") == status("/v1/models", f"bearer {key}") == 200
        refused = httpx2.post(f"{server.url}/v1/completions", json={"prompt": "a"})
        assert refused.json()["error"]["code"] == "invalid_api_key" and refused.headers["www-authenticate"] == "Bearer"
        assert server.llm.prompts == []
        assert not any(key in refused.text for key in KEYS)


def test_keys_are_no_part_of_what_a_config_shows() -> None:
    assert "first-key" not in repr(ServerConfig(model="m", api_keys=KEYS))
    with pytest.raises(ConfigError, match=r"api_keys\[1\] is empty or holds") as caught:
        ServerConfig(model="m", api_keys=("a", "b c"))
    assert "b c" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"port": 70000},
        {"max_n": 0},
        {"max_waiting": True},
        {"request_timeout": 0},
        {"request_timeout": float("nan")},
        {"drain_seconds": -1},
        {"tool_parser": "x"},
        {"log_format": "xml"},
        {"model": ""},
        {"allowed_origins": "example.org"},
        {"ssl_certfile": "/nowhere.pem"},
        {"served_model_name": [""]},
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(settings: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ServerConfig(**{"model": "m"} | settings)


def test_bodies_have_a_size(tmp_path: Path) -> None:
    with start(ScriptedLLM(tmp_path, "x"), max_body_bytes=1000) as server:
        for content in ('{"prompt": "' + "a" * 2000 + '"}', iter([b'{"prompt": "'] + [b"a" * 100] * 20)):
            response = httpx2.post(f"{server.url}/v1/completions", content=content, headers={"content-type": "application/json"})
            assert response.status_code == 413 and response.json()["error"]["message"] == "the body is too large"
        assert httpx2.post(f"{server.url}/v1/completions", json={"prompt": "a"}).status_code == 200


def test_a_body_must_come_in_time(tmp_path: Path) -> None:
    with start(ScriptedLLM(tmp_path, "x"), body_timeout=0.2) as server, socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(30)
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_other_origins_are_refused_unless_named(tmp_path: Path) -> None:
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with start(ScriptedLLM(tmp_path, "x")) as server:
        response = httpx2.options(f"{server.url}/v1/completions", headers=ask)
        assert response.status_code == 405 and "access-control-allow-origin" not in response.headers
    with start(ScriptedLLM(tmp_path, "x"), allowed_origins=["https://a.example"], api_keys=["k"]) as server:
        response = httpx2.options(f"{server.url}/v1/completions", headers=ask)
        assert response.status_code == 200 and response.headers["access-control-allow-origin"] == "https://a.example"
        assert httpx2.options(f"{server.url}/v1/completions", headers=ask | {"Origin": "https://b.example"}).status_code == 400


def test_tls(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        + ["-keyout", key, "-out", cert, "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True,
        capture_output=True,
    )
    with start(ScriptedLLM(tmp_path, "x"), ssl_certfile=str(cert), ssl_keyfile=str(key)) as server:
        context = ssl.create_default_context(cafile=str(cert))
        assert server.url.startswith("https://")
        assert httpx2.get(f"{server.url}/health", verify=context).status_code == 200
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{server.url}/health")


def test_request_ids(server: Running) -> None:
    def answered(given: str) -> str:
        return httpx2.get(f"{server.url}/version", headers={"X-Request-Id": given}).headers["x-request-id"]

    assert answered("my-id.1:2") == "my-id.1:2"
    for odd in ("", "a b", "x" * 200, "a;b"):
        assert answered(odd) != odd and len(answered(odd)) == 32
    assert httpx2.get(f"{server.url}/version").headers["x-content-type-options"] == "nosniff"


def test_a_client_that_does_not_read_is_cut_off(tmp_path: Path) -> None:
    llm = ScriptedLLM(tmp_path, "x" * 4000)
    with start(llm, send_timeout=0.3) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        body = b'{"prompt": "a", "stream": true, "return_token_ids": true, "user": "' + b"u" * 200 + b'"}'
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        connection.sendall(head % len(body) + body)
        until = time.monotonic() + 60
        while not llm.prompts or llm.num_open:
            assert time.monotonic() < until, "its request was never given up"
            time.sleep(0.02)
