"""The base's factors on disk: the same numbers with and without, whoever shares the folder."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import planted
from opdgeo.diagnostics import Base, Settings
from opdgeo.errors import ConfigError
from opdgeo.numerics.masks import Threshold
from opdgeo.numerics.spectra import spectrum
from opdgeo.survey.cache import SpectrumCache
from program import run_opdgeo, run_python

SHAPES = {"self_attn.q_proj": (288, 256), "mlp.up_proj": (400, 256), "mlp.down_proj": (256, 400)}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    base = {planted.tensor_name(0, module): planted.weights(rng, *shape) for module, shape in SHAPES.items()}
    tuned = {name: w + 1e-4 * rng.standard_normal(w.shape) for name, w in base.items()}
    return tuple(  # type: ignore[return-value]
        planted.write_checkpoint(tmp_path / name, weights, "bfloat16")
        for name, weights in (("base", base), ("tuned", tuned))
    )


def test_a_second_run_reads_the_factors_and_writes_the_same_bytes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    outs = [tmp_path / name for name in ("without", "cold", "warm", "damaged", "first", "second")]
    done = run_opdgeo("compare", *pair, "-o", outs[0], "--no-report", "--no-cache", env={"OPDGEO_CACHE": str(folder)})
    assert done.returncode == 0
    assert not folder.exists()

    def run(out: Path) -> None:
        done = run_opdgeo("compare", *pair, "-o", out, "--no-report", env={"OPDGEO_CACHE": str(folder)})
        assert done.returncode == 0, done.stderr

    run(outs[1])
    kept = sorted(folder.iterdir())
    assert len(kept) == len(SHAPES)
    before = [f.stat().st_ino for f in kept]
    run(outs[2])
    assert [f.stat().st_ino for f in sorted(folder.iterdir())] == before, "a warm run wrote factors again"
    kept[0].write_bytes(kept[0].read_bytes()[:1000])
    run(outs[3])
    assert sorted(folder.iterdir()) == kept
    for f in kept:
        f.unlink()
    with ThreadPoolExecutor(2) as both:
        list(both.map(run, outs[4:]))
    assert sorted(folder.iterdir()) == kept, "two processes left something else than whole entries"
    for out in outs[1:]:
        for file in ("measurements.parquet", "curves.parquet", "summary.json"):
            assert (out / file).read_bytes() == (outs[0] / file).read_bytes(), (out.name, file)


def test_cache_lists_and_clears(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = str(tmp_path / "cache")
    done = run_opdgeo(
        "compare", *pair, "-o", tmp_path / "out", "--no-report", "--nulls", 0, env={"OPDGEO_CACHE": folder}
    )
    assert done.returncode == 0
    listed = run_opdgeo("cache", env={"OPDGEO_CACHE": folder})
    assert f"{len(SHAPES)} spectra" in listed.stdout
    assert len(listed.stdout.splitlines()) == len(SHAPES) + 1
    cleared = run_opdgeo("cache", "clear", env={"OPDGEO_CACHE": folder})
    assert "freed" in cleared.stdout
    assert "0 spectra" in run_opdgeo("cache", env={"OPDGEO_CACHE": folder}).stdout


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    weights = [torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    found, limits = spectrum(weights[0].double(), 16), {"low_magnitude.0.3": Threshold(0.1 + 0.2, 1 / 3, False)}
    cache = SpectrumCache(tmp_path, limit=10**9)
    paths = [cache.path(w, 16) for w in weights]
    assert len(set(paths)) == 3
    for age, path in zip((30, 20, 10), paths, strict=True):
        cache.save(path, found, limits)
        assert path is not None
        os.utime(path, (1000 - age, 1000 - age))
    assert cache.load(paths[0]) is not None  # used just now: the second is the oldest
    size = cache.entries()[0][1]
    cache.limit = int(2.5 * size)
    cache.save(paths[2], found, limits)
    assert [p is not None and p.exists() for p in paths] == [True, False, True]
    loaded, thresholds = cache.load(paths[0]) or (None, None)
    assert loaded is not None
    assert thresholds == limits
    assert torch.equal(loaded.sigma, found.sigma)
    assert (loaded.error, loaded.method, loaded.gram, loaded.rest) == (
        found.error,
        found.method,
        found.gram,
        found.rest,
    )


def test_the_key_is_the_content_its_type_and_the_rank(tmp_path: Path) -> None:
    cache = SpectrumCache(tmp_path)
    w = torch.ones(256, 256)
    keys = [cache.path(w, 16), cache.path(w, 8), cache.path(w.double(), 16), cache.path(w.T.reshape(512, 128), 16)]
    assert len(set(keys)) == 4
    assert cache.path(w.clone(), 16) == keys[0]
    assert cache.path(torch.ones(8, 8), 16) is None


def test_thresholds_serve_the_masks_they_were_found_for_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.randn(256, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    settings = Settings(mask_rank=16)
    cold, warm, other = (
        Base(weights, settings),
        Base(weights, settings),
        Base(weights, replace(settings, mask_share=(0.2,))),
    )
    assert cold.principal is not None
    masks = {"low": cold.low_magnitude, "principal": cold.principal}
    assert set(cold.thresholds) == {f"{m}.{s}" for m in ("low_magnitude", "principal.16") for s in (0.5, 0.3)}
    warm.thresholds = other.thresholds = dict(cold.thresholds)
    assert int(other.low_magnitude[0.2].codes.bool().sum()) >= round(0.2 * weights.numel())
    # Another device's scores: the threshold itself is none of them, so it is found anew.
    moved = Base(weights, settings)
    moved.thresholds = {
        n: replace(t, value=t.value * (1 + 1e-15)) for n, t in cold.thresholds.items() if "principal" in n
    }
    assert moved.thresholds != {n: t for n, t in cold.thresholds.items() if "principal" in n}
    assert {s: m.threshold for s, m in (moved.principal or {}).items()} == {
        s: m.threshold for s, m in cold.principal.items()
    }
    monkeypatch.setattr("opdgeo.numerics.masks.thresholds", None)  # not called again
    assert warm.principal is not None
    for name, again in (("low", warm.low_magnitude), ("principal", warm.principal)):
        for share, mask in masks[name].items():
            assert torch.equal(mask.codes, again[share].codes)
            assert mask.threshold == again[share].threshold
    with pytest.raises(TypeError):
        _ = Base(weights, settings).low_magnitude


def test_a_limit_that_is_no_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPDGEO_CACHE_GB", "plenty")
    with pytest.raises(ConfigError, match="OPDGEO_CACHE_GB is 'plenty'"):
        SpectrumCache()
    assert run_opdgeo("cache", env={"OPDGEO_CACHE_GB": "plenty"}).returncode == 2


def test_the_large_synthetic_pair_at_a_small_size(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "large_pair.py"
    options = ("--shrink", "64", "--layers", "2")
    made = run_python(script, tmp_path, *options)
    assert made.returncode == 0, made.stderr
    done = run_opdgeo(
        "compare", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "out", "--nulls", 0, "--no-report"
    )
    assert done.returncode == 0, done.stderr
    table = pl.read_parquet(tmp_path / "out" / "measurements.parquet")
    assert table["matrix"].n_unique() == 14
    assert set(table["status"]) == {"computed"}
    assert set(table.filter(role="gate_proj")["rows"]) == {192}
