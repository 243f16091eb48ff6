"""Any family of reasoning-gym (extra `opdgeo[tasks]`): procedurally generated problems with a verifier.

reasoning-gym gives partial credit; the reward here is 1 for a full score and 0 for anything less. The answer stands between
``<answer>`` and ``</answer>``, as the prompt says. A problem belongs to the held-out split by a checksum of its question.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from opdgeo.errors import ConfigError
from opdgeo.tasks import Example, distinct, in_held_out

AT_ONCE = 1_000_000  # problems of one seed; they are generated as they are asked for
INSTRUCTION = "\nGive the final answer between <answer> and </answer>."


class ReasoningGym:
    """The task as trainers see it (`opdgeo.tasks.Task`): `family` and the family's own options, such as min_terms.

    `Example.answer` is "seed:index" of the problem, from which reasoning-gym makes it again to score a completion.

    Raises:
        ConfigError: reasoning-gym is missing, there is no such family, or it does not take the options.
    """

    def __init__(self, family: str = "chain_sum", **options: Any) -> None:
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ConfigError(
                "the task `reasoning_gym` needs the package reasoning-gym, which is not installed; try: pip install 'opdgeo[tasks]'"
            )
        self.family, self.options = family, options
        self._data: dict[int, Any] = {}
        self._dataset(0)

    def _dataset(self, seed: int) -> Any:
        if seed not in self._data:
            import reasoning_gym

            try:
                self._data[seed] = reasoning_gym.create_dataset(self.family, seed=seed, size=AT_ONCE, **self.options)
            except (ValueError, TypeError, AssertionError) as error:
                raise ConfigError(
                    f"reasoning-gym does not make {self.family!r} with the options {self.options}: {error}; expected one of its "
                    "families (reasoning_gym.factory.DATASETS) and that family's options."
                ) from None
        return self._data[seed]

    @property
    def verifiable(self) -> bool:
        return True

    @property
    def prompted(self) -> bool:
        return True

    def examples(self, count: int, seed: int, *, held_out: bool) -> list[Example]:
        data = self._dataset(seed)

        def drawn() -> Iterator[Example]:
            for index in range(AT_ONCE):
                entry = data[index]
                if in_held_out(entry["question"]) == held_out:
                    completion = f"<answer>{entry['answer']}</answer>"
                    yield Example(entry["question"] + INSTRUCTION, completion, f"{seed}:{index}")

        return distinct(drawn(), count)

    def verify(self, completion: str, answer: str) -> float:
        from reasoning_gym.utils import extract_answer

        seed, _, index = answer.partition(":")
        given = extract_answer(completion)
        data = self._dataset(int(seed))
        return float(given is not None and data.score_answer(given, entry=data[int(index)]) >= 1.0)
