"""Write output folders by the schema of the data files, with made-up numbers, for the tests of the report.

python tests/report_data.py KIND OUT     (KIND: compare, track, reproduce, still, single, large, bare, hostile)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>&'\"$\\x_{1}$[red]\x1b[31m"

# diagnostic, variant, value at the reference size, null, spread over matrices, exponent with which it follows the size
ROWS: tuple[tuple[str, str, float, float, float, float], ...] = (
    ("update_sparsity", "bf16_eta", 0.516, 0.505, 0.01, -0.2),
    ("update_sparsity", "bf16_exact", 0.516, 0.505, 0.01, -0.2),
    ("frobenius_norm", "", 0.452, 0.452, 0.05, 1),
    ("relative_norm", "", 0.0123, 0.0123, 0.001, 1),
    ("operator_norm", "", 0.181, 0.055, 0.02, 1),
    ("stable_rank", "", 5.1, 59.8, 0.8, 0),
    ("hill_exponent", "16", 2.9, 21.0, 0.3, 0),
    ("principal_angles", "left.max", 14.1, 13.8, 3.0, 0.5),
    ("principal_angles", "left.mean", 1.9, 2.5, 0.2, 1),
    ("principal_angles", "right.max", 12.2, 13.9, 3.0, 0.5),
    ("principal_angles", "right.mean", 1.8, 2.5, 0.2, 1),
    ("spectral_shift", "", 2.3e-4, 1.0e-4, 3e-5, 1.5),
    ("mask_overlap", "principal.0.5", 0.46, 0.465, 0.01, 0.1),
    ("mask_overlap", "low_magnitude.0.5", 0.58, 0.577, 0.01, -0.1),
    ("mask_overlap", "principal.0.3", 0.26, 0.264, 0.01, 0.1),
    ("mask_overlap", "low_magnitude.0.3", 0.37, 0.372, 0.01, -0.1),
    ("principal_energy", "left.64", 0.55, 0.333, 0.05, 0),
    ("principal_energy", "right.64", 0.74, 0.333, 0.05, 0),
    ("principal_energy", "both.64", 0.43, 0.111, 0.05, 0),
    ("bound_ratio", "mirsky", 0.32, 0.11, 0.03, 0),
    ("bound_ratio", "weyl", 0.61, 0.42, 0.05, 0),
    ("bound_ratio", "wedin", 0.21, 0.24, 0.05, 0),
)
FEW = ("update_sparsity", "relative_norm", "stable_rank", "principal_angles", "mask_overlap")  # a chart takes 0.1 s
SHARES = ("update_sparsity", "mask_overlap", "principal_energy", "subspace_similarity", "channel_energy")
SIZES = {"sft": 6.0, "sft-matched": 1.3, "opd": 1.0, "rlvr": 0.4, "": 1.0}


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


def summarise(rows: list[dict[str, Any]], rng: np.random.Generator) -> dict[str, Any]:
    """One row of summary.json from the rows of one checkpoint, diagnostic and variant."""
    name = rows[0]["diagnostic"]
    good = [r for r in rows if r["status"] == "computed"]
    out: dict[str, Any] = {
        "diagnostic": name,
        "variant": rows[0]["variant"],
        "weighting": "entries" if name == "update_sparsity" else "matrices",
    }
    values = np.array([r["value"] for r in good], dtype=float)
    for key, of in (
        ("mean", np.mean),
        ("median", np.median),
        ("p10", lambda v: np.quantile(v, 0.1)),
        ("p90", lambda v: np.quantile(v, 0.9)),
    ):
        out[key] = float(of(values)) if len(values) else None
    out |= {"computed": len(good), "total": len(rows), "null": None}
    nulls = [r["null_mean"] for r in good]
    if good and all(n is not None for n in nulls):
        excess = values - np.array(nulls)
        means = rng.choice(excess, (200, len(excess))).mean(axis=1)
        low, high = float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))
        margin = 0.02 if name in SHARES else 0.1 * abs(float(np.mean(nulls)))
        reading = (
            "size" if -margin < low and high < margin else "geometry" if low > margin or high < -margin else "unclear"
        )
        if name in ("frobenius_norm", "relative_norm"):
            reading = "by construction"
        out["null"] = {
            "kind": "walk" if name in ("subspace_similarity", "channel_energy") else "gaussian", "mean": float(np.mean(nulls)), "excess": float(excess.mean()),
            "low": low, "high": high, "margin": margin, "reading": reading,
        }  # fmt: skip
    out["roles"] = {}
    for role in dict.fromkeys(r["role"] for r in rows):
        part = [r["value"] for r in good if r["role"] == role]
        null = [r["null_mean"] for r in good if r["role"] == role and r["null_mean"] is not None]
        median, p10, p90 = np.quantile(part, (0.5, 0.1, 0.9)).tolist() if part else (None,) * 3
        out["roles"][role] = {
            "mean": float(np.mean(part)) if part else None, "median": median, "p10": p10, "p90": p90,
            "computed": len(part), "total": sum(r["role"] == role for r in rows), "null_mean": float(np.mean(null)) if null else None,
        }  # fmt: skip
    return out


def write(
    out: Path,
    checkpoints: Iterable[tuple[str, int | None]],
    *,
    layers: int = 4,
    roles: tuple[str, ...] = ROLES,
    nulls: bool = True,
    moved: bool = True,
    skipped: int = 0,
    prefix: str = "model.layers",
    base: str = "models/anchor",
    diagnostics: tuple[str, ...] | None = None,
) -> Path:
    """The four data files of `compare` (one checkpoint) or `track` (several), of all diagnostics or of some."""
    rng = np.random.default_rng(0)
    checkpoints = list(checkpoints)
    rows: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    last = max([s for _, s in checkpoints if s is not None] or [1])
    for checkpoint, step in checkpoints:
        arm = checkpoint.split("/")[0].split("-seed")[0] if "/" in checkpoint else ""
        share = 1.0 if step is None else step / last
        size = SIZES.get(arm, 1.0) * max(share, 0.02) ** 0.6
        table = list(ROWS)
        if len(checkpoints) > 1:
            table.append(("subspace_similarity", "final.16", 1 - 0.5 * (1 - share), 1 - 0.75 * (1 - share), 0.03, 0))
            table.append(
                ("subspace_similarity", "final.left.16", 1 - 0.6 * (1 - share), 1 - 0.8 * (1 - share), 0.03, 0)
            )
            table.append(("subspace_similarity", "final.4", 1 - 0.4 * (1 - share), 1 - 0.9 * (1 - share), 0.03, 0))
            table.append(("subspace_similarity", "previous.16", 0.9, 0.8, 0.03, 0))
            table.append(("channel_energy", "previous.16", 0.8, 0.3, 0.03, 0))
            table.append(("channel_energy", "previous.left.16", 0.7, 0.3, 0.03, 0))
        table = [row for row in table if diagnostics is None or row[0] in diagnostics]
        for layer in range(layers):
            for index, role in enumerate(roles):
                shape = (192, 512) if role == "down_proj" else (192, 192)
                matrix = f"{prefix}.{layer}.{role}.weight"
                for name, variant, value, null, spread, power in table:
                    value, null = value * size**power, null * size**power
                    value += spread * (rng.normal() + 0.5 * layer / layers + 0.1 * index) * min(1, size)
                    if name in (*SHARES, "bound_ratio"):
                        value, null = float(np.clip(value, 0.001, 0.999)), float(np.clip(null, 0.001, 0.999))
                    if name in ("frobenius_norm", "relative_norm"):
                        null = value
                    status, reason, got = "computed", None, abs(value)
                    if layer * len(roles) + index < skipped:
                        status, reason, got = "skipped", f"{matrix}: 3 entries are not finite", None
                    elif not moved:
                        got = {"update_sparsity": 1.0, "stable_rank": None, "hill_exponent": None, "mask_overlap": None,
                               "principal_energy": None, "subspace_similarity": None, "channel_energy": None, "bound_ratio": None}.get(name, 0.0)  # fmt: skip
                        if got is None:
                            status, reason = "undefined", "the matrix did not move"
                    elif name == "bound_ratio" and variant == "wedin" and layer == 0:
                        status, reason, got = (
                            "undefined",
                            "the gap between the spectra at rank 96 is not positive",
                            None,
                        )
                    if name == "subspace_similarity" and variant.startswith("final") and share == 1 and got is not None:
                        got = null = 1.0
                    with_null = nulls and got is not None and (moved or name in ("frobenius_norm", "relative_norm"))
                    rows.append({
                        "checkpoint": checkpoint, "step": step, "matrix": matrix, "layer": layer, "role": role, "rows": shape[0], "cols": shape[1],
                        "diagnostic": name, "variant": variant, "value": got, "error": None if got is None else 1e-12, "method": "dense float64",
                        "null_mean": (null if moved else 0.0) if with_null else None, "null_std": 0.02 * null if with_null else None,
                        "status": status, "reason": reason,
                    })  # fmt: skip
                base_sigma = 8 * np.exp(-np.arange(192) / 60)
                update = (
                    size * (0.2 * np.exp(-np.arange(192) / 6) + 0.02 * (1 - np.arange(192) / 192)) * (1 if moved else 0)
                )
                for curve, values in (
                    ("sigma_base", base_sigma), ("sigma_tuned", base_sigma + update * 0.1 * rng.normal(size=192)), ("sigma_update", update),
                    ("angle_left", np.linspace(0.01, 14, 96)), ("angle_right", np.linspace(0.01, 12, 96)),
                ):  # fmt: skip
                    curves.append(
                        {
                            "checkpoint": checkpoint,
                            "step": step,
                            "matrix": matrix,
                            "curve": curve,
                            "values": values.tolist(),
                        }
                    )
    out.mkdir(parents=True, exist_ok=True)
    schema = {"step": pl.Int64, "layer": pl.Int32, "rows": pl.Int64, "cols": pl.Int64, "value": pl.Float64, "error": pl.Float64,
              "null_mean": pl.Float64, "null_std": pl.Float64, "reason": pl.String}  # fmt: skip
    pl.DataFrame(rows, schema_overrides=schema, infer_schema_length=None).write_parquet(out / "measurements.parquet")
    pl.DataFrame(curves, schema_overrides={"step": pl.Int64}).write_parquet(out / "curves.parquet")
    summary = []
    for checkpoint, step in checkpoints:
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in rows:
            if row["checkpoint"] == checkpoint:
                groups.setdefault((row["diagnostic"], row["variant"]), []).append(row)
        summary.append(
            {"checkpoint": checkpoint, "step": step, "diagnostics": [summarise(g, rng) for g in groups.values()]}
        )
    steps = [step for _, step in checkpoints][:-1]
    locking = [
        {"run": "", "side": side, "rank": k, "steps": steps, "thresholds": [0.5, 0.7, 0.9], "step": [steps[0], steps[-1], None],
         "null_step": [steps[-1], None, None], "median_step": [steps[0], steps[0], None]}
        for side, k in (("right", 16), ("left", 16), ("right", 4))
        if steps and "/" not in checkpoints[0][0]
    ]  # fmt: skip
    write_json(out / "summary.json", {"checkpoints": summary} | ({"locking": locking} if locking else {}))

    def manifest(path: str) -> dict[str, Any]:
        files = [
            {
                "name": "model.safetensors",
                "bytes": 7123456,
                "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            }
        ]
        return {
            "path": path,
            "format": "hugging face folder",
            "dtypes": {"bfloat16": layers * len(roles)},
            "files": files,
        }

    pairing = {"measured": layers * len(roles), "base_only": [f"{prefix}.extra.weight"], "tuned_only": [],
               "not_selected": {"embedding": 1, "norm": 2 * layers + 1}, "tied": ["lm_head.weight"]}  # fmt: skip
    run: dict[str, Any] = {
        "opdgeo": "0.1.0", "command": ["opdgeo", "track" if len(checkpoints) > 1 else "compare", base, "run"], "started": "2026-01-05T10:00:00+00:00",
        "seconds": 12.34, "peak_memory_bytes": 512 * 2**20, "versions": {"python": "3.11.2", "torch": "2.13.0", "polars": "2.1.0"},
        "platform": "Linux x86_64", "device": "cpu",
        "settings": {"roles": "all", "rank": 512, "top_k": 16, "mask_rank": 64, "mask_share": [0.5, 0.3], "eta": 0.001, "nulls": 4 if nulls else 0},
        "timings": {"read": 0.51, "measure": 8.25, "nulls": 3.58},
    }  # fmt: skip
    arms = sorted({c.split("/")[0] for c, _ in checkpoints if "/" in c})
    if arms:
        run["arms"] = {
            a: {"base": manifest(base), "checkpoints": [manifest(c) | {"checkpoint": c, "step": s} for c, s in checkpoints if c.startswith(a + "/")],
                "pairing": pairing} for a in arms
        }  # fmt: skip
    else:
        run |= {
            "base": manifest(base),
            "pairing": pairing,
            "checkpoints": [manifest(f"run/{c}") | {"checkpoint": c, "step": s} for c, s in checkpoints],
        }
    write_json(out / "run.json", run)
    return out


ALIKE = ("sft-matched", "opd", "rlvr", "coin")


def write_reproduce(out: Path, seeds: int = 3) -> Path:
    """`reproduce`: four arms, several seeds, logs and claims."""
    rng = np.random.default_rng(1)
    names = ["sft", *(a if s == 0 else f"{a}-seed{s}" for a in ("sft-matched", "opd", "rlvr") for s in range(seeds))]
    write(
        out,
        [(f"{n}/step-{s:06d}", s) for n in names for s in ((60, 120, 240) if n == "sft" else (20, 60, 100))],
        layers=2,
        base="assets/base",
        diagnostics=(*FEW, "subspace_similarity", "channel_energy"),  # all are in `track`
    )
    ends = {"sft": 0.58, "sft-matched": 0.84, "opd": 0.74, "rlvr": 0.69}
    for name in names:
        arm, steps = name.split("-seed")[0], 240 if name == "sft" else 100
        lines = []
        for step in range(steps + 1):
            if step:
                lines.append({"event": "step", "step": step, "loss": 1 / step, "reward": None if "sft" in arm else 0.5, "completion_length": 21.5,
                              "kl_teacher": None, "grad_norm": 0.3, "learning_rate": 1e-4, "tokens": 2816, "seconds": 0.51})  # fmt: skip
            if step % 20 == 0:
                start = 0.18 if arm == "sft" else 0.58
                value = start + (ends[arm] - start) * (step / steps) ** 0.6 + 0.01 * rng.normal()
                lines.append({"event": "eval", "step": step, "accuracy_greedy": min(1, value + 0.1), "accuracy_sampled": value,
                              "kl_teacher": 0.4 * (1 - value), "completion_length": 22.0, "prompts": 2048, "loss": None})  # fmt: skip
        (out / "arms" / name).mkdir(parents=True)
        (out / "arms" / name / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))

    def arm_values(middle: dict[str, float], spread: float, null: dict[str, float | None]) -> dict[str, Any]:
        got = {}
        for arm, m in middle.items():
            values = (m + spread * rng.normal(size=1 if arm == "sft" else seeds)).tolist()
            mean = float(np.mean(values))
            got[arm] = {"mean": mean, "low": mean - spread, "high": mean + spread, "seeds": values, "null": null[arm]}
        return got

    def claim(
        id: str,
        text: str,
        verdict: str,
        unit: str,
        values: dict[str, float],
        spread: float,
        null: dict[str, float | None],
        paper: str,
    ) -> dict[str, Any]:
        judged = "OPD minus SFT above 0.02: 0.116 [0.0843, 0.155], met"
        controls = [
            (
                "matched SFT: OPD's start, learning rate, steps and sequences",
                {k: v for k, v in values.items() if k != "sft"},
                1,
            ),
            (
                f"beyond size: {'difference from' if unit == 'share' else 'ratio to'} the null in place of the value",
                values,
                0.1,
            ),
        ]
        return {
            "id": id, "claim": text, "rule": "Holds if all of these are met by their whole 95 % interval: OPD minus SFT above 0.02.",
            "verdict": verdict, "after_matching": "does not" if verdict != "inconclusive" else verdict,
            "after_matching_rule": "Still holds when the claim holds and holds under: equal norm.", "explanation": judged, "unit": unit, "paper": paper, "diagnostic": "stable_rank", "variants": [""],
            "at": "last checkpoint", "measured": arm_values(values, spread, null),
            "controls": [
                {"control": name, "verdict": outcome, "explanation": judged,
                 "measured": {a: {k: v for k, v in got.items() if k != "null"} for a, got in
                              arm_values({a: m * scale for a, m in part.items()}, spread, null).items()}}
                for (name, part, scale), outcome in zip(controls, ("fails", "inconclusive"), strict=True)
            ],
        }  # fmt: skip

    arms = ("sft", "sft-matched", "opd", "rlvr")
    claims = [
        claim("R1", "OPD updates fewer weights than SFT and more than RLVR (visible in bf16)", "holds", "share",
              dict(zip(arms, (0.081, 0.40, 0.516, 0.772), strict=True)), 0.01, dict(zip(arms, (0.08, 0.39, 0.51, 0.77), strict=True)),
              "unchanged: SFT 8.1 %, OPD 51.6 %, RLVR 77.2 %"),
        claim("R3", "Principal subspaces rotate most under SFT and least under RLVR", "inconclusive", "degrees",
              dict(zip(arms, (10.1, 1.4, 1.1, 0.4), strict=True)), 0.3, dict(zip(arms, (11.0, 1.5, 1.2, 0.45), strict=True)), "> 10°, ≈ 1°, < 0.5°"),
        claim("L1", "OPD's cumulative update stays in a narrow stable-rank band; SFT expands and RLVR contracts", "fails", "number",
              dict(zip(arms, (1.6, 1.1, 1.0, 0.9), strict=True)), 0.1, dict.fromkeys(arms, None), "stable rank against the step"),
    ]  # fmt: skip
    moved = {"start": {"mean": 0.58, "seeds": [0.58]}, "end": {"mean": 0.7412, "seeds": [0.7412]}}
    keys = ("accuracy_greedy", "accuracy_sampled", "kl_teacher", "completion_length")
    write_json(out / "claims.json", {
        "claims": claims, "seeds": list(range(seeds)), "preset": "tiny",
        "outcomes": {arm: {"prompts": 2048, **dict.fromkeys(keys, moved)} for arm in arms},
        "left_out": ["R2 (one teacher only)", "S1 (training held in the channel)"],
        "from_null": [
            {"arm": arm, "step": 100, "name": name, "seeds": 1 if arm == "sft" else seeds, "norm": 0.1, "value": x * y, "null": y, "ratio": ratio,
             "excess": x if ratio else x * y - y, **dict.fromkeys(("low", "high"))}
            | ({} if arm == "sft" else {"low": 0.9 * (x if ratio else x * y - y), "high": 1.1 * (x if ratio else x * y - y)})
            for x, arm in enumerate(arms, 2)
            for name, y, ratio in (("stable_rank", 60.0, True), ("mask_overlap.low_magnitude.0.5", 0.2, False),
                                   ("principal_angles.left.mean+right.mean", 1.5, True))
        ],
        "related": related(rng),
        "noise": {
            "rows": [noise_row("opd", 0.0251, 0.793)],
            "exploratory": [noise_row("coin", 0.02459, 0.8004)],
        },
    })  # fmt: skip
    return out


def related(rng: np.random.Generator) -> list[dict[str, Any]]:
    """How alike four arms are, and SFT in two seeds; OPD and RLVR move alike, the coin alone."""
    pairs = [(a, b) for i, a in enumerate(ALIKE) for b in ALIKE[i + 1 :]]
    rows = []
    for arm, other in (*pairs, ("sft", "sft-seed1")):
        cosine = 0.7 if "coin" not in (arm, other) else 0.03
        for diagnostic, variant, value, null, std in (
            ("update_cosine", "", cosine, 0.0, 0.0008), ("sign_agreement", "", 0.5 + 0.4 * cosine, 0.54, 0.001),
            ("visible_lift", "", 1.2, 1.1, 0.001), ("shared_subspace", "right.16", 0.6, 0.08, 0.006),
        ):  # fmt: skip
            value += 0.01 * rng.normal()
            rows.append(
                {"arm": arm, "other": other, "diagnostic": diagnostic, "variant": variant, "over": "entries", "value": value,
                 "low": value - 0.02, "high": value + 0.02, "null": null, "null_std": std, "seeds": [0, 1], "reason": None}
            )  # fmt: skip
    return rows


def noise_row(arm: str, norm: float, unchanged: float) -> dict[str, Any]:
    """A row of the table above the verdicts, its null a little larger than each value."""
    values = {
        "unchanged": unchanged,
        "stable_rank": 4.9,
        "angle": 0.85,
        "shift": 0.0023,
        "low_magnitude": 0.527,
        "similarity": 0.73,
    }
    nulls = {f"{name}_null": 1.01 * value for name, value in values.items()}
    return {
        "name": arm,
        "arm": arm,
        "seeds": [0],
        "learning_rate": 1e-4,
        "steps": 100,
        "sequences": 64,
        "norm": norm,
        **values,
        **nulls,
    }


def build(kind: str, out: Path) -> Path:
    """A folder of one of the kinds named at the top."""
    one, run = [("step-000100", 100)], [(f"step-{s:06d}", s) for s in (20, 40, 60, 80, 100)]
    match kind:
        case "compare":
            return write(out, one, skipped=2)
        case "track":
            return write(out, run)
        case "reproduce":
            return write_reproduce(out)
        case "still":
            return write(out, one, moved=False)
        case "single":
            return write(out, [("tuned", None)], layers=1, roles=("c_attn",))
        case "large":
            return write(out, one, layers=36)
        case "bare":
            return write(out, run[::2], nulls=False, diagnostics=(*FEW, "subspace_similarity"))
        case "hostile":
            return write(
                out,
                [(HOSTILE + "1", None), (HOSTILE + "2", None)],
                layers=2,
                roles=("q_proj", HOSTILE),
                prefix=HOSTILE,
                base=HOSTILE,
                diagnostics=FEW,
            )
    raise ValueError(f"unknown kind {kind!r}")


def keep(out: Path, diagnostics: tuple[str, ...]) -> None:
    """Leave only these in the data files."""
    table = pl.read_parquet(out / "measurements.parquet").filter(pl.col("diagnostic").is_in(diagnostics))
    table.write_parquet(out / "measurements.parquet")
    summary = json.loads((out / "summary.json").read_text())
    for checkpoint in summary["checkpoints"]:
        checkpoint["diagnostics"] = [row for row in checkpoint["diagnostics"] if row["diagnostic"] in diagnostics]
    (out / "summary.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    build(sys.argv[1], Path(sys.argv[2]))
