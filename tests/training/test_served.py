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
from opdgeo.training.run import train
from tiny_models import weights


class Served(ThreadingHTTPServer):
    """The teacher of `folder`; `broken` requests fail first, `longest` is what it says of its room."""

    def __init__(self, folder: Path, longest: int = 64):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.longest, self.broken, self.shift, self.lock = longest, 0, 0, threading.Lock()

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
    kind = {"token_share": 0.5, "alpha": 0.7, "eval_prompts": 4, "learning_rate": 1e-3}
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
