"""A teacher behind an address: the credit is that of the loaded one, and what does not fit is refused before anything is written.

The server here speaks vLLM's protocol and computes with the teacher's weights; `test_vllm.py` asks vLLM itself.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opdgeo.errors import ConfigError
from opdgeo.training import callbacks, served
from opdgeo.training.config import TrainConfig
from opdgeo.training.train import train
from tiny_models import weights


class Served(ThreadingHTTPServer):
    """The teacher of `folder`; `broken` requests fail first, `longest` is what it says of its room."""

    def __init__(self, folder: Path, longest: int = 64):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.longest, self.broken, self.shift, self.lock = longest, 0, 0, threading.Lock()
        self.raw: Callable[[BaseHTTPRequestHandler], None] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "the-teacher", "max_model_len": self.longest}]}
        assert body["model"] == "the-teacher"
        if path == "/tokenize":
            ids = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
            return {"tokens": [i + self.shift for i in ids]}
        if path == "/detokenize":
            return {"prompt": self.tokenizer.decode(body["tokens"])}
        ids = body["prompt"]
        with torch.no_grad(), self.lock:
            logp = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        each = [None] + [{str(t): {"logprob": float(logp[i, t]), "rank": 1}} for i, t in enumerate(ids[1:])]
        return {
            "choices": [{"index": 0, "text": "", "prompt_logprobs": each if body["prompt_logprobs"] == 0 else None}]
        }


class _Handler(BaseHTTPRequestHandler):
    server: Served

    def do_GET(self) -> None:
        self.reply({})

    def do_POST(self) -> None:
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, body: dict[str, Any]) -> None:
        if self.server.raw is not None:  # whatever a test has it say
            self.server.raw(self)
            return
        with self.server.lock:
            failing, self.server.broken = self.server.broken > 0, max(0, self.server.broken - 1)
        if failing:
            self.send_error(503)
            return
        data = json.dumps(self.server.answer(self.path, body)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(served, "PAUSES", (0.01, 0.01))
    running = Served(teacher)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def test_a_served_teacher_trains_as_the_loaded_one(
    config: Callable[..., TrainConfig],
    server: Served,
    tmp_path: Path,
) -> None:
    """Also with padding on both sides, a share of the tokens, and a server that fails now and then."""
    kind = {"token_share": 0.5, "alpha": 0.7, "eval_prompts": 4, "eval_prompts_between": 4, "learning_rate": 1e-3}
    train(config("opd", **kind), tmp_path / "loaded", progress=False)
    server.broken = 2
    train(config("opd", **kind, teacher=None, teacher_server=server.url), tmp_path / "served", progress=False)
    ours, theirs = (weights(tmp_path / run / "step-000005") for run in ("served", "loaded"))
    first = weights(Path(config("opd").origin))
    for name, tensor in theirs.items():
        assert torch.linalg.vector_norm(ours[name] - tensor) <= 1e-5 * torch.linalg.vector_norm(tensor), name
    assert any(not torch.equal(tensor, first[name]) for name, tensor in ours.items())
    logs = [callbacks.read_log(tmp_path / run) for run in ("served", "loaded")]
    steps = [[row["kl_teacher"] for row in log if row["event"] == "step"] for log in logs]
    assert steps[0] == pytest.approx(steps[1], rel=1e-4)
    assert [row["kl_teacher"] for row in logs[0] if row["event"] == "eval"] == [None] * 3


def test_what_does_not_fit_is_refused_before_anything_is_written(
    config: Callable[..., TrainConfig],
    server: Served,
    tmp_path: Path,
) -> None:
    asked = config("opd", teacher_server=server.url)

    def refused(match: str, asked: TrainConfig = asked) -> None:
        with pytest.raises(ConfigError, match=match):
            train(asked, tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()

    server.longest = 18  # prompts of 12 and completions of 6 leave no room for the one token more
    refused("--max-model-len 19")
    server.longest, server.shift = 64, 1
    refused("the-teacher.* expected the same")
    server.broken = 99
    refused("503")
    refused("does not answer", config("opd", teacher_server="http://127.0.0.1:9"))
    refused("expected an address", config("opd", teacher_server="localhost:8000"))
    with pytest.raises(ConfigError, match="expected sampled credit"):
        config("opd", teacher_server=server.url, credit="reverse_kl")
    with pytest.raises(ConfigError, match="rollouts by the student"):
        config("teacher", teacher_server=server.url)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_the_key_goes_to_no_other_address(code: int, server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on a GET, which urllib would repeat elsewhere with its headers, and not on a POST."""
    heard: list[str | None] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.headers.get("Authorization"))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"id": "the-teacher"}], "tokens": []}).encode())

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    other = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    monkeypatch.setenv("VLLM_API_KEY", "a-secret")
    there = f"http://localhost:{other.server_address[1]}/v1/models"

    def redirect(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        handler.send_header("Location", there)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    try:
        asked = served.ServedTeacher(server.url)
        server.raw = redirect
        for ask in (
            lambda: served.ServedTeacher(server.url),
            lambda: asked.logprobs(torch.tensor([[3, 4]]), torch.ones(1, 2), 1),
        ):
            with pytest.raises(ConfigError, match=r"redirects to .*localhost.*the server itself"):
                ask()
    finally:
        other.shutdown()
        other.server_close()
    assert heard == []


def answering(content: bytes, length: int | None = None, code: int = 200) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        handler.send_header("Content-Length", str(len(content) if length is None else length))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def logprobs(*values: str) -> bytes:
    each = ", ".join(f'{{"{token}": {{"logprob": {value}}}}}' for token, value in zip((4, 5), values, strict=True))
    return f'{{"choices": [{{"prompt_logprobs": [null, {each}]}}]}}'.encode()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (answering(logprobs("-1.0", "NaN")), "log-probability nan; expected a finite number"),
        (answering(logprobs("-Infinity", "-1.0")), "log-probability -inf"),
        (answering(logprobs("Infinity", "-1.0")), "log-probability inf"),
        (answering(logprobs("-1e999", "-1.0")), "log-probability -inf"),
        (answering(logprobs("0.5", "-1.0")), "log-probability 0.5"),
        (answering(logprobs('"-1.0"', "-1.0")), "log-probability -1.0"),
        (answering(logprobs("true", "-1.0")), "log-probability True"),
        (answering(logprobs("null", "-1.0")), "log-probability None"),
        (answering(logprobs("[-1.0]", "-1.0")), "log-probability"),
        (answering(b'{"choices": [{"prompt_logprobs": [null]}]}'), "for every token"),
        (answering(b'{"choices": [{"prompt_logprobs": {"1": 2}}]}'), "for every token"),
        (answering(b'{"choices": 7}'), "for every token"),
        (answering(b"[]"), "for every token"),
        (answering(b"null"), "for every token"),
        (answering(logprobs("-1.0", "-1.0")[:30]), "does not answer"),
        (answering(logprobs("-1.0", "-1.0"), length=10_000), "does not answer"),
        (answering(b"[" * 100_000), "does not answer"),
        (answering(b"\xff\xfe"), "does not answer"),
        (answering(b"", code=500), "500"),
        (answering(b"no", code=401), "401 no"),
    ],
)
def test_what_is_no_log_probability_is_refused(
    answer: Callable[[BaseHTTPRequestHandler], None], says: str, server: Served
) -> None:
    asked = served.ServedTeacher(server.url)
    server.raw = answer
    with pytest.raises(ConfigError, match=says):
        asked.logprobs(torch.tensor([[3, 4, 5]]), torch.ones(1, 3), 2)


def test_a_certain_token_may_be_rounded_above_one(server: Served) -> None:
    asked = served.ServedTeacher(server.url)
    server.raw = answering(logprobs("1e-7", "-2"))
    assert asked.logprobs(torch.tensor([[3, 4, 5]]), torch.ones(1, 3), 2).tolist() == [[0.0, -2.0]]


@pytest.mark.parametrize("models", [b'{"data": [{"id": 7}]}', b'{"data": []}', b'{"data": ["x"]}', b"3"])
def test_a_server_that_lists_no_model_is_refused(models: bytes, server: Served) -> None:
    server.raw = answering(models)
    with pytest.raises(ConfigError, match="lists no model"):
        served.ServedTeacher(server.url)


def test_wrong_types_before_the_run_are_refused(server: Served) -> None:
    tokenizer = server.tokenizer
    asked = served.ServedTeacher(server.url)
    for content in (b"7", b"{}", b'{"tokens": 5}', b'{"tokens": null}', b'{"tokens": [1, "x"]}'):
        server.raw = answering(content)
        with pytest.raises(ConfigError, match="expected"):
            asked.require_same_tokens(tokenizer, ["1+2="], 18)
    asked.model["max_model_len"] = "64"
    with pytest.raises(ConfigError, match="takes '64' tokens"):
        asked.require_same_tokens(tokenizer, [], 18)


def test_a_server_that_starts_again_does_not_end_training(server: Served) -> None:
    """Cut off in the middle of a header, then of an answer, then there."""
    asked = served.ServedTeacher(server.url)
    right = logprobs("-1.0", "-2.0")
    lines = [b"HTTP/1.1 200 OK\r\nContent-Le", b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + right[:9]]
    cuts = iter(lines)

    def cut(handler: BaseHTTPRequestHandler) -> None:
        line = next(cuts, None)
        if line is None:
            answering(right)(handler)
            return
        handler.wfile.write(line)
        handler.wfile.flush()
        handler.close_connection = True

    server.raw = cut
    assert asked.logprobs(torch.tensor([[3, 4, 5]]), torch.ones(1, 3), 2).tolist() == [[-1.0, -2.0]]
    assert next(cuts, None) is None
