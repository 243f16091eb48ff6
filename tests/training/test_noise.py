"""The noise controls: rewards of a fair coin, and the teacher's gap with random signs, in one credit and in real training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from opdgeo import tasks
from opdgeo.errors import ConfigError
from opdgeo.experiments import noise
from opdgeo.experiments.rules import EXPLORATORY
from opdgeo.experiments.study import BY_NAME, configure
from opdgeo.report.markdown import _limits
from opdgeo.survey.results import MEASUREMENTS
from opdgeo.training import advantages, callbacks
from opdgeo.training.advantages import coin_rewards, group_advantages, random_signs, token_advantages
from opdgeo.training.config import TrainConfig
from opdgeo.training.train import train
from tiny_models import assert_bit_equal, weights

NOISE = {
    "coin": {"rollouts": "student", "alpha": 0.0, "credit": "coin"},
    "random_sign": {"rollouts": "student", "alpha": 1.0, "credit": "random_sign"},
}


def test_coins_and_their_advantages_worked_by_hand() -> None:
    noise_G = torch.tensor([0.1, 0.7, 0.49, 0.2, 0.9, 0.5, 0.6, 0.99], dtype=torch.float64)
    coin_G = coin_rewards(noise_G)
    assert coin_G.tolist() == [1, 0, 1, 1, 0, 0, 0, 0]
    # Three of four: mean 3/4, std (n − 1) 1/2; the second group is flat.
    expected = torch.tensor([0.5, -1.5, 0.5, 0.5, 0, 0, 0, 0], dtype=torch.float64) * 0.5 / (0.5 + 1e-4)
    adv_G = group_advantages(coin_G, 4)
    torch.testing.assert_close(adv_G, expected)
    mask_BT = torch.tensor([[1, 1, 0]] * 8)
    adv_BT = token_advantages(None, adv_G, mask_BT, 0.0)
    torch.testing.assert_close(adv_BT, expected[:, None] * mask_BT)


def test_random_signs_worked_by_hand() -> None:
    adv_BT = torch.tensor([[1.0, -2.0, 0.5], [0.25, 0.0, -3.0]])
    noise_BT = torch.tensor([[0.2, 0.3, 0.5], [0.8, 0.1, 0.49]])
    assert random_signs(adv_BT, noise_BT).tolist() == [[-1.0, 2.0, 0.5], [0.25, 0.0, 3.0]]


def test_noise_is_fair_and_keeps_every_size() -> None:
    generator = torch.Generator().manual_seed(0)
    coin_G = coin_rewards(torch.rand(40_000, generator=generator))
    assert abs(float(coin_G.mean()) - 0.5) < 4 * 0.5 / 200
    pairs = coin_G.view(-1, 2)
    both = float((pairs[:, 0] * pairs[:, 1]).mean())
    assert abs(both - 0.25) < 4 * (0.25 * 0.75 / 20_000) ** 0.5, "neighbours are independent"
    gap_BT = torch.randn(200, 200, generator=generator)
    turned_BT = random_signs(gap_BT, torch.rand(200, 200, generator=generator))
    torch.testing.assert_close(turned_BT.abs(), gap_BT.abs())
    assert abs(float(turned_BT.mul(gap_BT.sign()).mean())) < 4 / 200


@pytest.mark.parametrize(
    "changes",
    [
        {"credit": "coin", "alpha": 1.0},
        {"credit": "coin", "alpha": 0.0, "dynamic_sampling": True},
        {"credit": "random_sign", "alpha": 0.5},
        {"credit": "random_sign", "token_share": 0.5},
    ],
)
def test_noise_is_not_mixed(changes: dict[str, Any], config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ConfigError, match="credit is"):
        config("opd", **changes)


def credits(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The token credits of every step that is trained from now on."""
    seen: list[torch.Tensor] = []
    original = advantages.token_advantages

    def noted(*arguments: Any) -> torch.Tensor:
        seen.append(original(*arguments))
        return seen[-1]

    monkeypatch.setattr(advantages, "token_advantages", noted)
    return seen


def test_the_coin_follows_the_seed_and_neither_verifier_nor_text(
    config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, seen = type(tasks.load("arithmetic", {})), credits(monkeypatch)
    for name, verdict, changes in (
        ("right", 1.0, {}),
        ("wrong", 0.0, {}),
        ("other", 0.0, {"seed": 1}),
        ("texts", 0.0, {"data_seed": 5}),
    ):
        monkeypatch.setattr(task, "verify", lambda self, completion, answer, verdict=verdict: verdict)
        train(config("rlvr", credit="coin", eval_prompts=0, **changes), tmp_path / name, progress=False)
    steps = config("rlvr").steps
    right, _, other, texts = ([adv_BT[:, 0] for adv_BT in seen[i * steps :][:steps]] for i in range(4))
    assert_bit_equal(tmp_path / "right" / "step-000005", tmp_path / "wrong" / "step-000005")
    assert all(torch.equal(a, b) for a, b in zip(right, texts, strict=True)), "other prompts, the same coins"
    assert not all(torch.equal(a, b) for a, b in zip(right, other, strict=True)), "another seed, other coins"
    assert len({tuple(a.tolist()) for a in right}) == steps, "every step tosses anew"
    assert max(float(a.view(-1, 4).sum(1).abs().max()) for a in right) < 1e-5, "relative to the group"
    rewards = [r["reward"] for r in callbacks.read_log(tmp_path / "right") if r["event"] == "step"]
    assert rewards == [1.0] * steps, "the log's reward stays the verifier's"
    moved = weights(tmp_path / "right" / "step-000005")
    before = weights(Path(config("rlvr").origin))
    assert max(float((moved[n] - before[n]).abs().max()) for n in moved) > 1e-3, "noise moves the weights"


def test_random_signs_turn_the_gap_of_every_token_alone(
    config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = credits(monkeypatch)
    for name, credit in (("plain", "sampled"), ("turned", "random_sign")):
        asked = config("opd", credit=credit, steps=1, sequences_per_step=64, checkpoints=(1.0,), eval_prompts=0)
        train(asked, tmp_path / name, progress=False)
    plain_BT, turned_BT = seen
    torch.testing.assert_close(turned_BT.abs(), plain_BT.abs())
    kept_BT, tokens_BT = (turned_BT == plain_BT) & (plain_BT != 0), plain_BT != 0
    share = float(kept_BT.sum() / tokens_BT.sum())
    assert abs(share - 0.5) < 4 * 0.5 / float(tokens_BT.sum()) ** 0.5
    mixed_B = kept_BT.any(1) & (tokens_BT & ~kept_BT).any(1)
    assert float(mixed_B.float().mean()) > 0.5, "signs differ within a completion"


@pytest.mark.parametrize("kind", NOISE)
def test_a_stopped_run_resumes_with_the_same_noise(
    kind: str, config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config("opd", **NOISE[kind], resume_every=1, seed=3, micro_batch=4)
    whole = train(asked, tmp_path / "whole", progress=False)
    on_step_end = callbacks.Recorder.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(callbacks.Recorder, "on_step_end", stop)
        train(asked, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "step-000005").exists()
    assert_bit_equal(train(asked, tmp_path / "run", resume=True, progress=False), whole)


def test_the_noise_arms_have_the_budget_of_the_arm_they_control(tmp_path: Path) -> None:
    for control, like in (("coin", "rlvr"), ("opd-random-sign", "opd")):
        ours, theirs = (configure(BY_NAME[name], 2, "tiny", tmp_path) for name in (control, like))
        assert set(ours.differences(theirs)) == {"arm", "credit"}


def planted_rows(arm: str, lr: float, steps: int) -> list[dict[str, Any]]:
    """Two matrices, of 4 and of 12 entries, at two checkpoints; every diagnostic is 1 in the first, 3 in the second, less at first."""
    rows = []
    for matrix, entries, value in (("a", 4, 1.0), ("b", 12, 3.0)):
        for step, part in ((20, 0.5), (steps, 1.0)):
            for quantity in noise.COLUMNS.values():
                for variant in quantity.variants:
                    number = lr * (steps * entries) ** 0.5 * value if quantity.diagnostic == "frobenius_norm" else value
                    rows.append(
                        dict.fromkeys(MEASUREMENTS)
                        | {
                            "checkpoint": f"{arm}/step-{step:06d}", "step": step, "matrix": matrix, "rows": 2, "cols": entries // 2,
                            "diagnostic": quantity.diagnostic, "variant": variant, "value": part * number, "null_mean": 0.1,
                        }
                    )  # fmt: skip
    return rows


def test_the_table_is_the_mean_over_matrices_and_persistence_that_of_a_walk(tmp_path: Path) -> None:
    table = pl.DataFrame(planted_rows("coin", 1e-4, 100), schema=MEASUREMENTS, orient="row")
    run = {"name": "coin", "arm": "coin", "seeds": [0], "learning_rate": 1e-4, "steps": 100}
    (row,) = noise.table(table, [run])
    assert row["persistence"] == pytest.approx(2.0), "once and three times as long as a walk"
    assert row["stable_rank"] == pytest.approx(2.0) and row["stable_rank_null"] == pytest.approx(0.1)
    assert row["unchanged"] == pytest.approx((4 * 1 + 12 * 3) / 16), "over entries"
    assert row["similarity"] == pytest.approx(1.0), "of the first checkpoint"
    assert row["norm"] == pytest.approx(1e-3 * (2 + 3 * 12**0.5) / 2) and "norm_null" not in row


def test_a_study_shows_its_own_noise_or_the_packages(tmp_path: Path) -> None:
    rows = [row for arm in ("opd", "rlvr", "sft-matched", "coin") for row in planted_rows(arm, 1e-4, 100)]
    table = pl.DataFrame(rows, schema=MEASUREMENTS, orient="row")
    configs = {arm: configure(BY_NAME[arm], 0, "tiny", tmp_path) for arm in ("opd", "rlvr", "sft-matched", "coin")}
    own = noise.beside(table, configs, configs, "tiny")
    assert [row["arm"] for row in own["rows"]] == ["coin", "opd", "rlvr", "sft-matched"] and own["exploratory"] == []
    plain = noise.beside(table, configs, ["opd", "rlvr"], "tiny")
    assert plain["exploratory"] == noise.packaged()["rows"]
    assert noise.beside(table, configs, ["opd", "rlvr"], "smollm2")["exploratory"] == []


def test_the_packaged_table_is_made_from_the_numbers_in_the_repository() -> None:
    """By another route: means of the stored numbers a matrix, weighed by entries for the unchanged share."""
    docs = Path(__file__).parents[2] / "docs"
    packaged = noise.packaged()
    assert packaged["command"] == noise.COMMAND and noise.COMMAND in (docs / "protocol.md").read_text()
    assert packaged["rows"] and all(set(row["seeds"]) <= set(EXPLORATORY) for row in packaged["rows"])
    runs = [row for row in packaged["rows"] if "source" not in row]
    assert json.loads(noise.content(runs)) == packaged, "and the early check's numbers where a run is missing"
    stored = pl.read_parquet(docs / "results" / "noise.parquet") if runs else pl.DataFrame()
    for row in runs:
        mine = stored.filter(pl.col("checkpoint").str.starts_with(f"{row['name']}-seed{noise.SEED}/"))
        first, last = mine["step"].min(), mine["step"].max()
        assert last == row["steps"]
        for name, quantity in noise.COLUMNS.items():
            at = first if name == "similarity" else last
            part = mine.filter(
                pl.col("diagnostic") == quantity.diagnostic,
                pl.col("variant").is_in(quantity.variants),
                pl.col("step") == at,
            ).drop_nulls("value")
            counts = (part["rows"] * part["cols"]).to_numpy().astype(float) if name == "unchanged" else None
            assert row[name] == pytest.approx(float(np.average(part["value"].to_numpy(), weights=counts))), (
                row["name"],
                name,
            )
    text = (docs / "results/earlier-study.md").read_text()
    for line in _limits({"noise": {"rows": [], "exploratory": packaged["rows"]}}):
        assert line in text, "the earlier study opens with what `opdgeo report --markdown` writes"
