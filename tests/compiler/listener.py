"""A client of the generate model's scheduler that remembers what it was told."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from instantrt.compiler.serving.runtime.scheduler import Failure

SECONDS = 20.0


@dataclass
class Listener:
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: str = ""
    failure: tuple[Failure, str] | None = None
    gone: bool = False
    done: threading.Event = field(default_factory=threading.Event)

    def piece(self, text: str, tokens: list[int], finish: str) -> None:
        assert not self.done.is_set()
        self.text += text
        self.tokens += tokens
        self.finish = finish
        if finish:
            self.done.set()

    def fail(self, failure: Failure, message: str) -> None:
        assert not self.done.is_set()
        self.failure = (failure, message)
        self.done.set()

    def cancelled(self) -> bool:
        return self.gone


def wait(*listeners: Listener) -> None:
    assert all(listener.done.wait(SECONDS) for listener in listeners)
