"""The page's files and what it draws; tests/page has the page itself in a browser."""

from __future__ import annotations

import base64
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import numpy as np

from pjax.server.page import FOLDER, page_bytes
from tests.server.common import MODEL, Running, ScriptedLLM, idle, start, wait_for


def pages_of(state: dict[str, Any]) -> list[int]:
    return list(zlib.decompress(base64.b64decode(state["pages"])))


def test_the_page_and_its_files_come_from_here_alone(client: httpx2.Client) -> None:
    response = client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    named = re.findall(r'(?:src|href)="([^"#]+)"', response.text)
    assert sorted(named) == sorted(f"static/{path.name}" for path in FOLDER.iterdir() if path.name != "index.html")
    for name in named:
        file = client.get(f"/{name}")
        assert file.status_code == 200
        assert not re.findall(r"(?:https?:)?//[a-z]+\.", file.text.replace("http://www.w3.org/2000/svg", "")), name
    for name in ("../app.py", "..%2fapp.py", "nothing.js"):
        assert client.get(f"/static/{name}").status_code == 404


def test_the_state_tells_each_page(server: Running, client: httpx2.Client) -> None:
    body = {"model": MODEL, "prompt": list(range(40)), "max_tokens": 80, "n": 3, "temperature": 1, "ignore_eos": True}
    wait_for(lambda: idle(server.url))
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(httpx2.post, f"{server.url}/v1/completions", json=body, timeout=120)
        states = []
        while not asked.done():
            states.append(client.get("/engine/state").json())
    assert asked.result().status_code == 200
    shared = [np.array(pages_of(state)) for state in states if state["shared"]]
    assert 2 in [(owners == 3).sum() for owners in shared], "the prompt's two full pages belong to all samples"
    assert {len(owners) for owners in shared} == {state["num_pages"] for state in states} == {64}
    assert states[0]["model"] == MODEL
    wait_for(lambda: idle(server.url))
    state = client.get("/engine/state").json()
    owners = np.array(pages_of(state))
    assert set(owners) <= {0, 255}
    assert (owners == 255).sum() == state["cached"] >= 2
    assert state["running"] == state["waiting"] == state["used"] == 0


def test_owners_and_cached_pages_share_a_byte(server: Running) -> None:
    class Stats:
        page_owners = np.array([0, 0, 1, 254, 255], np.uint8)
        page_cached = np.array([False, True, True, False, True])

    found = page_bytes(Stats())  # type: ignore[arg-type]
    assert (found.dtype, found.tolist()) == (np.uint8, [0, 255, 1, 254, 254])


def test_a_key_guards_the_state_but_not_the_page(tmp_path: Any) -> None:
    with start(ScriptedLLM(tmp_path / "m"), api_keys="sesame") as running:
        assert httpx2.get(f"{running.url}/").status_code == 200
        assert httpx2.get(f"{running.url}/static/page.js").status_code == 200
        assert httpx2.get(f"{running.url}/engine/state").status_code == 401
        allowed = httpx2.get(f"{running.url}/engine/state", headers={"Authorization": "Bearer sesame"})
        assert pages_of(allowed.json()) == [0]
