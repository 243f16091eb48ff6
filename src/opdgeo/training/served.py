"""A teacher on machines of its own: vLLM serves it, and the trainer asks for the log-probabilities of the tokens it sampled.

    vllm serve Qwen/Qwen3-32B --tensor-parallel-size 4 --max-model-len 10241
    opdgeo train opd … --set teacher_server=http://host:8000

It is asked through the server's `/v1/completions` with `prompt_logprobs`, by token ids, so nothing is tokenised twice; a key in
VLLM_API_KEY is sent along, to the address that was given and no other: redirections are not followed. What it answers is
checked: a log-probability is a finite number of at most 0. Where it does not answer, or with an error of its own (5xx), it
is asked again after a pause, for about five minutes in all, in which it can be started again. The server answers for one token a position: enough for the sampled token's credit and not for
divergences over the whole vocabulary, which need the teacher's weights.
"""

from __future__ import annotations

import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException, IncompleteRead
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

import torch
from torch import Tensor

from opdgeo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 32  # requests under way; the server makes batches of them
SECONDS = 600  # for one answer
PAUSES = (1, 4, 15, 40, 80, 160)  # seconds before it is asked again, where it does not answer
LARGEST = 1 << 28  # bytes of an answer; one about 10^5 tokens has a tenth of that
ROUNDING = 1e-3  # a log-probability may be so much above 0


class _NoRedirection(HTTPRedirectHandler):
    """A redirection is an answer like any other, here an error: to follow it would send the key to another address."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = build_opener(_NoRedirection)


class ServedTeacher:
    """The model behind `url`, the first that the server lists.

    Raises:
        ConfigError: the server does not answer, or answers with something else than vLLM does.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"teacher_server is {url!r}; expected an address such as http://localhost:8000.")
        try:
            self.model: dict[str, Any] = self._ask("/v1/models")["data"][0]
            self.name: str = self.model["id"]
            if not isinstance(self.name, str):
                raise TypeError
        except (LookupError, TypeError):
            raise ConfigError(f"{self.url} lists no model; expected a vLLM server (vllm serve MODEL).") from None

    def require_same_tokens(self, tokenizer: PreTrainedTokenizerBase, texts: list[str], longest: int) -> None:
        """Check that the server's model reads `texts` and ends them as the student does, and takes sequences of `longest` tokens.

        Raises:
            ConfigError: it does not.
        """
        room = self.model.get("max_model_len")
        if room is not None and type(room) is not int:
            raise ConfigError(
                f"{self.url} says that its model takes {room!r} tokens; expected a whole number, as vLLM does."
            )
        if room is not None and room <= longest:
            raise ConfigError(
                f"the teacher at {self.url} takes {room} tokens; expected {longest + 1}, the longest prompt and completion and one "
                f"more. Start it with --max-model-len {longest + 1}."
            )
        for text in texts:
            asked = {"model": self.name, "prompt": text, "add_special_tokens": False}
            theirs = self._field("/tokenize", asked, "tokens")
            ours = tokenizer(text, add_special_tokens=False)["input_ids"]
            if theirs != ours:
                raise ConfigError(
                    f"the teacher at {self.url} ({self.name}) reads {text[:40]!r} as the tokens {str(theirs)[:40]}…, the student as "
                    f"{str(ours)[:40]}…; expected the same. Choose a teacher that was trained with the student's tokenizer."
                )
        end = self._field("/detokenize", {"model": self.name, "tokens": [tokenizer.eos_token_id]}, "prompt")
        if end != tokenizer.eos_token:
            raise ConfigError(
                f"the token {tokenizer.eos_token_id} ends the student's completions, and to the teacher at {self.url} it is "
                f"{end!r}; expected {tokenizer.eos_token!r}. Choose a teacher that was trained with the student's tokenizer."
            )

    def logprobs(self, ids_BL: Tensor, attention_BL: Tensor, tokens: int) -> Tensor:
        """log p (B, tokens) of the last `tokens` columns given what stands before them, at temperature 1; 0 on padding.

        A row is a prompt, padded on the left, and a completion, padded on the right (`tokens` columns).
        """
        keep_BL = attention_BL.bool()
        rows = [ids[keep].tolist() for ids, keep in zip(ids_BL, keep_BL, strict=True)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(self._sequence, rows))
        found_BT = torch.zeros(len(rows), tokens, dtype=torch.float32)
        for row, (answer, keep) in enumerate(zip(answers, keep_BL, strict=True)):
            length = int(keep[-tokens:].sum())
            if length:
                found_BT[row, :length] = torch.tensor(answer[-length:])
        return found_BT.to(ids_BL.device)

    def _sequence(self, ids: list[int]) -> list[float]:
        """log p of every token but the first."""
        asked = {"model": self.name, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        try:
            each = self._ask("/v1/completions", asked)["choices"][0]["prompt_logprobs"]
            found = [at[str(token)]["logprob"] for token, at in zip(ids[1:], each[1:], strict=True)]
        except (LookupError, TypeError, ValueError):
            raise ConfigError(
                f"{self.url} gives no log-probability for every token of a prompt; expected a vLLM server, whose "
                "/v1/completions has prompt_logprobs."
            ) from None
        for token, logp in zip(ids[1:], found, strict=True):
            if type(logp) not in (int, float) or not -math.inf < logp <= ROUNDING:
                raise ConfigError(
                    f"{self.url} says that token {token} has the log-probability {str(logp)[:40]}; expected a finite number of at most 0. "
                    "Is the teacher's arithmetic sound (dtype, quantisation)? Start another one, and go on with --resume."
                )
        return [float(min(logp, 0.0)) for logp in found]

    def _field(self, path: str, body: dict[str, Any], name: str) -> Any:
        answer = self._ask(path, body)
        if not isinstance(answer, dict) or name not in answer:
            raise ConfigError(
                f"{self.url}{path} answers {str(answer)[:80]!r}; expected an object with {name!r}, as vLLM gives."
            )
        return answer[name]

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        pauses = iter(PAUSES)
        while True:
            try:
                with _OPENER.open(Request(self.url + path, data, headers), timeout=SECONDS) as answer:
                    content = answer.read(LARGEST + 1)
                    if answer.length and len(content) <= LARGEST:
                        raise IncompleteRead(content, answer.length)
                if len(content) <= LARGEST:
                    return json.loads(content)
                why = f"an answer of more than {LARGEST >> 20} MiB"
                pause = None
            except HTTPError as error:
                pause = next(pauses, None) if error.code >= 500 else None
                if pause is None:
                    raise ConfigError(self._refusal(path, error)) from None
            except (OSError, HTTPException, ValueError, RecursionError) as error:  # no connection, cut off, or no JSON
                pause, why = next(pauses, None), str(error) or type(error).__name__
            if pause is None:
                raise ConfigError(
                    f"the teacher's server at {self.url} does not answer ({why}); expected vLLM serving the teacher. Start "
                    "it, and go on with --resume where the run had begun."
                )
            time.sleep(pause)

    def _refusal(self, path: str, error: HTTPError) -> str:
        if 300 <= error.code < 400:
            to = str(error.headers.get("Location"))[:200]
            return (
                f"the teacher's server at {self.url}{path} redirects to {to!r} ({error.code}); expected an answer, because requests, which "
                "carry a key, go to the address that was given and no other. Set teacher_server to the server itself."
            )
        try:
            said = error.read(400).decode(errors="replace")
        except (OSError, HTTPException):
            said = ""
        return f"the teacher's server refuses {self.url}{path}: {error.code} {said}"
