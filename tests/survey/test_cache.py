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
from program import run_opdgeo, run_python, start_python

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
    assert (folder / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55\n")
    (folder / "CACHEDIR.TAG").unlink()
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
    assert (loaded.error, loaded.method, loaded.gram, loaded.tail_bound) == (
        found.error,
        found.method,
        found.gram,
        found.tail_bound,
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
    assert set(table.filter(pl.col("diagnostic") != "hill_exponent")["status"]) == {"computed"}
    tails = table.filter(diagnostic="hill_exponent")  # the update is smaller than the spacing of bf16 numbers
    assert all("within the rounding of the stored weights" in reason for reason in tails["reason"])
    assert set(table.filter(role="gate_proj")["rows"]) == {192}


def kept(folder: Path) -> tuple[SpectrumCache, Path]:
    """A cache of one entry."""
    cache, weights = SpectrumCache(folder), torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    path = cache.path(weights, 16)
    assert path is not None
    cache.save(path, spectrum(weights.double(), 16), {"low_magnitude.0.3": Threshold(0.1, 1 / 3, False)})
    assert cache.load(path) is not None
    return cache, path


def test_a_flipped_bit_is_never_believed(tmp_path: Path) -> None:
    cache, path = kept(tmp_path / "cache")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    places = [*range(8, 400, 3), *rng.integers(400, len(whole), 60).tolist(), len(whole) - 1]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        found = cache.load(path)
        if found is not None:  # the header says the same in another way, such as a space that became a tab
            spectrum_, limits = found
            path.write_bytes(whole)
            right, right_limits = cache.load(path) or (None, None)
            assert right is not None
            assert torch.equal(spectrum_.sigma, right.sigma) and torch.equal(spectrum_.left, right.left)
            assert limits == right_limits and spectrum_.error == right.error
    other = path.with_name("0" * 64 + path.suffix)
    other.write_bytes(whole)
    assert cache.load(other) is None, "an entry under another one's name"
    path.write_bytes(whole)
    assert cache.load(path) is not None


def test_a_damaged_entry_is_computed_again(pair: tuple[Path, Path], tmp_path: Path) -> None:
    outs, folder = [tmp_path / "first", tmp_path / "second"], str(tmp_path / "cache")
    for out in outs:
        done = run_opdgeo("compare", *pair, "-o", out, "--no-report", "--nulls", 0, env={"OPDGEO_CACHE": folder})
        assert done.returncode == 0, done.stderr
        for file in Path(folder).glob("*.safetensors"):
            content = bytearray(file.read_bytes())
            content[-9] ^= 0x40  # the exponent of a number
            file.write_bytes(content)
    assert (outs[0] / "measurements.parquet").read_bytes() == (outs[1] / "measurements.parquet").read_bytes()


def test_what_is_not_the_caches_own_is_left_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The folder is a model's: neither clearing nor the automatic trim removes a file of it."""
    model = pair[0]
    hexadecimal = model / ("a" * 64 + ".safetensors")
    hexadecimal.write_bytes((model / "model.safetensors").read_bytes())
    (model / "notes.txt").write_text("mine")
    (model / ".model.safetensors.0-1-1.partial").mkdir()
    before = {f: f.read_bytes() for f in model.iterdir() if f.is_file()}
    settings = {"OPDGEO_CACHE": str(model), "OPDGEO_CACHE_GB": "0.0015"}  # room for one entry
    done = run_opdgeo("compare", *pair, "-o", tmp_path / "out", "--no-report", "--nulls", 0, env=settings)
    assert done.returncode == 0, done.stderr
    assert len(SpectrumCache(model).entries()) >= 1
    assert {f: f.read_bytes() for f in before} == before
    assert run_opdgeo("cache", "clear", env=settings).returncode == 0
    assert {f: f.read_bytes() for f in model.iterdir() if f.is_file()} == before


def test_orphans_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    from opdgeo import files

    cache, path = kept(tmp_path / "cache")
    dead = start_python("-c", "")
    dead.wait()
    orphan = path.with_name(f".{path.name}.{files._machine()}-{dead.pid}-1.partial")
    at_work = path.with_name(f".{path.name}.{files._machine()}-{os.getpid()}-1.partial")
    elsewhere, forgotten = (path.with_name(f".{path.name}.{n}-1-1.partial") for n in ("abc", "def"))
    foreign = path.with_name(".download.partial")
    for file in (orphan, at_work, elsewhere, forgotten, foreign):
        file.write_bytes(b"x" * 100)
    os.utime(forgotten, (1, 1))
    size = path.stat().st_size
    assert cache.clear() == size + 200
    assert sorted(cache.folder.iterdir()) == sorted([at_work, elsewhere, foreign, cache.folder / "CACHEDIR.TAG"])


def test_a_full_or_unwritable_cache_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("")
    program_ = (
        "import resource, sys, signal, torch\n"
        "from pathlib import Path\n"
        "from opdgeo.numerics.spectra import spectrum\n"
        "from opdgeo.survey.cache import SpectrumCache\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "w = torch.randn(256, 256); found = spectrum(w.double(), 16)\n"
        "for folder in map(Path, sys.argv[1:]):\n"
        "    cache = SpectrumCache(folder)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))\n"  # what a full disk does
        "    cache.save(cache.path(w, 16), found, {})\n"
        "    assert cache.load(cache.path(w, 16)) is None\n"
    )
    folders = (tmp_path / "full", tmp_path / "a-file" / "cache")
    done = run_python("-c", program_, *folders)
    assert done.returncode == 0, done.stderr
    assert [f.name for f in folders[0].iterdir()] == ["CACHEDIR.TAG"], "half an entry was left"
