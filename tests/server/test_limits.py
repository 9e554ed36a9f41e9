"""What one client's largest or worst body costs the others: bounded errors, bounded text, and a loop that goes on."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pydantic
import pytest
from pydantic import ValidationError

from pjax import AsyncLLM, QueueFullError
from pjax.server import bodies, schemas
from pjax.server.bodies import check_size, parse
from pjax.server.errors import ApiError
from pjax.server.logs import JsonFormatter, TextFormatter
from pjax.server.templates import Renderer
from tests.server.common import OPTIONS, ScriptedLLM, start, wait_for
from tests.server.test_errors import error_of

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LIMIT = 4 << 20
MODELS = [schemas.CompletionRequest, schemas.ChatRequest, schemas.TokenizeText, schemas.TokenizeChat, schemas.DetokenizeRequest]
MESSAGES = [{"role": "user", "content": "a"}]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def hostile(size: int) -> Iterator[tuple[type[pydantic.BaseModel], dict[str, Any]]]:
    """Bodies of about so many values, of which each makes an error where nothing bounds them."""
    for value in ([], {}, "", None, 1.5, -1, [[]], [1, "a"], {"a": []}):
        many = [value] * size
        for name in ("prompt", "stop", "stop_token_ids", "allowed_token_ids", "bad_words"):
            yield schemas.CompletionRequest, {"prompt": "a"} | {name: many}
        for name in ("messages", "tools", "documents"):
            yield schemas.ChatRequest, {"messages": MESSAGES} | {name: many}
        yield schemas.ChatRequest, {"messages": [{"role": "user", "content": many}]}
        yield schemas.ChatRequest, {"messages": [{"role": "user", "tool_calls": many}]}
        yield schemas.DetokenizeRequest, {"tokens": many}
        yield schemas.CompletionRequest, {"prompt": "a", "logit_bias": {str(i): value for i in range(size)}}
        yield schemas.ChatRequest, {"messages": MESSAGES, "metadata": {str(i): value for i in range(size)}}
    yield schemas.CompletionRequest, {f"x{i}": 1 for i in range(size)}
    yield schemas.ChatRequest, {"messages": [{f"x{i}": 1 for i in range(size)}] * 2}
    yield schemas.CompletionRequest, {"prompt": "a", "logit_bias": {f"x{i}": "y" for i in range(size)}}


def refusal(model: type[pydantic.BaseModel], body: dict[str, Any]) -> tuple[str, str | None]:
    """(message, param) of a refused body; the message of one that is fine is empty."""
    try:
        parse(json.dumps(body).encode(), "application/json", (model,), LIMIT)
    except ApiError as error:
        return error.message, error.param
    return "", None


def test_the_number_of_errors_does_not_grow_with_the_body() -> None:
    def num_errors(model: type[pydantic.BaseModel], body: dict[str, Any]) -> int:
        try:
            model.model_validate(body)
        except ValidationError as error:
            return error.error_count()
        return 0

    counts = [num_errors(*case) for case in hostile(20_000)]
    assert max(counts) <= 8 and sum(count > 0 for count in counts) > 80
    for model, body in hostile(2000):
        message, param = refusal(model, body)
        assert len(message) < 400 and (param in body or not message or "is missing" in message)


def test_every_list_of_a_request_ends_at_its_first_error() -> None:
    """So does one of a field that is added later."""
    seen = 0

    def walk(schema: Any) -> None:
        nonlocal seen
        if isinstance(schema, dict):
            if schema.get("type") == "list":
                assert schema.get("fail_fast") is True, schema
                seen += 1
            for value in schema.values():
                walk(value)
        elif isinstance(schema, list | tuple):
            for value in schema:
                walk(value)

    for model in MODELS:
        walk(model.__pydantic_core_schema__)
    assert seen > 20


def test_values_of_a_body_are_bounded_before_they_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("it was parsed")

    monkeypatch.setattr(bodies.json, "loads", never)
    for content in ("[]", "{}", "1", '""', "[1]", '{"a":1}'):
        raw = b'{"prompt": [' + ",".join([content] * ((LIMIT - 20) // (len(content) + 1))).encode() + b"]}"
        with pytest.raises(ApiError, match="JSON values, or more than 65536 lists and objects") as caught:
            parse(raw, "application/json", (schemas.CompletionRequest,), LIMIT)
        assert caught.value.status == 400


@pytest.mark.parametrize("text", [",[{" * 1_000_000, '"[,' * 700_000, "\\\\" * 900_000 + '"{', "ü[" * 900_000], ids=lambda text: text[:6])
def test_a_text_of_any_content_is_one_value(text: str) -> None:
    check_size(json.dumps({"prompt": text}).encode(), LIMIT)
    check_size(json.dumps({"prompt": list(range(100_000))}).encode(), LIMIT)


@contextmanager
def health_is_answered(url: str, while_: Callable[[], bool]) -> Iterator[list[float]]:
    """Asks /health again and again while something goes on; the seconds of each answer."""
    seconds: list[float] = []
    ended = threading.Event()

    def ask() -> None:
        with httpx2.Client(base_url=url, timeout=60) as client:
            while not ended.is_set() or not seconds:
                begun = time.monotonic()
                assert client.get("/health").status_code == 200
                seconds.append(time.monotonic() - begun)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield seconds
    finally:
        ended.set()
        thread.join(60)
    assert not thread.is_alive()


def worst_bodies() -> Iterator[tuple[str, bytes]]:
    """4 MB each."""
    yield COMPLETIONS, b'{"prompt": [' + b"[]," * 1_300_000 + b"[]]}"
    yield COMPLETIONS, b'{"prompt": [' + b"[1]," * 60_000 + b'"a"' + b" " * 3_700_000 + b"]}"
    yield COMPLETIONS, json.dumps({"prompt": "a", "stop": ["x"] * 800_000}).encode()
    yield CHAT, json.dumps({"messages": [{"role": "user"}] * 150_000}).encode()
    yield CHAT, json.dumps({"messages": [{"role": "user", "content": "ab " * 1_300_000}]}).encode()
    yield "/tokenize", json.dumps({"prompt": "ab " * 1_300_000}).encode()
    yield "/tokenize", json.dumps({"prompt": "x" * 3_900_000}).encode()
    yield "/detokenize", json.dumps({"tokens": [7] * 250_000}).encode()
    yield COMPLETIONS, json.dumps({"prompt": "ab " * 1_300_000, "truncate_prompt_tokens": 5, "max_tokens": 1}).encode()


def test_health_is_answered_while_the_largest_bodies_are(tmp_path: Path) -> None:
    """Each of them must end with an answer that is no 5xx, and /health has answers meanwhile."""
    with start(ScriptedLLM(tmp_path, "x"), max_body_bytes=LIMIT) as server, httpx2.Client(base_url=server.url, timeout=120) as client:
        for path, content in worst_bodies():
            with health_is_answered(server.url, lambda: True) as seconds:
                response = client.post(path, content=content, headers={"content-type": "application/json"})
            assert response.status_code in (200, 400), (path, content[:60], response.text[:200])
            assert seconds and max(seconds) < 20, "the loop stood still"  # each stalled for 7 to 100 seconds


def test_a_text_that_cannot_fit_is_refused_from_its_length(tmp_path: Path) -> None:
    llm = ScriptedLLM(tmp_path, "x")
    most = llm.engine.max_model_len * llm.engine.tokenizer.longest_token
    asked: list[int] = []
    encode = llm.engine.tokenizer.encode
    llm.engine.tokenizer.encode = lambda text, *more: asked.append(len(text)) or encode(text, *more)
    with start(llm) as server:
        for path, body, param in (
            (COMPLETIONS, {"prompt": "a" * (most + 1)}, "prompt"),
            (COMPLETIONS, {"prompt": ["a", "a" * (most + 1)]}, "prompt"),
            ("/tokenize", {"prompt": "a" * (most + 1)}, "prompt"),
            (CHAT, {"messages": [{"role": "user", "content": "a" * (most + 1)}]}, "messages"),
        ):
            error = error_of(httpx2.post(server.url + path, json=body, timeout=60))
            assert (error["param"], error["code"]) == (param, "context_length_exceeded")
        assert asked == []
        assert error_of(httpx2.post(server.url + COMPLETIONS, json={"prompt": "a" * most}, timeout=60))["message"].startswith("prompt has ")
        assert asked == [most]
        cut = httpx2.post(server.url + COMPLETIONS, json={"prompt": "a" * (most + 1), "truncate_prompt_tokens": 3}, timeout=60)
        assert cut.status_code == 200 and llm.prompts[-1] == "aaa"


def test_long_texts_have_the_tokens_that_short_ones_have(tmp_path: Path) -> None:
    tokenizer = ScriptedLLM(tmp_path).engine.tokenizer
    text = "San Francisco is a 😀 é\n" * 400
    assert len(text) > 4096
    assert tokenizer.encode(text) == list(tokenizer.backend.encode(text).ids)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == tokenizer.backend.decode(ids)


def test_who_cannot_be_queued_is_told_before_work_is_done(tmp_path: Path) -> None:
    llm = ScriptedLLM(tmp_path, "x")

    def full(num_more: int = 0) -> None:
        raise QueueFullError("9 requests wait already")

    def never(*_: Any) -> None:
        raise AssertionError("its text became tokens")

    with start(llm) as server:
        llm.check_room, llm.engine.tokenizer.encode = full, never  # type: ignore[method-assign]
        for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": MESSAGES}), ("/tokenize", {"prompt": "a"})):
            assert error_of(httpx2.post(server.url + path, json=body), 429)["code"] == "rate_limit_exceeded"


def test_endless_templates_stop_neither_the_server_nor_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pjax.server.templates.SECONDS", 3600.0)
    monkeypatch.setattr(Renderer.__init__, "__defaults__", (3600.0,))
    llm = ScriptedLLM(tmp_path, "x", template=ENDLESS)
    answers: list[int] = []
    with start(llm, drain_seconds=0.2) as server:

        def chat() -> None:
            answers.append(httpx2.post(server.url + CHAT, json={"messages": MESSAGES}, timeout=120).status_code)

        threads = [threading.Thread(target=chat) for _ in range(6)]
        for thread in threads:
            thread.start()
        bridge = server.server._bridge
        wait_for(lambda: bridge._num_preparing == 6)
        assert httpx2.get(f"{server.url}/health").status_code == 200
        assert httpx2.post(server.url + COMPLETIONS, json={"prompt": "a"}).status_code == 200
        assert httpx2.post(f"{server.url}/tokenize", json={"prompt": "a"}).status_code == 200
        server.stop()
        for thread in threads:
            thread.join(60)
    assert answers == [503] * 6


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (ENDLESS, "it takes more than 0.5 seconds"),
        ("{{ 'a' * 10**11 }}", "MemoryError"),
        ("{{ 'a'|center(10**11) }}", "MemoryError"),
        ("{{ '%099999999999d' % 1 }}", "Error"),
        ("{{ lipsum(n=10**5) }}", "'lipsum' is undefined"),
    ],
)
def test_what_a_template_takes_is_bounded(tmp_path: Path, template: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Renderer.__init__, "__defaults__", (0.5 if template == ENDLESS else 60.0,))
    with start(ScriptedLLM(tmp_path, "x", template=template)) as server:
        for _ in range(3):  # a worker that has ended is replaced
            error = error_of(httpx2.post(server.url + CHAT, json={"messages": MESSAGES}, timeout=120))
            assert error["param"] == "messages" and told in error["message"] and "the chat template refuses" in error["message"]


def test_variables_of_a_template_may_have_any_name(tmp_path: Path) -> None:
    with start(ScriptedLLM(tmp_path, "x", template="{{ x }}{{ self and 1 }}")) as server:
        body = {"messages": MESSAGES, "chat_template_kwargs": {"self": 1, "x": "<>", "render": 2, "context": 3, "names": 4, "template": 5}}
        assert httpx2.post(server.url + CHAT, json=body, timeout=60).status_code == 200
        assert server.llm.prompts == ["<>1"]


def test_a_worker_does_not_get_the_servers_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PJAX_API_KEY", "sesame")
    renderer = Renderer()
    renderer.start()
    wait_for(lambda: bool(renderer._workers))
    [worker] = renderer._workers
    try:
        environment = Path(f"/proc/{worker._process.pid}/environ").read_bytes()
        assert b"PATH" in environment and b"sesame" not in environment
    finally:
        renderer.close()
    assert worker._process.returncode is not None


def test_connections_that_never_complete_their_headers_are_closed(tmp_path: Path) -> None:
    starts = [b"", b"G", b"GET /health HTTP/1.1\r\n", b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 500]
    with start(ScriptedLLM(tmp_path, "x"), header_timeout=0.5) as server:
        stuck = []
        for index in range(200):
            connection = socket.create_connection(("127.0.0.1", server.port))
            connection.sendall(starts[index % 4])
            stuck.append(connection)
        assert httpx2.get(f"{server.url}/health", timeout=60).status_code == 200
        trickling = stuck[1]
        for connection in stuck:
            connection.settimeout(60)
            try:
                while connection is trickling:  # more bytes do not prolong it
                    connection.sendall(b"E")
                    time.sleep(0.05)
                assert connection.recv(100) == b""
            except (ConnectionResetError, BrokenPipeError):
                pass
            connection.close()
        wait_for(lambda: not server.server.server_state.connections)


def test_a_connection_between_requests_is_kept_and_one_that_leaves_a_body_unread_is_not(tmp_path: Path) -> None:
    llm = ScriptedLLM(tmp_path, "x" * 30, pause=0.05)
    with start(llm, header_timeout=0.3) as server, httpx2.Client(base_url=server.url, timeout=60) as client:
        for _ in range(2):  # a request and its answer take longer than the headers may
            assert client.post(COMPLETIONS, json={"prompt": "a"}).status_code == 200
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.settimeout(60)
            connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
            said = connection.recv(1000)
            assert said.startswith(b"HTTP/1.1 200")
            connection.sendall(b"{")
            while more := connection.recv(1000):
                said += more


def test_a_stream_begins_when_its_request_is_queued_and_tells_that_it_waits(folder: Path) -> None:
    """The engine makes no token until the client has seen that the stream has begun."""
    llm = AsyncLLM(folder, **OPTIONS)
    may_run = threading.Event()
    step = llm.engine.step
    llm.engine.step = lambda: may_run.wait(60) and step()  # type: ignore[method-assign,return-value]
    body = {"prompt": "a", "max_tokens": 2, "stream": True}
    with (
        start(llm, folder, keep_alive_seconds=0.1) as server,
        httpx2.stream("POST", server.url + COMPLETIONS, json=body, timeout=60) as response,
    ):
        assert response.status_code == 200
        lines = response.iter_lines()
        assert next(line for line in lines if line) == ": keep-alive"
        may_run.set()
        assert [line for line in lines if line.startswith("data: ")][-1] == "data: [DONE]"


FORGED = "/x\n12:00:00 INFO pjax.server: forged\r\x1b[2J\x85\u2028\u202eend"


@pytest.mark.parametrize("form", [TextFormatter, JsonFormatter])
def test_no_client_writes_a_line_of_the_log(tmp_path: Path, form: type[logging.Formatter], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pjax.server"), start(ScriptedLLM(tmp_path, "x")) as server:
        for path in ("/x%0a12:00:00%20INFO%20pjax.server:%20forged%0d%1b%5b2J%c2%85", "/v1/models/%0aforged%20%e2%80%ae"):
            assert httpx2.get(server.url + path).status_code == 404
        httpx2.post(server.url + COMPLETIONS, json={"prompt": "a", "user": FORGED}).raise_for_status()
        server.stop()
    records = [record for record in caplog.records if record.name == "pjax.server"]
    assert sum("forged" in form().format(record) for record in records) == 3
    for record in records:
        line = form().format(record)
        assert line.isascii() and line.isprintable()


def test_a_message_of_several_lines_begins_no_entry() -> None:
    record = logging.LogRecord("pjax", logging.ERROR, "", 0, "it says %s", (FORGED,), None)
    first, *rest = TextFormatter().format(record).splitlines()
    assert "it says /x" in first and rest and all(line.startswith("    ") for line in rest)
    assert "\x1b" not in "".join(rest) and json.loads(JsonFormatter().format(record))["message"] == f"it says {FORGED}"


WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    (COMPLETIONS, {"prompt": "a", "stop": ["x"] * 65}, "stop", "at most 64 items"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"1": 1, "01": 2}}, "logit_bias", "twice"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024"),
    (COMPLETIONS, {"prompt": "a", "bad_words": ["x"] * 257}, "bad_words", "at most 256 items"),
    (COMPLETIONS, {"prompt": ["a", 1]}, "prompt", "prompt must be a text, token ids, or a list of either"),
    (COMPLETIONS, {"prompt": [[1], [-1]]}, "prompt", "prompt.1.0 is -1"),
    (COMPLETIONS, {"prompt": "a", "x" * 300: 1}, "x" * 100, "is no field"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "UTF-8"),
    (CHAT, {"messages": [{"role": "user", "content": "a", "x": 1}]}, "messages", "messages.0.x is no field"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages", "messages.0.content.0.text is missing"),
    (CHAT, {"messages": MESSAGES, "max_completion_tokens": 10**6}, "max_completion_tokens", "max_tokens"),
    ("/tokenize", {"prompt": 3}, "prompt", "prompt is 3"),
    ("/tokenize", {"messages": 3}, "messages", "messages is 3"),
    ("/tokenize", {"messages": MESSAGES, "foo": 3}, "foo", "foo is no field"),
    ("/tokenize", {}, "prompt", "prompt is missing"),
    ("/detokenize", {"tokens": [1, 10**6]}, "tokens", "at 1"),
]


def test_param_names_the_field_that_was_sent(client: httpx2.Client) -> None:
    for path, body, param, told in WRONG:
        response = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        error = error_of(response)
        assert error["param"] == param and told in error["message"], (body, error)


def test_head_is_answered_where_get_is(server: Any) -> None:
    with httpx2.Client(base_url=server.url) as client:
        for path in ("/", "/health", "/ready", "/version", "/metrics", "/v1/models", "/v1/models/tiny", "/engine/state", "/static/page.js"):
            got, head = client.get(path), client.head(path)
            assert (head.status_code, head.headers["content-type"] if head.content else None, head.content) == (got.status_code, None, b"")
        assert client.head(COMPLETIONS).status_code == 405
        assert client.get("/health").status_code == 200  # on the same connection: no body was left on it
