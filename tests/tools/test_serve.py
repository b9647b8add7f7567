"""The real Triton server on a repository of ours: it loads, generates, streams, batches, cancels, refuses, and ends."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from instantrt import Classifier, Embedder
from instantrt.compiler.llm import load_artifact
from instantrt.compiler.serving.config import GENERATE_INPUTS, GENERATE_OUTPUTS
from instantrt.passes.core.errors import UserError
from instantrt.tools.serving.load import ask, measure, resident
from instantrt.tools.serving.server import ENVIRONMENT, Server, serving, stop
from instantrt.tools.serving.text_load import in_process, measure_texts
from tests.conftest import ROOT
from tests.repositories import write_repository

CLIENT = Path(__file__).parent.parent / "serving" / "grpc_client.py"
MODEL = "tiny-qwen2_generate"
ROWS = 4  # fewer than the clients of most tests, so that requests wait, join and leave
PROMPTS = ("Once upon a time", "The list of", "In the history of", "def main(", "The server é", "When 水 the water")
LENGTHS = (40, 7, 23, 31, 1, 16)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("tritonserver") is None and not (ENVIRONMENT / "bin" / "python").exists(),
        reason="no Triton server: make serving",
    ),
]


@pytest.fixture(scope="module")
def repository(tiny_compiled: Path, embedding: Path, classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "repository"
    for out in (tiny_compiled, embedding, classes):
        write_repository(out, folder)
    config = folder / MODEL / "config.pbtxt"
    few = config.read_text("utf-8").replace(
        '"max_batch", value: { string_value: "16"', f'"max_batch", value: {{ string_value: "{ROWS}"'
    )
    assert few != config.read_text("utf-8")
    config.write_text(few, "utf-8")
    return folder


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Server]:
    with serving(repository) as running:
        yield running


@pytest.fixture(scope="module")
def expected(tiny_compiled: Path) -> Callable[[str, int], list[int]]:
    """What ONNX Runtime generates alone, without our runtime; ends of text are passed over, as min_tokens does."""
    loaded = load_artifact(tiny_compiled)
    tokenizer = Tokenizer.from_file(str(tiny_compiled / "x86" / "tokenizer.json"))
    caches = [spec.name for spec in loaded.artifact.inputs[3:]]

    def tokens(prompt: str, count: int) -> list[int]:
        ids, found = tokenizer.encode(prompt).ids, []
        past = dict.fromkeys(caches, np.zeros((1, 2, 0, 64), np.float32))
        total, new = 0, ids
        while len(found) < count:
            total += len(new)
            positions = np.arange(total - len(new), total)[None]
            fed = {"input_ids": [new], "attention_mask": np.ones((1, total), np.int64), "position_ids": positions}
            logits, *present = loaded(**fed, **past).values()
            past = dict(zip(caches, present, strict=True))
            new = [int(logits[0, -1, 1:].argmax()) + 1]  # 0 is the end of text
            found += new
        return found

    return tokens


def client(*command: str, given: Any) -> Any:
    """The gRPC client, in the serving environment."""
    text = given if isinstance(given, str) else json.dumps(given)
    done = subprocess.run(
        [ENVIRONMENT / "bin" / "python", CLIENT, *command],
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def exactly(prompt: str, count: int, **more: Any) -> dict[str, Any]:
    return {"inputs": {"text_input": prompt, "max_tokens": count, "min_tokens": count, "stream": True, **more}}


def ids(reply: dict[str, Any]) -> list[int]:
    return [i for piece in reply["pieces"] for i in piece["ids"]]


def test_configs_are_what_the_server_reads(repository: Path) -> None:
    generate = client("config", given=(repository / MODEL / "config.pbtxt").read_text("utf-8"))
    assert generate["model_transaction_policy"] == {"decoupled": True}
    inputs = [(i["name"], i["data_type"], int(i["dims"][0])) for i in generate["input"]]
    assert inputs == [(name, kind, dim) for name, kind, dim, _ in GENERATE_INPUTS]
    assert all(i["optional"] for i in generate["input"])
    assert [(o["name"], o["data_type"], int(o["dims"][0])) for o in generate["output"]] == list(GENERATE_OUTPUTS)
    bare = client("config", given=(repository / "tiny-qwen2" / "config.pbtxt").read_text("utf-8"))
    assert bare["platform"] == "onnxruntime_onnx"
    shapes = {t["name"]: (t["data_type"], [int(d) for d in t["dims"]]) for t in bare["input"]}
    assert shapes["attention_mask"] == ("TYPE_INT64", [-1, -1])
    assert shapes["past_key_values.3.value"] == ("TYPE_FP32", [-1, 2, -1, 64])


def test_tokens_are_those_of_onnx_runtime_alone(server: Server, expected: Callable[[str, int], list[int]]) -> None:
    """Alone; together on one bidirectional stream; joining a batch that runs and leaving it at different times."""
    want = [expected(prompt, count) for prompt, count in zip(PROMPTS, LENGTHS, strict=True)]
    body: dict[str, object] = {}
    for prompt, count, tokens in zip(PROMPTS, LENGTHS, want, strict=True):
        body = {"text_input": prompt, "max_tokens": count, "min_tokens": count}
        assert list(ask(server.http, MODEL, body).tokens) == tokens
    together = [exactly(prompt, count) for prompt, count in zip(PROMPTS, LENGTHS, strict=True)]
    assert [ids(reply) for reply in client("pipeline", server.grpc, MODEL, given=together)] == want
    staggered = [{**request, "delay": 0.02 * i} for i, request in enumerate(together * 2)]
    replies = client("stream", server.grpc, MODEL, given=staggered)
    assert [reply["error"] for reply in replies] == [""] * len(staggered)
    assert [ids(reply) for reply in replies] == want * 2


def test_pieces_are_whole_characters_and_make_the_text(server: Server) -> None:
    once = ask(server.http, MODEL, {"text_input": PROMPTS[5], "max_tokens": 60, "min_tokens": 60, "stream": False})
    (streamed,) = client("stream", server.grpc, MODEL, given=[exactly(PROMPTS[5], 60)])
    assert len(streamed["pieces"]) > 1
    assert "".join(piece["text"] for piece in streamed["pieces"]) == once.text
    assert "\ufffd" not in once.text.rstrip("\ufffd")
    assert [piece["finish"] for piece in streamed["pieces"]][-1] == once.finish == "length"


def test_end_of_text_and_stop_words(server: Server) -> None:
    text = ask(server.http, MODEL, {"text_input": "Once upon a time"})
    assert (text.text, text.finish) == (" the current time of the instance.", "stop")
    cut = ask(server.http, MODEL, {"text_input": "Once upon a time", "stop_words": ["zzz", "e of the in"]})
    assert (cut.text, cut.finish) == (" the current tim", "stop")


def test_a_seed_decides_the_text_alone_and_in_a_batch(server: Server) -> None:
    sampled = [exactly("The list of", 20, temperature=1.0, top_p=0.9, seed=seed) for seed in (1, 2, 1, 3)]
    alone = client("stream", server.grpc, MODEL, given=sampled[:1])
    batch = client("stream", server.grpc, MODEL, given=sampled)
    assert ids(alone[0]) == ids(batch[0]) == ids(batch[2])
    assert len({tuple(ids(reply)) for reply in batch}) == 3


def test_chat_goes_through_the_template(server: Server) -> None:
    rendered = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    chat = json.dumps([{"role": "user", "content": "Hello"}])
    by_hand = ask(server.http, MODEL, {"text_input": rendered, "max_tokens": 12})
    assert ask(server.http, MODEL, {"messages": chat, "max_tokens": 12}).tokens == by_hand.tokens


def test_cancelled_requests_leave_at_once(server: Server) -> None:
    """As many long requests as there are rows; a short one that comes after them waits only while they run."""
    long = [exactly("The server", 900) for _ in range(ROWS)]
    short = {**exactly("The list of", 5), "delay": 0.5}
    *_, waited = client("stream", server.grpc, MODEL, given=[*long, short])
    cancelled = [{**request, "cancel_after": 3} for request in long]
    *gone, served = client("stream", server.grpc, MODEL, given=[*cancelled, short])
    assert all(len(ids(reply)) < 300 for reply in gone)
    assert ids(served) == ids(waited)
    assert served["seconds"] - 0.5 < (waited["seconds"] - 0.5) / 3


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"top_k": 1}, "expected either text_input or messages"),
        ({"text_input": "a", "messages": "[]"}, "expected either text_input or messages"),
        ({"text_input": b"\xff\xfe".decode("latin-1")}, "text_input: not UTF-8"),
        ({"text_input": ""}, "the prompt is empty"),
        ({"text_input": "a", "max_tokens": 0}, "max_tokens: expected 1 or more, found 0"),
        (
            {"text_input": "a", "max_tokens": 1024},
            "the request is too long: 1 prompt tokens + max_tokens 1024 exceed 1024",
        ),
        ({"text_input": "a b " * 50_000}, "the request is too long"),
        ({"text_input": "a", "temperature": float("nan")}, "temperature: expected 0 or more, found nan"),
        ({"text_input": "a", "top_p": 1.5}, "top_p: expected above 0, at most 1, found 1.5"),
        ({"text_input": "a", "top_k": -1}, "top_k: expected an integer, 0 or more"),
        ({"text_input": "a", "repetition_penalty": 0.0}, "repetition_penalty: expected above 0"),
        ({"messages": "{"}, "messages: not JSON"),
        ({"messages": "[" * 20_000}, "messages: not JSON: maximum recursion depth"),
        ({"messages": '[{"content": "who?"}]'}, "messages: expected a list such as"),
    ],
)
def test_malformed_requests_are_refused(server: Server, tensors: dict[str, Any], message: str) -> None:
    types = {"max_tokens": "INT32", "top_k": "INT32", "text_input": "BYTES", "messages": "BYTES"}
    given = {n: {"type": types.get(n, "FP32"), "shape": [1, 1], "values": [v]} for n, v in tensors.items()}
    assert message in client("infer", server.grpc, MODEL, given=given)["error"]


@pytest.mark.parametrize(
    "tensors",
    [
        {"text_input": {"type": "BYTES", "shape": [2, 1], "values": ["a", "b"]}},
        {"text_input": {"type": "INT32", "shape": [1, 1], "values": [7]}},
        {"text_inputs": {"type": "BYTES", "shape": [1, 1], "values": ["a"]}},
    ],
    ids=["two in one request", "wrong type", "unknown name"],
)
def test_wrong_tensors_are_refused(server: Server, tensors: dict[str, Any]) -> None:
    assert client("infer", server.grpc, MODEL, given=tensors)["error"]
    assert server.process.poll() is None
    assert ask(server.http, MODEL, {"text_input": "Once upon a time"}).finish == "stop"


def test_http_clients_that_go(server: Server) -> None:
    """A stream's row is free at once; a reply in one piece is generated to its end, for nobody, and harms no one."""

    def leave(call: str, stream: bool) -> float:
        """Seconds that a short request takes after as many long ones as there are rows lost their clients."""
        body = {"text_input": "The server", "max_tokens": 900, "min_tokens": 900, "stream": stream}
        connections = [http.client.HTTPConnection(server.http) for _ in range(ROWS)]
        for connection in connections:
            connection.request("POST", f"/v2/models/{MODEL}/{call}", json.dumps(body))
            if stream:
                connection.getresponse().read(10)
        time.sleep(0.1)  # all have begun, and none has ended
        for connection in connections:
            connection.close()
        started = time.monotonic()
        assert ask(server.http, MODEL, {"text_input": "Once upon a time"}).finish == "stop"
        return time.monotonic() - started

    assert leave("generate_stream", stream=True) < leave("generate", stream=False) / 3


@pytest.mark.parametrize("echo", [None, True, False])
def test_what_the_openai_front_end_sends(server: Server, echo: bool | None) -> None:
    """Names, types and shapes of its requests to TensorRT-LLM's models, which it sends to every backend but vLLM.

    Of a chat, which has no echo, and of a completion, where it is said; the two counts are always asked for.
    """
    given = {
        "text_input": {"type": "BYTES", "shape": [1, 1], "values": ["Once upon a time"]},
        "stream": {"type": "BOOL", "shape": [1, 1], "values": [False]},
        "max_tokens": {"type": "INT32", "shape": [1, 1], "values": [16]},
        "stop_words": {"type": "BYTES", "shape": [1, 2], "values": [" instance", "###"]},
        "top_p": {"type": "FP32", "shape": [1, 1], "values": [1.0]},
        "frequency_penalty": {"type": "FP32", "shape": [1, 1], "values": [0.0]},
        "presence_penalty": {"type": "FP32", "shape": [1, 1], "values": [0.0]},
        "seed": {"type": "UINT64", "shape": [1, 1], "values": [2**63]},
        "temperature": {"type": "FP32", "shape": [1, 1], "values": [0.0]},
        "return_num_input_tokens": {"type": "BOOL", "shape": [1, 1], "values": [True]},
        "return_num_output_tokens": {"type": "BOOL", "shape": [1, 1], "values": [True]},
    }
    if echo is not None:
        given["exclude_input_in_output"] = {"type": "BOOL", "shape": [1, 1], "values": [not echo]}
    reply = client("infer", server.grpc, MODEL, given=given)
    text = " the current time of the"
    assert (reply["error"], reply["finish"]) == ("", "stop")
    assert reply["text"] == ("Once upon a time" + text if echo else text)
    assert reply["counts"] == [6, len(reply["ids"])]


def test_64_clients(server: Server) -> None:
    body: dict[str, object] = {"max_tokens": 8, "min_tokens": 8}
    result = measure(server, MODEL, clients=64, requests=192, body=body, prompts=PROMPTS)
    assert (result.wrong, result.tokens) == (0, 192 * 8)


def test_unload_and_reload(server: Server, expected: Callable[[str, int], list[int]]) -> None:
    """Also in the middle of a generation, which then ends, one way or the other."""
    steps = ["ready", "unload", "ready", "load", "ready"]
    answers = client("manage", server.grpc, MODEL, given=steps)
    assert [answers[i] for i in (0, 2, 4)] == ["True", "False", "True"]
    assert list(ask(server.http, MODEL, {"text_input": "The list of", "max_tokens": 5, "min_tokens": 5}).tokens) == (
        expected("The list of", 5)
    )


def infer(server: Server, model: str, **given: list[str]) -> dict[str, Any]:
    """Output -> its values, of texts by HTTP; or what is wrong, by the name `error`."""
    inputs = [{"name": n, "datatype": "BYTES", "shape": [len(v), 1], "data": v} for n, v in given.items()]
    host = http.client.HTTPConnection(server.http, timeout=60)
    host.request("POST", f"/v2/models/{model}/infer", json.dumps({"inputs": inputs}))
    body = json.loads(host.getresponse().read())
    host.close()
    if "error" in body:
        return {"error": body["error"]}
    return {each["name"]: np.array(each["data"]).reshape(each["shape"]) for each in body["outputs"]}


def test_vectors_and_labels_of_texts(server: Server, embedding: Path, classes: Path) -> None:
    """Those of this process, for requests of several texts that come together; a wrong one is refused alone."""
    texts = ["fish", "The boat is late again.", "An old net lies on the quay."]
    with Embedder(embedding) as model:
        want, query = model.encode(texts), model.encode(texts, prompt_name="query")
    with ThreadPoolExecutor(8) as clients:
        asked = [clients.submit(infer, server, "letters_embed", text=texts[: 1 + i % 3]) for i in range(24)]
        for index, found in enumerate(asked):
            assert np.abs(found.result()["embedding"] - want[: 1 + index % 3]).max() < 1e-5
    prompted = infer(server, "letters_embed", text=texts, prompt_name=["query"] * 3)["embedding"]
    assert np.abs(prompted - query).max() < 1e-5
    assert "expected one of query, found x" in infer(server, "letters_embed", text=["a"], prompt_name=["x"])["error"]
    with Classifier(classes) as labeller:
        labels = labeller.classify(texts)
    answer = infer(server, "moods_classify", text=texts)
    assert [list(row) for row in answer["label"]] == [list(each) for each in labels]
    assert np.abs(answer["score"] - [list(each.values()) for each in labels]).max() < 1e-5


def test_pairs_of_texts(server: Server, classes: Path) -> None:
    """Labels of this process, beside requests of single texts that come at the same time."""
    texts, pairs = ["fish", "The boat is late again."], ["net", ""]
    with Classifier(classes) as labeller:
        want = [labeller.classify(texts), labeller.classify(list(zip(texts, pairs, strict=True)))]
    assert want[0][1] != want[1][1]  # an empty second text is one
    with ThreadPoolExecutor(8) as clients:
        sent = [{"text": texts} | ({"text_pair": pairs} if index % 2 else {}) for index in range(16)]
        asked = [clients.submit(infer, server, "moods_classify", **given) for given in sent]
        for index, found in enumerate(asked):
            for label, score, each in zip(
                found.result()["label"], found.result()["score"], want[index % 2], strict=True
            ):
                assert dict(zip(label, score, strict=True)) == pytest.approx(each, abs=1e-5)
    assert (
        "unexpected inference input 'text_pair'" in infer(server, "letters_embed", text=["a"], text_pair=["b"])["error"]
    )


@pytest.mark.parametrize("model", ["letters_embed", "moods_classify"])
def test_texts_under_load_beside_this_process(server: Server, embedding: Path, classes: Path, model: str) -> None:
    folders, kind = {"letters_embed": embedding, "moods_classify": classes}, model.rpartition("_")[2]
    with in_process(folders[model], kind) as here:
        result = measure_texts(server, model, clients=8, requests=20, here=here)
        assert (result.requests, result.wrong) == (32, 0)
        assert all(rate > 0 for rate in (*result.rates, *result.beside))
        with pytest.raises(UserError, match="gives other answers than the server"):
            measure_texts(server, model, clients=1, requests=1, here=lambda text: here(text + "?") * 2)


def test_what_cannot_be_served_is_said(repository: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"no such model\n.*tiny-qwen2, tiny-qwen2_generate"),
        serving(repository, ("nix",)),
    ):
        pass
    with pytest.raises(UserError, match="no model that takes text"), serving(tmp_path):
        pass
    with pytest.raises(UserError, match="no tritonserver"), serving(repository, environment=tmp_path):
        pass
    broken = tmp_path / "broken"
    shutil.copytree(repository / MODEL, broken / MODEL)
    (broken / MODEL / "1" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"the server ended with code 1\n(.|\n)*load failed for model"), serving(broken):
        pass


def test_changed_weights_are_refused_in_words(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository / MODEL, tmp_path / MODEL)
    weights = tmp_path / MODEL / "1" / "model.onnx.data"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    words = r"model\.onnx\.data is not what the compiler wrote: expected sha256 [0-9a-f]{64}, found [0-9a-f]{64}"
    with pytest.raises(UserError, match=words), serving(tmp_path):
        pass


def test_the_command_serves_until_it_is_ended(repository: Path) -> None:
    command = [sys.executable, "-m", "instantrt", "serve", str(repository)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        ready = process.stdout.readline()
        address = ready.partition("http ")[2].partition(",")[0]
        assert ask(address, MODEL, {"text_input": "Once upon a time"}).finish == "stop", ready
        process.terminate()
        assert process.wait(40) == 0
        assert process.stdout.read() == "stopped\n"
    with pytest.raises(ConnectionRefusedError):
        ask(address, MODEL, {"text_input": "Once upon a time"})


def test_a_server_that_crashes_leaves_nothing_behind(repository: Path) -> None:
    with serving(repository) as server:
        assert resident(server.process.pid) > 0
        server.process.kill()
        server.process.wait()
        assert resident(server.process.pid) > 0  # its Python backend lives on
    deadline = time.monotonic() + 10
    while resident(server.process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert resident(server.process.pid) == 0


def test_sigterm_while_generating(repository: Path) -> None:
    """What runs finishes, within the server's exit timeout; what comes too late gets an error; nobody hangs."""
    with serving(repository) as server:
        command = [ENVIRONMENT / "bin" / "python", CLIENT, "stream", server.grpc, MODEL]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as running:
            assert running.stdin is not None
            assert running.stdout is not None
            assert running.stderr is not None
            running.stdin.write(json.dumps([exactly("The server", 600)] * 6))
            running.stdin.close()
            running.stderr.readline()  # the first of 600 pieces is there, however fast this machine is
            signalled = time.time()
            code = stop(server.process)
            replies = json.loads(running.stdout.read())
    assert code == 0
    assert max(reply["ended"] for reply in replies) > signalled
    assert all(reply["error"] or len(ids(reply)) == 600 for reply in replies)
