"""A teacher on machines of its own: vLLM serves it, and the trainer asks for the log-probabilities of the tokens it sampled.

    vllm serve Qwen/Qwen3-32B --tensor-parallel-size 4 --max-model-len 10241
    opdgeo train opd … --set teacher_server=http://host:8000

It is asked through the server's `/v1/completions` with `prompt_logprobs`, by token ids, so nothing is tokenised twice; a key in
VLLM_API_KEY is sent along. The server answers for one token a position: enough for the sampled token's credit and not for
divergences over the whole vocabulary, which need the teacher's weights.
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from torch import Tensor

from opdgeo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 32  # requests under way; the server makes batches of them
SECONDS = 600  # for one answer
PAUSES = (1, 5, 25)  # seconds before it is asked again, where it does not answer


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
            self.model = self._ask("/v1/models")["data"][0]
            self.name: str = self.model["id"]
        except (LookupError, TypeError):
            raise ConfigError(f"{self.url} lists no model; expected a vLLM server (vllm serve MODEL).") from None

    def require_same_tokens(self, tokenizer: PreTrainedTokenizerBase, texts: list[str], longest: int) -> None:
        """Check that the server's model reads `texts` and ends them as the student does, and takes sequences of `longest` tokens.

        Raises:
            ConfigError: it does not.
        """
        room = self.model.get("max_model_len")
        if room is not None and room <= longest:
            raise ConfigError(
                f"the teacher at {self.url} takes {room} tokens; expected {longest + 1}, the longest prompt and completion and one "
                f"more. Start it with --max-model-len {longest + 1}."
            )
        for text in texts:
            asked = {"model": self.name, "prompt": text, "add_special_tokens": False}
            theirs, ours = (
                self._ask("/tokenize", asked)["tokens"],
                tokenizer(text, add_special_tokens=False)["input_ids"],
            )
            if theirs != ours:
                raise ConfigError(
                    f"the teacher at {self.url} ({self.name}) reads {text[:40]!r} as the tokens {theirs[:8]}…, the student as "
                    f"{ours[:8]}…; expected the same. Choose a teacher that was trained with the student's tokenizer."
                )
        end = self._ask("/detokenize", {"model": self.name, "tokens": [tokenizer.eos_token_id]})["prompt"]
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
            return [float(at[str(token)]["logprob"]) for token, at in zip(ids[1:], each[1:], strict=True)]
        except (LookupError, TypeError, ValueError):
            raise ConfigError(
                f"{self.url} gives no log-probability for every token of a prompt; expected a vLLM server, whose "
                "/v1/completions has prompt_logprobs."
            ) from None

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data, headers)
        pauses = iter(PAUSES)
        while True:
            try:
                with urlopen(request, timeout=SECONDS) as answer:
                    return json.load(answer)
            except HTTPError as error:
                pause = next(pauses, None) if error.code >= 500 else None
                if pause is None:
                    said = error.read(400).decode(errors="replace")
                    raise ConfigError(f"the teacher's server refuses {self.url}{path}: {error.code} {said}") from None
            except (OSError, ValueError) as error:  # no connection, or no JSON
                pause = next(pauses, None)
                if pause is None:
                    raise ConfigError(
                        f"the teacher's server at {self.url} does not answer ({error}); expected vLLM serving the teacher. Start "
                        "it, and go on with --resume where the run had begun."
                    ) from None
            time.sleep(pause)
