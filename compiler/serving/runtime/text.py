"""Text to tokens and back: the tokenizer, the chat template, pieces that are whole characters, stop words."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

SPECIAL_TOKENS = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class Text:
    """The tokenizer and chat template that lie in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = open_tokenizer(folder)
        self.config = read(folder / "tokenizer_config.json")
        configs = (read(folder / "generation_config.json"), read(folder / "config.json"))
        ends: Any = next((c["eos_token_id"] for c in configs if c.get("eos_token_id") is not None), [])
        self.end_tokens = frozenset(ends if isinstance(ends, list) else [ends])
        path = folder / "chat_template.jinja"
        source = path.read_text("utf-8") if path.is_file() else self.config.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = next((t["template"] for t in source if t["name"] == "default"), None)
        self.template = source if isinstance(source, str) else None
        beside = {} if "added_tokens_decoder" in self.config else read(folder / "special_tokens_map.json")
        named = {key: token_text({**self.config, **beside}.get(key)) for key in SPECIAL_TOKENS}
        self.tokens = {key: token for key, token in named.items() if token}
        give_back()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def chat(self, messages: str) -> list[int]:
        """The prompt for a JSON list of {"role", "content"}; the template itself writes the special tokens."""
        ids: list[int] = self.tokenizer.encode(self.render(messages), add_special_tokens=False).ids
        return ids

    def render(self, messages: str) -> str:
        if self.template is None:
            raise ValueError("messages: the model has no chat template; send text_input")
        try:
            turns = json.loads(messages)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"messages: not JSON: {error}") from None
        # A role alone says nothing; what else is due, calls of tools say, is the matter of the template.
        said = isinstance(turns, list) and all(isinstance(t, dict) and "role" in t and len(t) > 1 for t in turns)
        if not said or not turns:
            raise ValueError('messages: expected a list such as [{"role": "user", "content": "..."}]')
        from .chat import rendered  # who sends no chat needs no Jinja

        return rendered(self.template, turns, self.tokens)


class Detokenizer:
    """The text of one sequence as it grows; holds back what may turn out to be part of a stop word."""

    def __init__(self, tokenizer: Any, stop_words: Sequence[str]) -> None:
        self.tokenizer, self.stop_words = tokenizer, stop_words
        self.stream = DecodeStream(skip_special_tokens=True)
        self.held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """New text that is certain after `token`, whole characters only; `stopped` when a stop word is complete."""
        self.held += self.step(token)
        found = [at for word in self.stop_words if (at := self.held.find(word)) >= 0]
        if found:
            self.stopped = True
            return self.release(min(found), drop=True)
        return self.release(len(self.held) - max((overlap(self.held, w) for w in self.stop_words), default=0))

    def step(self, token: int) -> str:
        """What `token` adds.

        Bytes that make no character change how those before them read, and tokenizers gives up at the next that does.
        What was said stays said, and the text goes on with this token.
        """
        try:
            added: str = self.stream.step(self.tokenizer, token) or ""
        except Exception:  # tokenizers has no type of its own
            self.stream = DecodeStream([token], skip_special_tokens=True)
            once, twice = (self.tokenizer.decode([token] * n, skip_special_tokens=True) for n in (1, 2))
            added = twice[len(once) :]
        return added

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        return self.release(len(self.held))

    def release(self, end: int, *, drop: bool = False) -> str:
        text, self.held = self.held[:end], "" if drop else self.held[end:]
        return text


def overlap(text: str, word: str) -> int:
    """How many characters at the end of `text` begin `word`."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in `folder`, which neither cuts nor pads: its file says how a training did."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def token_text(token: Any) -> str | None:
    """Of a token that a config writes as text, or as an object with its text in `content`; nothing of an empty one."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found


def give_back() -> None:
    """Memory that reading a tokenizer took and freed, a third of it, goes back to the system where glibc keeps it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
