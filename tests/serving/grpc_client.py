"""A gRPC client of the Triton server, run by the serving environment: JSON in on stdin, JSON out on stdout.

config                              the text of a config.pbtxt -> its fields, by the server's own schema
stream HOST:PORT MODEL              [{"inputs": {...}, "delay": s, "cancel_after": pieces}, ...], a stream for each,
                                    all at once -> [{"pieces": [...], "error": ..., "seconds": ...}, ...];
                                    each says on stderr when its first piece is there
pipeline HOST:PORT MODEL            the same requests, all on one bidirectional stream
infer HOST:PORT MODEL               tensors {"name": {"type", "shape", "values"}} as they are -> error or outputs
manage HOST:PORT MODEL              ["load" | "unload" | "ready", ...] -> what each answered
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

TYPES = {
    "text_input": ("BYTES", np.object_),
    "messages": ("BYTES", np.object_),
    "stop_words": ("BYTES", np.object_),
    "max_tokens": ("INT32", np.int32),
    "min_tokens": ("INT32", np.int32),
    "top_k": ("INT32", np.int32),
    "stream": ("BOOL", np.bool_),
    "seed": ("UINT64", np.uint64),
}
SECONDS = 90.0


def tensor(name: str, value: Any) -> triton.InferInput:
    kind, dtype = TYPES.get(name, ("FP32", np.float32))
    values = value if isinstance(value, list) else [value]
    raw = [v.encode() if isinstance(v, str) else v for v in values]
    found = triton.InferInput(name, [1, len(raw)], kind)
    found.set_data_from_numpy(np.array([raw], dtype))
    return found


def piece(result: triton.InferResult) -> dict[str, Any]:
    return {
        "text": result.as_numpy("text_output").item().decode(),
        "ids": result.as_numpy("output_ids").ravel().tolist(),
        "finish": result.as_numpy("finish_reason").item().decode(),
        "counts": [result.as_numpy(f"num_{which}_tokens").item() for which in ("input", "output")],
    }


def one_stream(address: str, model: str, request: dict[str, Any]) -> dict[str, Any]:
    """One request on a stream of its own; `cancel_after` pieces the stream is cut."""
    time.sleep(request.get("delay", 0))
    started, pieces, error = time.monotonic(), [], ""
    replies: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: replies.put((result, error)))
        inputs = [tensor(name, value) for name, value in request["inputs"].items()]
        client.async_stream_infer(model, inputs)
        while not error and not (pieces and pieces[-1]["finish"]):
            result, failure = replies.get(timeout=SECONDS)
            error = str(failure) if failure else ""
            pieces += [] if failure else [piece(result)]
            if len(pieces) == 1:
                print("a first piece", file=sys.stderr, flush=True)
            if len(pieces) == request.get("cancel_after"):
                client.stop_stream(cancel_requests=True)
                break
    return {"pieces": pieces, "error": error, "seconds": time.monotonic() - started, "ended": time.time()}


def streams(address: str, model: str, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{} for _ in requests]

    def run(i: int) -> None:
        found[i] = one_stream(address, model, requests[i])

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    return found


def pipeline(address: str, model: str, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All requests on one stream; replies are told apart by their request's id."""
    found: dict[str, dict[str, Any]] = {str(i): {"pieces": [], "error": ""} for i in range(len(requests))}
    replies: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: replies.put((result, error)))
        for i, request in enumerate(requests):
            inputs = [tensor(name, value) for name, value in request["inputs"].items()]
            client.async_stream_infer(model, inputs, request_id=str(i))
        open_requests = len(requests)
        while open_requests:
            result, failure = replies.get(timeout=SECONDS)
            if failure:
                raise failure
            found[result.get_response().id]["pieces"].append(piece(result))
            open_requests -= bool(piece(result)["finish"])
        client.stop_stream()
    return list(found.values())


def infer(address: str, model: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """Tensors of any type and shape, right or wrong."""
    inputs = []
    for name, t in tensors.items():
        values = [v.encode("latin-1") if isinstance(v, str) else v for v in t["values"]]
        dtype = np.object_ if t["type"] == "BYTES" else np.dtype({"FP32": "float32"}.get(t["type"], t["type"].lower()))
        inputs.append(triton.InferInput(name, t["shape"], t["type"]))
        inputs[-1].set_data_from_numpy(np.array(values, dtype).reshape(t["shape"]))
    replies: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: replies.put((result, error)))
        client.async_stream_infer(model, inputs)
        result, failure = replies.get(timeout=SECONDS)
        client.stop_stream()
    return {"error": str(failure)} if failure else {"error": "", **piece(result)}


def manage(address: str, model: str, steps: list[str]) -> list[str]:
    calls = {
        "load": lambda client: client.load_model(model),
        "unload": lambda client: client.unload_model(model),
        "ready": lambda client: client.is_model_ready(model),
    }
    answers = []
    with triton.InferenceServerClient(address) as client:
        for step in steps:
            try:
                answers.append(str(calls[step](client)))
            except InferenceServerException as error:
                answers.append(str(error))
    return answers


def main() -> None:
    command, *where = sys.argv[1:]
    given = sys.stdin.read()
    if command == "config":
        config = text_format.Parse(given, model_config_pb2.ModelConfig())
        print(json_format.MessageToJson(config, preserving_proto_field_name=True))
        return
    calls = {"stream": streams, "pipeline": pipeline, "infer": infer, "manage": manage}
    print(json.dumps(calls[command](*where, json.loads(given))))


if __name__ == "__main__":
    main()
