"""Triton's entry: requests in, text out. Needs numpy, tokenizers, jinja2, the artifact's runtime, and nothing else."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # the server brings it

from .integrity import MODELS, check_folder
from .opening import open_engine
from .sampling import Sampling
from .scheduler import Failure, Job, RefusedError, Scheduler, SequenceLimits, internal
from .text import Text

SAMPLING: dict[str, type] = get_type_hints(Sampling)
CODES = {  # names: the server adds TritonError to its module only after this one is imported
    Failure.INVALID: "INVALID_ARG",
    Failure.BUSY: "UNAVAILABLE",
    Failure.CLOSING: "UNAVAILABLE",
    Failure.CANCELLED: "CANCELLED",
    Failure.INTERNAL: "INTERNAL",
}
DEFAULT_MAX_TOKENS = 64
ASK_EVERY = 0.02


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(__file__).parent
        parameters = {k: v["string_value"] for k, v in json.loads(args["model_config"])["parameters"].items()}
        rows, length, waiting = (int(parameters[name]) for name in ("max_batch", "max_length", "max_queue"))
        limits = SequenceLimits(rows, length, waiting, whole=parameters.get("prompts") == "whole")
        self.text = Text(folder)
        kind = "onnx" if parameters["runtime"] == "onnxruntime" else "engine"
        engine = open_engine(
            folder / MODELS[kind],
            check_folder(folder, kind),
            limits,
            runtime=parameters["runtime"],
            cache=parameters["cache"],
            threads=int(parameters["threads"]),
            spinning=parameters.get("spinning") == "true",
            gpu=int(args["model_instance_device_id"]),
        )
        self.scheduler = Scheduler(engine, self.text, limits)
        self.outbox = Outbox()

    def execute(self, requests: list[Any]) -> None:
        """Hands the requests to the scheduler and returns: replies come from its thread."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                job, stream, echo = read_request(request, self.text)
                reply = Sender(request, sender, self.outbox, len(job.prompt), stream=stream, echo=echo)
                self.scheduler.submit(job, reply)
            except RefusedError as error:
                refuse(sender, error.failure, str(error))
            except ValueError as error:
                refuse(sender, Failure.INVALID, str(error))
            except Exception as error:  # whatever a request contains, the server lives
                refuse(sender, Failure.INTERNAL, internal(error))

    def finalize(self) -> None:
        self.scheduler.close()
        self.outbox.close()


def read_request(request: Any, text: Text) -> tuple[Job, bool, str]:
    """(job, stream, what the reply begins with) of a request, or ValueError with what is wrong about it."""
    given = {tensor.name(): tensor for tensor in request.inputs()}
    prompt = string(given, "text_input")
    messages = string(given, "messages")
    if (prompt is None) == (messages is None):
        raise ValueError("expected either text_input or messages")
    tokens = text.encode(prompt or "") if messages is None else text.chat(messages)
    sampling = Sampling(**{name: kind(scalar(given, name)) for name, kind in SAMPLING.items() if name in given})
    max_tokens = int(scalar(given, "max_tokens")) if "max_tokens" in given else DEFAULT_MAX_TOKENS
    min_tokens = int(scalar(given, "min_tokens")) if "min_tokens" in given else 0
    stop_words = tuple(word for word in strings(given, "stop_words") if word)
    stream = bool(scalar(given, "stream")) if "stream" in given else False
    quiet = bool(scalar(given, "exclude_input_in_output")) if "exclude_input_in_output" in given else True
    echo = "" if quiet else prompt if messages is None else text.render(messages)
    return Job(tuple(tokens), max_tokens, min_tokens, sampling, stop_words), stream, echo or ""


def scalar(given: dict[str, Any], name: str) -> Any:
    values = given[name].as_numpy()
    if values.size != 1:
        raise ValueError(f"{name}: expected one value, found {values.size}")
    return values.item()


def string(given: dict[str, Any], name: str) -> str | None:
    found = strings(given, name)
    if len(found) > 1:
        raise ValueError(f"{name}: expected one string, found {len(found)}")
    return found[0] if found else None


def strings(given: dict[str, Any], name: str) -> list[str]:
    if name not in given:
        return []
    try:
        return [bytes(value).decode("utf-8") for value in given[name].as_numpy().ravel()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8: {error.reason} at byte {error.start}") from None


class Outbox:
    """Talks to the server from a thread of its own, so that a decode step does not wait for the last one's delivery."""

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.loop, name="outbox", daemon=True)
        self.thread.start()

    def loop(self) -> None:
        while (call := self.calls.get()) is not None:
            try:
                call()
            except Exception as error:  # one reply that cannot be delivered must not silence the others
                pb_utils.Logger.log_error(f"reply not delivered: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Delivers what is left, then ends."""
        self.calls.put(None)
        self.thread.join()


class Sender:
    """The reply to one request: its pieces as they come, or all at once where the client did not ask for a stream.

    Pieces that come faster than the server takes them travel together.
    """

    def __init__(
        self, request: Any, sender: Any, outbox: Outbox, prompt_tokens: int, *, stream: bool, echo: str
    ) -> None:
        self.sender, self.outbox, self.prompt_tokens, self.stream = sender, outbox, prompt_tokens, stream
        self.wanted = set(request.requested_output_names())
        self.lock = threading.Lock()
        self.text, self.finish = echo, ""
        self.tokens: list[int] = []
        self.queued = False
        self.ended = False  # the server frees what `sender` stands for with the last response: no call after that
        self.gone = False
        self.asked = time.monotonic()

    def piece(self, text: str, tokens: list[int], finish: str) -> None:
        with self.lock:
            self.text += text
            self.tokens += tokens
            self.finish = finish
            if not self.queued and (self.stream or finish):
                self.queued = True
                self.outbox.calls.put(self.send)

    def send(self) -> None:
        """Everything that has come since the last time."""
        with self.lock:
            text, tokens, finish = self.text, self.tokens, self.finish
            self.text, self.tokens, self.queued = "", [], False
        if self.ended:
            return
        self.ended = bool(finish)
        outputs: dict[str, Any] = {
            "text_output": np.array([[text.encode()]], np.object_),
            "output_ids": np.array([tokens], np.int32),
            "finish_reason": np.array([[finish.encode()]], np.object_),
            "num_input_tokens": np.array([[self.prompt_tokens]], np.uint32),
            "num_output_tokens": np.array([[len(tokens)]], np.uint32),
        }
        tensors = [pb_utils.Tensor(name, value) for name, value in outputs.items() if name in self.wanted]
        final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if finish else 0
        self.sender.send(pb_utils.InferenceResponse(tensors), flags=final)

    def fail(self, failure: Failure, message: str) -> None:
        self.outbox.calls.put(partial(self.refuse, failure, message))

    def refuse(self, failure: Failure, message: str) -> None:
        if not self.ended:
            self.ended = True
            refuse(self.sender, failure, message)

    def cancelled(self) -> bool:
        """Has the client gone? Asks every ASK_EVERY seconds, in the outbox's thread."""
        now = time.monotonic()
        if not self.gone and now - self.asked > ASK_EVERY:
            self.asked = now
            self.outbox.calls.put(self.ask)
        return self.gone

    def ask(self) -> None:
        self.gone = not self.ended and bool(self.sender.is_cancelled())


def refuse(sender: Any, failure: Failure, message: str) -> None:
    code = getattr(pb_utils.TritonError, CODES[failure])
    response = pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
