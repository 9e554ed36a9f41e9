"""Talks with a model: its answers appear as they are made, and it remembers the conversation. /help tells what else there is.

With --url the model is that of a running server, and nothing heavy is loaded here. Ctrl-C stops an answer; Ctrl-D ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator

from pjax.cli.flags import Parser
from pjax.cli.talk import Message, Partner, ServerError, add_partner, open_partner
from pjax.errors import InvalidRequestError, RequestFailedError
from pjax.machine import expand_user, user_folder

HELP = """/help            this
/reset           forget the conversation
/undo            forget the last question and its answer
/retry           ask the last question again
/system TEXT     set the system message (and forget the conversation)
/history         show the conversation
/save FILE       write the conversation as JSON
/load FILE       go on with one
/exit            end (as Ctrl-D)
A line that ends with \\ goes on in the next. A line that begins with // is a question that begins with /."""


def add_arguments(parser: Parser) -> None:
    """With whom, and how."""
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument("--stats", action="store_true", help="the time of each answer's first piece, and its speed, on standard error")
    add_partner(parser)


def run(args: argparse.Namespace) -> int:
    """Question and answer until the input ends."""
    partner = open_partner(args)
    chat = Chat(partner, args.system, args.stats)
    if sys.stdin.isatty():
        print(f"{partner.name}. /help tells the commands.", file=sys.stderr)
    try:
        with _line_history():
            for line in _lines():
                if not chat.take(line):
                    break
        return 0
    finally:
        partner.close()


class Chat:
    """A conversation, and the commands that change it."""

    def __init__(self, partner: Partner, system: str | None, stats: bool = False) -> None:
        self._partner = partner
        self._stats = stats
        self.messages: list[Message] = []
        self._reset(system)
        self._commands: dict[str, Callable[[str], object]] = {
            "/help": lambda _: print(HELP),
            "/reset": lambda _: self._reset(self._system),
            "/undo": lambda _: self._undo(),
            "/retry": lambda _: self._retry(),
            "/system": lambda text: self._reset(text or None),
            "/history": lambda _: self._show(),
            "/save": self._save,
            "/load": self._load,
        }

    def take(self, line: str) -> bool:
        """A question or a command; whether the conversation goes on."""
        word, _, rest = line.strip().partition(" ")
        if word in ("/exit", "/quit"):
            return False
        if word.startswith("/") and not word.startswith("//"):
            if word not in self._commands:
                _tell(f"{word} is no command; /help tells those that there are")
            else:
                self._commands[word](rest.strip())
        elif line.strip():
            self.ask(line[1:] if word.startswith("//") else line)
        return True

    def ask(self, question: str) -> None:
        """Streams the answer. A question that fails is forgotten; an answer that is stopped is kept as far as it came."""
        self.messages.append({"role": "user", "content": question})
        answer, started, first, count = "", time.monotonic(), 0.0, 0
        pieces = self._partner.chat(self.messages)
        try:
            for piece in pieces:
                first, count = first or time.monotonic(), count + 1
                answer += piece
                print(piece, end="", flush=True)
        except (InvalidRequestError, RequestFailedError, ServerError) as error:
            _tell(str(error))
            if not answer:
                self.messages.pop()
                return
        except KeyboardInterrupt:
            _tell(" (stopped)")
        finally:
            if isinstance(pieces, Iterator) and hasattr(pieces, "close"):
                pieces.close()
        print()
        self.messages.append({"role": "assistant", "content": answer})
        if self._stats and first:
            rate = (count - 1) / max(time.monotonic() - first, 1e-9)
            _tell(f"first piece after {first - started:.2f} s, then {rate:.1f} pieces/s")

    def _reset(self, system: str | None) -> None:
        self._system = system
        self.messages[:] = [{"role": "system", "content": system}] if system else []

    def _undo(self) -> str | None:
        asked = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            _tell("nothing has been asked yet")
            return None
        question = self.messages[asked[-1]]["content"]
        del self.messages[asked[-1] :]
        return question

    def _retry(self) -> None:
        if (question := self._undo()) is not None:
            self.ask(question)

    def _show(self) -> None:
        for message in self.messages:
            print(f"[{message['role']}] {message['content']}")

    def _save(self, name: str) -> None:
        try:
            expand_user(name).write_text(json.dumps(self.messages, indent=2, ensure_ascii=False), encoding="utf-8")
        except OSError as error:
            _tell(f"it can't be saved: {error}")

    def _load(self, name: str) -> None:
        try:
            found = json.loads(expand_user(name).read_text(encoding="utf-8"))
            messages = [{"role": str(message["role"]), "content": str(message["content"])} for message in found]
        except (OSError, ValueError, KeyError, TypeError) as error:
            _tell(f"{name!r} is no conversation: {error}")
            return
        self.messages[:] = messages
        self._system = next((message["content"] for message in messages if message["role"] == "system"), None)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _lines() -> Iterator[str]:
    """Lines of the terminal, or of whatever standard input is; those that end with \\ are joined."""
    kept: list[str] = []
    while True:
        try:
            line = input(("… " if kept else "> ") if sys.stdin.isatty() else "")
        except EOFError:
            if kept:
                yield "\n".join(kept)
            return
        except KeyboardInterrupt:  # clears what was begun
            print()
            kept = []
            continue
        kept.append(line[:-1] if line.endswith("\\") else line)
        if not line.endswith("\\"):
            yield "\n".join(kept)
            kept = []


@contextlib.contextmanager
def _line_history() -> Iterator[None]:
    """Arrow keys find earlier questions, of earlier chats too."""
    if not sys.stdin.isatty():
        yield
        return
    import readline

    state = user_folder("XDG_STATE_HOME", ".local/state")
    if state is None:  # the keys work, without earlier chats
        yield
        return
    path = state / "pjax" / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(1000)
            readline.write_history_file(path)
            path.chmod(0o600)
