"""Two real processes (gloo) against one: the same weights, from whole checkpoints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import opdgeo
from opdgeo.diagnostics import Settings
from opdgeo.errors import ConfigError
from opdgeo.training import callbacks, distributed, rollouts
from opdgeo.training.config import TrainConfig
from opdgeo.training.train import train
from program import launch
from tiny_models import assert_bit_equal, weights

Make = Callable[..., TrainConfig]
KINDS = ("sft", "opd", "rlvr")
# The verifier never accepts what a random model writes, so here an answer is right when it is short.
SCRIPT = """
import sys
from pathlib import Path
import torch
from accelerate.state import GradientState
from opdgeo.tasks.arithmetic import Arithmetic
from opdgeo.training import callbacks
from opdgeo.training.config import TrainConfig
from opdgeo.training.train import train
Arithmetic.verify = lambda self, completion, answer: float(len(completion) < 5)
for run in map(Path, sys.argv[1:]):
    asked = TrainConfig.from_json(run.with_suffix(".json").read_text())
    train(asked, run, progress=True)
# The last one once more, broken off before its second step and resumed.
begin = callbacks.Recorder.on_step_begin
def dies(self, args, state, control, **more):
    if state.global_step == 1:
        raise KeyboardInterrupt
    begin(self, args, state, control, **more)
callbacks.Recorder.on_step_begin = dies
again = run.with_name("again")
try:
    train(asked, again, progress=False)
except KeyboardInterrupt:
    # A resume is another launch: nobody is still at the first one, and no micro-batch of it is remembered.
    torch.distributed.barrier()
    GradientState._reset_state()
    callbacks.Recorder.on_step_begin = begin
    assert (again / "resume").is_dir() and not (again / "step-000002").exists()
    train(asked, again, resume=True, progress=False)
else:
    raise AssertionError("it was not broken off")
"""


def short_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    from opdgeo.tasks.arithmetic import Arithmetic

    monkeypatch.setattr(Arithmetic, "verify", lambda self, completion, answer: float(len(completion) < 5))


def settings(kind: str, config: Make, **changes: Any) -> TrainConfig:
    # Adam divides by the root of the second moment: with the usual 1e-8, an entry whose gradient is zero but for rounding
    # moves by a whole step in the direction of that rounding.
    fixed: dict[str, Any] = dict(
        steps=2, checkpoints=(0.3, 1.0), eval_prompts=3, eval_prompts_between=3, eval_batch=2, adam_epsilon=1e-4,
        resume_every=1,
    )  # fmt: skip
    return config(kind, **fixed | changes)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, config: Make) -> dict[str, Path]:
    """Each arm on one process, with its rollouts recorded."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        short_is_right(patch)
        for kind in KINDS:
            train(settings(kind, config, record_rollouts=kind != "sft"), folder / kind, progress=False)
    return {kind: folder / kind for kind in KINDS}


def test_forked_ranks_have_the_environment_that_accelerate_launch_gives(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, pathlib, sys\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(json.dumps(dict(os.environ)))\n"
    )
    given = {}
    for cold in (True, False):
        (out := tmp_path / str(cold)).mkdir()
        launch("fsdp2", 2, script, out, cold=cold)
        given[cold] = [json.loads((out / rank).read_text()) for rank in ("0", "1")]
    for real, forked in zip(given[True], given[False], strict=True):
        del forked["MASTER_PORT"]
        assert {key: real.get(key) for key in forked} == forked
        known = {key for key in real if key.startswith(("ACCELERATE_", "FSDP_"))}
        assert known and known <= forked.keys()


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_processes_change_nothing_but_rounding_and_resume_to_the_same_weights(
    name: str,
    alone: dict[str, Path],
    config: Make,
    tmp_path: Path,
) -> None:
    for kind in KINDS:
        changes = {} if kind == "sft" else {"rollouts": str(alone[kind] / rollouts.FILE)}
        (tmp_path / f"{kind}.json").write_text(settings(kind, config, micro_batch=2, **changes).to_json())
    (tmp_path / "script.py").write_text(SCRIPT)
    launch(name, 2, tmp_path / "script.py", *(tmp_path / kind for kind in KINDS))

    for kind in KINDS:
        last, first = weights(tmp_path / kind / "step-000002"), weights(Path(settings(kind, config).origin))
        theirs = weights(alone[kind] / "step-000002")
        assert last.keys() == theirs.keys()
        for tensor, ours in last.items():
            assert (ours - theirs[tensor]).norm() <= 1e-5 * theirs[tensor].norm(), (kind, tensor)
        moved = [tensor for tensor in theirs if not torch.equal(theirs[tensor], first[tensor])]
        assert len(moved) == len(theirs), kind
        files = {p.name for p in alone[kind].iterdir()} - {rollouts.FILE}
        assert {p.name for p in (tmp_path / kind).iterdir()} == files  # resume/ is gone, nothing partial is left
        logs = [callbacks.read_log(run) for run in (tmp_path / kind, alone[kind])]
        assert [(r["event"], r["step"]) for r in logs[0]] == [(r["event"], r["step"]) for r in logs[1]]
        for ours_, theirs_ in zip(*logs, strict=True):
            for value in ("loss", "reward", "grad_norm", "accuracy_greedy", "completion_length"):
                sampled = ours_["event"] == "eval" and value == "completion_length"  # other samples on two processes
                if isinstance(ours_.get(value), float) and not sampled:
                    assert ours_[value] == pytest.approx(theirs_[value], rel=1e-4, abs=1e-6), (kind, ours_)
        measured = opdgeo.compare(first_of(config), tmp_path / kind / "step-000002", settings=Settings(nulls=0))
        assert measured.measurements["matrix"].n_unique() == 14 and not measured.skipped
    assert_bit_equal(tmp_path / "again" / "step-000002", tmp_path / KINDS[-1] / "step-000002")


def first_of(config: Make) -> str:
    return config("sft").origin


def test_a_replay_repeats_the_recorded_run(
    alone: dict[str, Path],
    config: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short_is_right(monkeypatch)
    rows = [json.loads(line) for line in (alone["rlvr"] / rollouts.FILE).read_text().splitlines()]
    assert [row["step"] for row in rows] == [1] * 8 + [2] * 8
    assert all(len(row["completion_ids"]) <= 6 and row["prompt"].endswith("=") for row in rows)
    # Another seed would draw other prompts and other completions; the file decides instead.
    asked = settings("rlvr", config, rollouts=str(alone["rlvr"] / rollouts.FILE), seed=5, record_rollouts=True)
    last = weights(train(asked, tmp_path / "again", progress=False))
    for name, value in weights(alone["rlvr"] / "step-000002").items():
        torch.testing.assert_close(last[name], value, rtol=1e-5, atol=1e-6)
    assert (tmp_path / "again" / rollouts.FILE).read_text() == (alone["rlvr"] / rollouts.FILE).read_text()


def test_a_file_of_rollouts_is_checked_line_by_line(alone: dict[str, Path], config: Make, tmp_path: Path) -> None:
    lines = (alone["opd"] / rollouts.FILE).read_text().splitlines()
    file = tmp_path / "changed.jsonl"
    row = json.loads(lines[1])
    for change, message in {
        json.dumps({**row, "completion_ids": [48]}): "line 2 of .* outside the model's vocabulary",
        json.dumps({**row, "answer": 3}): "line 2 of .* expected step, prompt",
        "{": "line 2",
        json.dumps({**row, "prompt": "another"}): "8 completions for step 1; expected 8, 4 for each prompt",
        lines[1] + "\n" + lines[1]: "9 completions for step 1; expected 8",
    }.items():
        file.write_text("\n".join([lines[0], change, *lines[2:]]) + "\n")
        with pytest.raises(ConfigError, match=message):
            train(
                settings("opd", config, rollouts=str(file), eval_prompts=0), tmp_path / f"{len(change)}", progress=False
            )
    with pytest.raises(ConfigError, match="no file of rollouts"):
        train(settings("opd", config, rollouts=str(tmp_path / "none.jsonl")), tmp_path / "none", progress=False)


def test_flat_groups_are_replaced(
    config: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short_is_right(monkeypatch)
    flat = {}
    for drop in (False, True):
        out = tmp_path / str(drop)
        asked = settings(
            "rlvr", config, steps=3, dynamic_sampling=drop, record_rollouts=True, sequences_per_step=16, eval_prompts=0
        )
        train(asked, out, progress=False)
        rows = [json.loads(line) for line in (out / rollouts.FILE).read_text().splitlines()]
        from opdgeo.tasks import characters

        texts = characters.tokenizer().batch_decode([row["completion_ids"] for row in rows], skip_special_tokens=True)
        groups = [{len(text) < 5 for text in texts[i : i + 4]} for i in range(0, len(texts), 4)]
        flat[drop] = sum(len(group) == 1 for group in groups)
        assert len(groups) == 12
        dropped = [row.get("dropped_groups") for row in callbacks.read_log(out) if row["event"] == "step"]
        assert all(d is None for d in dropped) != drop
    assert flat[False] > 0 and flat[True] == 0 and sum(dropped) > 0, (flat, dropped)


def test_what_stays_flat_does_not_count_in_the_mean(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Doubling a batch with groups that teach nothing changes nothing."""
    from opdgeo.tasks.arithmetic import Arithmetic
    from opdgeo.training.policy import TokenCredit

    seen: list[torch.Tensor] = []
    credit = TokenCredit.advantages

    def spy(self: Any, trainer: Any, rows: Any, batch: Any) -> Any:
        found = credit(self, trainer, rows, batch)
        seen.append(found.sum(1) / batch["completion_mask"].sum(1))
        return found

    monkeypatch.setattr(TokenCredit, "advantages", spy)
    # Only one prompt of the run can ever have variance: with every other one the answer is always wrong.
    first: list[str] = []

    def verify(self: Any, completion: str, answer: str) -> float:
        first.append(answer)
        return float(answer == first[0] and first.count(answer) % 2)

    monkeypatch.setattr(Arithmetic, "verify", verify)
    asked = settings(
        "rlvr", config, dynamic_sampling=True, steps=1, sequences_per_step=16, eval_prompts=0, checkpoints=(1.0,),
        record_rollouts=True,
    )  # fmt: skip
    train(asked, tmp_path / "run", progress=False)
    again = dataclasses.replace(asked, rollouts=str(tmp_path / "run" / rollouts.FILE))
    train(again, tmp_path / "again", progress=False)
    advantages, replayed = seen
    torch.testing.assert_close(replayed, advantages)
    groups = advantages.unflatten(0, (4, 4))
    informative = groups.abs().sum(1) > 0
    assert informative.sum() == 1
    # A group's advantages have unit variance (n − 1), here times the four groups of which one counts.
    assert groups[informative].std() == pytest.approx(4.0, rel=1e-2)


def test_several_updates_share_a_rollout(config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short_is_right(monkeypatch)
    asked = settings("rlvr", config, rollout_prompts=5, record_rollouts=True, eval_prompts=0, steps=3)
    assert asked.updates_per_rollout == 2  # 20 completions, 8 a step: the last 4 would be half a batch
    train(asked, tmp_path / "run", progress=False)
    rows = [json.loads(line) for line in (tmp_path / "run" / rollouts.FILE).read_text().splitlines()]
    assert [row["step"] for row in rows] == [1] * 16 + [3] * 16

    # Killed inside a rollout: what it goes on from is the end of the one before, or other completions would follow.
    asked = dataclasses.replace(asked, steps=4)
    whole = weights(train(asked, tmp_path / "whole", progress=False))
    with monkeypatch.context() as patch:
        log = callbacks.Recorder.on_log

        def dies(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                raise KeyboardInterrupt
            log(self, args, state, control, **kwargs)

        patch.setattr(callbacks.Recorder, "on_log", dies)
        with pytest.raises(KeyboardInterrupt):
            train(asked, tmp_path / "killed", progress=False)
    for name, value in weights(train(asked, tmp_path / "killed", resume=True, progress=False)).items():
        assert torch.equal(value, whole[name]), name
    names = [tmp_path / run / rollouts.FILE for run in ("killed", "whole")]
    assert names[0].read_text() == names[1].read_text()
    with pytest.raises(ConfigError, match="rollout_prompts is 1; expected 0, or at least 2"):
        config("rlvr", rollout_prompts=1)


def test_batches_must_divide_among_the_processes(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="sequences_per_step is 8 and 3 processes share them"):
        distributed.batch_sizes(config("sft"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.batch_sizes(config("sft")) == (4, 1)
    assert distributed.batch_sizes(config("sft", micro_batch=2)) == (2, 2)
    assert distributed.batch_sizes(config("sft", micro_batch=8)) == (4, 1)
