"""Token gradients against autograd one by one, second moments against their definition, the formulas by enumeration, and the command."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from markupsafe import escape
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from opdgeo.checkpoints import Matrix, open_checkpoint, pair
from opdgeo.errors import ConfigError
from opdgeo.experiments import gradient_moments as module
from opdgeo.numerics import moments
from opdgeo.report import write_report
from opdgeo.training import advantages, gradients
from opdgeo.training.evaluation import Completions
from program import run_opdgeo

torch.set_num_threads(1)

# Three sequences: prompts of 3, 2 and 4 tokens padded on the left, completions of 4, 2 and 1 tokens padded on the right.
PROMPTS, LENGTHS, START, WIDTH = (3, 2, 4), (4, 2, 1), 4, 4


def sequences() -> Completions:
    generator = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(1, 20, (3, START + WIDTH), generator=generator)
    attention_BL = torch.zeros_like(ids_BL)
    for i, (before, after) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        attention_BL[i, START - before : START + after] = 1
    return Completions(ids_BL * attention_BL, attention_BL, START)


def qwen(folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=20, hidden_size=12, intermediate_size=10, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, max_position_embeddings=32, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return Qwen3ForCausalLM.from_pretrained(folder).eval()


def gpt2(folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_embd=12, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return GPT2LMHeadModel.from_pretrained(folder).eval()


def brute_force(model: PreTrainedModel, matrix: Matrix, done: Completions) -> torch.Tensor:
    """∇ log p of every completion token (B, T, m, n): one backward pass a token, of the parameter itself."""
    parameter = dict(model.named_parameters())[matrix.tensor]
    parameter.requires_grad_(True)
    found = torch.zeros(*done.mask_BT.shape, matrix.rows, matrix.cols)
    for b, t in itertools.product(*map(range, done.mask_BT.shape)):
        if not done.mask_BT[b, t]:
            continue
        logits = model(input_ids=done.ids_BL[b : b + 1], attention_mask=done.attention_BL[b : b + 1]).logits[0]
        logp = logits[done.start + t - 1].log_softmax(-1)[done.ids_BL[b, done.start + t]]
        (gradient,) = torch.autograd.grad(logp, parameter)
        gradient = gradient.T if matrix.transposed else gradient
        found[b, t] = gradient[matrix.start : matrix.start + matrix.rows]
    parameter.requires_grad_(False)
    return found


@pytest.mark.parametrize("make", [qwen, gpt2])
def test_token_gradients_are_autograds(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, done = make(tmp_path), sequences()
    opened = open_checkpoint(tmp_path)
    matrices = pair(opened, opened).matrices
    assert len(matrices) == (14 if make is qwen else 12)
    found = gradients.token_gradients(model, matrices, done)
    for matrix in matrices:
        x_BLn, delta_BTLm = found[matrix.name]
        token_BTmn = torch.einsum("btlm,bln->btmn", delta_BTLm, x_BLn)
        torch.testing.assert_close(token_BTmn, brute_force(model, matrix, done), rtol=1e-4, atol=1e-6)
    # An early layer's gradient of a token comes from earlier positions too: a position is not a token.
    _, delta_BTLm = found[matrices[1].name]
    assert delta_BTLm[0, 3, : START + 2].abs().max() > 0


def factors(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (B, L, n), δ (B, T, L, m) and φ (B, T, m, n) without a model."""
    generator = torch.Generator().manual_seed(seed)
    x_BLn = torch.randn(4, 6, 5, generator=generator)
    delta_BTLm = torch.randn(4, 3, 6, 7, generator=generator)
    return x_BLn, delta_BTLm, torch.einsum("btlm,bln->btmn", delta_BTLm, x_BLn)


def test_second_moments_are_their_definitions() -> None:
    x_BLn, delta_BTLm, token_BTmn = factors()
    credit_OBT = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    p_B, q_B = torch.rand(4), torch.rand(4)
    found = moments.accumulate(x_BLn, delta_BTLm, credit_OBT, [(0, 1)], credit_OBT[:1], [(1, 0, p_B, q_B)])
    g_OBmn = torch.einsum("obt,btmn->obmn", credit_OBT, token_BTmn)
    right = [(g.mT @ g).sum(0) for g in g_OBmn]
    left = [(g @ g.mT).sum(0) for g in g_OBmn]
    cross = g_OBmn[0].mT @ g_OBmn[1], g_OBmn[0] @ g_OBmn[1].mT
    alone_BTmn = credit_OBT[0][..., None, None] * token_BTmn
    token_Bnn = (alone_BTmn.mT @ alone_BTmn).sum(1)
    blend = (p_B[:, None, None] * (g_OBmn[1].mT @ g_OBmn[1]) + q_B[:, None, None] * token_Bnn).sum(0)
    expected = [*right, *((c + c.mT).sum(0) for c in cross[:1]), token_Bnn.sum(0), blend]
    torch.testing.assert_close(found.right_Rnn, torch.stack(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found.left_Omm, torch.stack([*left, (cross[1] + cross[1].mT).sum(0)]), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(found.mean_Omn, g_OBmn.sum(1), rtol=1e-4, atol=1e-4)


def sample(token_share: float = 0.5) -> tuple[torch.Tensor, ...]:
    """S, T, mask and rewards of the four sequences of `factors`, of 3, 3, 2 and 3 tokens."""
    generator = torch.Generator().manual_seed(2)
    mask_BT = (torch.arange(3) < torch.tensor([3, 3, 2, 3])[:, None]).long()
    student_BT, teacher_BT = torch.randn(2, 4, 3, generator=generator)
    return student_BT, teacher_BT, mask_BT, torch.tensor([1.0, 0.0, 0.0, 1.0])


@pytest.mark.parametrize("alpha", [0.75, 0.5, 0.01])
def test_the_mixture_formula_is_exact(alpha: float) -> None:
    x_BLn, delta_BTLm, _ = factors()
    student_BT, teacher_BT, mask_BT, reward_G = sample()
    opd_BT = advantages.distillation_advantages(student_BT, teacher_BT, mask_BT, mask_BT.float())
    adv_G = advantages.group_advantages(reward_G, 2)
    credit = torch.stack([advantages.token_advantages(opd_BT, adv_G, mask_BT, a) for a in (1.0, 0.0, alpha)])
    found = moments.accumulate(x_BLn, delta_BTLm, credit, [(0, 1)], credit[:0], [])
    for opd, rlvr, mixed, cross in (found.right_Rnn, found.left_Omm):
        predicted = alpha**2 * opd + (1 - alpha) ** 2 * rlvr + alpha * (1 - alpha) * cross
        torch.testing.assert_close(mixed, predicted, rtol=1e-4, atol=1e-4)
        assert (mixed - predicted + alpha * (1 - alpha) * cross).norm() > 0.01 * mixed.norm()  # the cross term counts


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_random_masks_have_the_predicted_moment_and_the_same_mean_gradient(share: float) -> None:
    """By enumeration: every ordering of the noise is equally likely."""
    x_BLn, delta_BTLm, _ = factors()
    student_BT, teacher_BT, mask_BT, _ = sample()
    full_BT = advantages.distillation_advantages(student_BT, teacher_BT, mask_BT, mask_BT.float())
    whole = moments.accumulate(x_BLn, delta_BTLm, full_BT[None], [], full_BT[:0, None], [])
    drawn = []
    for order in itertools.permutations((0.1, 0.5, 0.9)):
        keep_BT = advantages.keep_tokens(
            student_BT - teacher_BT, mask_BT, share, "random", torch.tensor(order).expand(4, 3)
        )
        masked_BT = advantages.distillation_advantages(student_BT, teacher_BT, mask_BT, keep_BT)
        drawn.append(moments.accumulate(x_BLn, delta_BTLm, masked_BT[None], [], masked_BT[:0, None], []))
    mean = torch.stack([d.mean_Omn[0] for d in drawn]).mean(0)
    torch.testing.assert_close(mean, whole.mean_Omn[0], rtol=1e-4, atol=1e-4)

    # the same through the weights that the command uses
    done = Completions(torch.zeros(4, 4, dtype=torch.long), torch.cat([torch.ones(4, 1), mask_BT], 1).long(), 1)
    p_B, q_B = module.mask_weights(done.mask_BT.sum(1), share)
    predicted = moments.accumulate(x_BLn, delta_BTLm, full_BT[None], [], full_BT[None], [(0, 0, p_B, q_B)])
    measured = torch.stack([d.right_Rnn[0] for d in drawn]).mean(0)
    torch.testing.assert_close(predicted.right_Rnn[-1], measured, rtol=1e-4, atol=1e-4)

    top_BT = advantages.keep_tokens(student_BT - teacher_BT, mask_BT, share, "top")
    top_BT = advantages.distillation_advantages(student_BT, teacher_BT, mask_BT, top_BT)
    top = moments.accumulate(x_BLn, delta_BTLm, top_BT[None], [], top_BT[:0, None], [])
    assert (top.mean_Omn[0] - whole.mean_Omn[0]).norm() > 0.1 * whole.mean_Omn[0].norm()


def test_estimates_find_a_planted_covariance_from_few_samples() -> None:
    """g of covariance diag(4, 4, 0, …) in 40 dimensions has effective rank 2; isotropic g has 40. Uncorrected, 30 samples show fewer."""
    rng, size, blocks = np.random.default_rng(0), 40, 30
    sums: dict[str, list[torch.Tensor]] = {"narrow": [], "wide": [], "twin": []}
    scale = np.zeros(size)
    scale[:2] = 2.0
    for name, std in (("narrow", scale), ("wide", np.ones(size)), ("twin", np.ones(size))):
        for _ in range(blocks):
            g = rng.normal(size=(2, size)) * std
            sums[name].append(torch.from_numpy(g.T @ g))
    entries = {k: torch.stack(v) for k, v in sums.items()}
    products = moments.Products(entries, dict.fromkeys(entries, np.full(blocks, 2.0)))
    counts = moments.draws(blocks, 300, 0)

    def rank(name: str) -> np.ndarray:
        trace = entries[name].diagonal(dim1=1, dim2=2).sum(1).numpy()
        sizes = products.sizes[name]
        return moments.unequal(np.outer(trace, trace), sizes, sizes, counts) / products.inner(name, name, counts)

    assert rank("narrow")[0] == pytest.approx(2, rel=0.1)
    low, high = np.quantile(rank("wide")[1:], [0.025, 0.975])
    assert low < 40 < high
    whole = entries["wide"].sum(0)
    assert whole.trace() ** 2 / whole.square().sum() < 30  # what few samples would have us believe
    assert products.cosine("wide", "twin", counts)[0] == pytest.approx(1, abs=0.1)
    assert products.cosine("narrow", "wide", counts)[0] == pytest.approx(math.sqrt(2 * 40) / 40, abs=0.05)
    assert (
        products.reliability("wide", moments.halves(blocks, 50, 0))
        < 0.75
        < 0.9
        < products.reliability("narrow", moments.halves(blocks, 50, 0))
    )


def test_a_draw_of_one_block_estimates_nothing() -> None:
    counts = np.array([[4.0, 0, 0, 0], [1, 1, 1, 1]])
    found = moments.unequal(np.eye(4) + 1, np.ones(4), np.ones(4), counts)
    assert np.isnan(found[0]) and found[1] == pytest.approx(1)


def test_the_group_advantage_is_trls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opdgeo.experiments.presets import train_config
    from opdgeo.tasks.arithmetic import Arithmetic
    from opdgeo.training.policy import TokenCredit
    from opdgeo.training.train import train

    seen = []
    original = TokenCredit.advantages

    def spy(self: TokenCredit, trainer: Any, rows: Any, batch: dict[str, Any]) -> torch.Tensor:
        found = original(self, trainer, rows, batch)
        lengths = batch["completion_mask"].sum(1)
        seen.append((found, batch["completion_mask"], (lengths % 3 == 0).float()))
        return found

    def verify(self: Arithmetic, completion: str, answer: str) -> float:
        tokens = len(completion) + (len(completion) < 6)  # a completion that ended has an end token too
        return float(tokens % 3 == 0)

    monkeypatch.setattr(TokenCredit, "advantages", spy)
    monkeypatch.setattr(Arithmetic, "verify", verify)
    config = train_config(
        "rlvr", "tiny", origin="tiny/base", steps=1, sequences_per_step=16, generations=4, max_tokens=6, eval_prompts=0,
        device="cpu",
    )  # fmt: skip
    train(config, tmp_path / "run", progress=False)
    (advantages_BT, mask_BT, reward_G), *_ = seen
    ours = advantages.token_advantages(None, advantages.group_advantages(reward_G, 4), mask_BT, 0.0)
    assert ours.abs().max() > 0
    torch.testing.assert_close(advantages_BT, ours)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("signals") / "out"
    return out, command(out)


def command(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    few = ("--prompts", 4, "--generations", 2, "--roles", "k_proj", "--layers", 3)
    return run_opdgeo("signals", "tiny/base", *few, "-o", out, *more)


def test_the_command_leaves_tables_a_page_and_findings(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = finished
    assert done.returncode == 0, done.stderr
    assert "effective rank" in done.stdout and "Masking tokens" in done.stdout
    assert sorted(p.name for p in out.iterdir()) == [
        "report.html", "run.json", "signals.json", "signals.parquet", "signals_spectra.parquet",
    ]  # fmt: skip
    table = pl.read_parquet(out / "signals.parquet")
    assert dict(table.schema) == module.SIGNALS
    assert table.filter(pl.col("value").is_null())["reason"].null_count() == 0
    for quantity in ("second_moment", "effective_rank", "alignment", "weight_alignment", "mean_share", "credit_std"):
        known = table.filter((pl.col("quantity") == quantity) & (pl.col("objective") == "opd"))
        assert len(known) and known["value"].null_count() == 0, quantity
    run = json.loads((out / "run.json").read_text())
    assert run["settings"]["seed"] == 0 and run["checkpoints"][0]["checkpoint"] == "tiny/base"
    spectra = pl.read_parquet(out / "signals_spectra.parquet")
    for values in spectra["values"].to_list():
        assert sum(values) == pytest.approx(1) and values == sorted(values, reverse=True)
    page = (out / "report.html").read_text()
    assert "tiny/base" in page and "<svg" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_the_name_of_a_checkpoint_stays_text(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    out, name = shutil.copytree(finished[0], tmp_path / "out"), "<script>alert(1)</script>\"'&\u05e9 \U0001f600"
    for file in ("signals.json", "run.json"):
        text = (out / file).read_text()
        (out / file).write_text(text.replace('"tiny/base"', json.dumps(name)))
    for file in ("signals.parquet", "signals_spectra.parquet"):
        pl.read_parquet(out / file).with_columns(checkpoint=pl.lit(name)).write_parquet(out / file)
    page = write_report(out).read_text(encoding="utf-8")
    assert f"<h2>{escape(name)}</h2>" in page and page.count("<script") == 1


def test_a_finished_group_is_not_measured_again(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = dict(prompts=4, generations=2, roles="k_proj", layers="3", out=tmp_path)
    first = module.signals("tiny/base", **arguments)  # type: ignore[arg-type]
    assert first.signals.equals(pl.read_parquet(finished[0] / "signals.parquet"))  # the same in another process

    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(module, "block_sums", refuse)
    again = module.signals("tiny/base", **arguments)  # type: ignore[arg-type]
    assert again.signals.equals(first.signals) and again.spectra.equals(first.spectra)
    with pytest.raises(AssertionError, match="measured again"):
        module.signals("tiny/base", **{**arguments, "seed": 1})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompts", "3"], "at least 4"),
        (["--layers", "9"], "no layer 9"),
        (["--layers", "x"], "numbers such as 0,3"),
        (["--task", "docstrings"], "no verifier"),
    ],
)
def test_what_cannot_be_met_is_refused(more: list[str], message: str, tmp_path: Path) -> None:
    flags = dict(zip(more[::2], more[1::2], strict=True))
    arguments: dict = {k.removeprefix("--"): int(v) if v.isdigit() and k != "--layers" else v for k, v in flags.items()}
    with pytest.raises(ConfigError, match=message):
        module.signals("tiny/base", **{"prompts": 4, **arguments})
