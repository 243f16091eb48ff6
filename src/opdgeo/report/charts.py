"""Every chart, defined once. The same figure goes inline into the page and to figures/ as SVG and PDF. In the page its colours come
from the style sheet.

Colours are those of Okabe and Ito, which are told apart with any colour vision. Arms differ in marker too. Null models are grey.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from opdgeo.files import remove_orphans, write_atomically
from opdgeo.report.glossary import clean, short_role
from opdgeo.report.view import embedded

INK, MUTED, GRID, NULL, PAPER = "#1b1f24", "#59626c", "#e4e7eb", "#99a2ac", "#fefefe"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "*")
GLYPHS = ("●", "■", "◆", "▲", "▼", "✚", "✖", "◀", "▶", "★")
ARM_STYLE = {"opd": 0, "sft": 1, "rlvr": 2, "sft-matched": 4}
"""Fixed colour and marker of the arms of the experiment; see `style_of`."""

_SEQUENTIAL: Colormap = matplotlib.colormaps["cividis"]
_DIVERGING = LinearSegmentedColormap.from_list("excess", ("#08519c", "#6baed6", "#f3f3f1", "#f4a261", "#b5450b"))
DOTS = 300
"""Matrices of a row that are drawn one by one."""
_WIDTH = 4.0  # inches; about 350 px in the page's grid, where 9 pt reads as 11 px
_RC: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,  # names are untrusted: a dollar sign is a dollar sign
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "pdf.fonttype": 42,
}


@dataclass(frozen=True)
class Marks:
    """The points of one series in the page: a tooltip for each, the class of the series, and a class for each point ("": none)."""

    series: str
    tips: Sequence[str]
    classes: Sequence[str] = ()


@dataclass(frozen=True)
class Chart:
    """A figure with its file name, a caption and a text for readers who cannot see it.

    Attributes:
        draw: makes the figure, under the settings of this module. Only what is shown or saved is drawn.
        marks: by the id that the figure gives a series of points.
    """

    name: str
    caption: str
    alt: str
    draw: Callable[[], Figure] = field(repr=False)
    marks: Mapping[str, Marks] = field(default_factory=dict, repr=False)

    def figure(self) -> Figure:
        """The chart as a matplotlib figure on white, to change and to save."""
        with matplotlib.rc_context(_RC):
            figure = self.draw()
        figure.set_facecolor("white")
        return figure

    def _repr_html_(self) -> str:
        """What a notebook shows: the chart as on the page, with its tooltips."""
        return embedded(f"<figure><figcaption>{_escaped(self.caption)}</figcaption>{inline_svg(self)}</figure>")


@dataclass(frozen=True)
class Scale:
    """How values are drawn: their unit as `glossary.number` knows it, and whether on a logarithmic axis."""

    unit: str = "number"
    log: bool = False


@dataclass(frozen=True)
class Group:
    """One row of a distribution: the value of each matrix beside its null (mean and standard deviation; empty without nulls)."""

    label: str
    values: Sequence[float] | np.ndarray
    null_means: Sequence[float] | np.ndarray = ()
    null_stds: Sequence[float] | np.ndarray = ()
    style: int = 0


@dataclass(frozen=True)
class Series:
    """One line of a trajectory.

    Attributes:
        low, high: its spread.
        null, null_std: mean and standard deviation of the null at each x; None: no null.
        style: index of its colour and marker.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    _: KW_ONLY
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    null: Sequence[float | None] | None = None
    style: int = 0
    null_std: Sequence[float | None] | None = None


def style_of(arm: str, others: Sequence[str] = ()) -> int:
    """Index of the colour and marker of an arm; arms outside the experiment take the free ones in order."""
    if arm in ARM_STYLE:
        return ARM_STYLE[arm]
    free = [i for i in range(len(SERIES)) if i not in ARM_STYLE.values()]
    unknown = [a for a in others if a not in ARM_STYLE]
    return free[unknown.index(arm) % len(free)] if arm in unknown else 0


def distribution(
    name: str, title: str, scale: Scale, groups: Sequence[Group], axis: str = "", caption: str = ""
) -> Chart:
    """One dot a matrix, and their mean as a black tick. Beneath in grey: the null of each matrix, and the span of the nulls with two
    standard deviations. Of more than `DOTS` matrices in a row their quantiles stand for the dots."""

    # Gathered here, so that a chart of very many matrices keeps a few numbers of them until it is drawn.
    log = (
        scale.log
        and min((float(np.min(v)) for g in groups for v in (g.values, g.null_means) if len(v)), default=0.0) > 0
    )
    labels, styles = [g.label for g in groups], [g.style for g in groups]
    spans, ticks, means, dots, bars = [], [], [], [], []
    for row, group in enumerate(groups):
        values, nulls = np.asarray(group.values, float), np.asarray(group.null_means, float)
        if len(nulls):
            wide = 2 * np.asarray(group.null_stds, float)
            low = np.maximum(nulls - wide, nulls * 0.1) if log else nulls - wide
            spans.append((row + 0.2, low.min(), (nulls + wide).max()))
            few = nulls if len(nulls) <= DOTS else np.quantile(nulls, np.linspace(0, 1, 21))
            ticks += [(v, row + 0.2) for v in few]
        if len(values) > DOTS:
            bars.append((row, np.quantile(values, [0, 0.1, 0.9, 1])))
        else:
            dots.append((row, values))
        if len(values) > 1:
            means.append((values.mean(), row - 0.36, row + 0.04))

    def draw() -> Figure:
        figure, axes = _frame(0.62 + 0.29 * len(labels), labels)
        for row, ends in bars:
            axes.hlines(row - 0.14, ends[0], ends[3], color=SERIES[styles[row]], linewidth=1)
            axes.hlines(row - 0.14, ends[1], ends[2], color=SERIES[styles[row]], linewidth=6, alpha=0.6)
        for row, values in dots:
            at = np.full(len(values), row - 0.14)
            axes.plot(values, at, "o", markersize=4.2, alpha=0.6, markeredgewidth=0, color=SERIES[styles[row]])
        if spans:
            axes.hlines(*zip(*spans, strict=True), color=NULL, linewidth=4, alpha=0.4)
            axes.plot(*zip(*ticks, strict=True), linestyle="", marker="|", markersize=6, color=NULL, markeredgewidth=1)
        if means:
            axes.vlines(*zip(*means, strict=True), color=INK, linewidth=1.4)
        axes.set_yticks(range(len(labels)), [clean(name, 22) for name in labels])
        axes.set_ylim(len(labels) - 0.45, -0.55)
        axes.grid(axis="y", visible=False)
        if log:
            axes.set_xscale("log")
        _value_axis(axes, "x", scale, log)
        axes.set_xlabel(axis, loc="left")
        return figure

    return Chart(name, caption or title, f"{title} of every matrix, its null in grey", draw)


@dataclass(frozen=True)
class Points:
    """A series of a chart over size.

    Attributes:
        x, y, tips: size, value and tooltip of each point.
        counts: how many matrices each point stands for; empty where each is one.
        classes: a class for each point, by which the page hides some.
        path: whether the points are joined in order.
    """

    label: str
    series: str
    x: Sequence[float]
    y: Sequence[float]
    tips: Sequence[str]
    _: KW_ONLY
    style: int = 0
    marker: int = 0
    counts: Sequence[int] = ()
    classes: Sequence[str] = ()
    path: bool = False


@dataclass(frozen=True)
class Band:
    """The null as a curve over size: its middle, its ends, and the null of each point where there are few."""

    x: Sequence[float]
    middle: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    each: tuple[Sequence[float], Sequence[float]] = ((), ())


@dataclass(frozen=True)
class Hollow:
    """A published value: the size is known to lie within `x`, and its null within `null` where one is known."""

    label: str
    x: tuple[float, float]
    y: float
    null: tuple[float, float] | None = None
    style: int = 0


def over_size(
    name: str,
    title: str,
    scale: Scale,
    points: Sequence[Points],
    band: Band | None = None,
    hollow: Sequence[Hollow] = (),
    *,
    size: str,
    whole: tuple[float, float, float | None] | None = None,
    alt: str = "",
) -> Chart:
    """Values against the size of the update. What lies in the grey band is what an isotropic update of that size has.

    Args:
        points: no value may be infinite or NaN.
        size: the name of the x axis.
        whole: of the update as a whole: size, value and the null's value.
    """

    dot = 5.0 if sum(len(p.x) for p in points) <= 60 else 3.4

    def draw() -> Figure:
        figure, axes = _frame(2.6, [])
        values = [*(v for p in points for v in p.y), *(h.y for h in hollow)]
        log = scale.log and bool(values) and min(values) > 0
        if band is not None and len(band.x):
            middle = np.asarray(band.middle, float)
            low = np.asarray(band.low, float)
            low = np.maximum(low, 0.1 * middle) if log else np.maximum(low, 0) if scale.unit == "share" else low
            axes.fill_between(band.x, low, band.high, color=NULL, alpha=0.28, linewidth=0, zorder=0.9)
            axes.plot(band.x, middle, color=NULL, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
            if len(band.each[0]):
                axes.plot(*band.each, "_", color=NULL, markersize=5, markeredgewidth=1, zorder=1.1)
        for one in hollow:
            middle_x, colour = (one.x[0] * one.x[1]) ** 0.5, SERIES[one.style]
            axes.hlines(one.y, *one.x, color=colour, linewidth=0.8)
            axes.plot(middle_x, one.y, "D", color=colour, markerfacecolor=PAPER, markersize=5.5, zorder=3)
            if one.null is not None:
                axes.vlines(middle_x, *one.null, color=NULL, linewidth=0.8)
                mean = sum(one.null) / 2
                axes.plot(middle_x, mean, "D", color=NULL, markerfacecolor=PAPER, markersize=4.5, zorder=2.5)
        for n, p in enumerate(points):
            colour, marker = SERIES[p.style], MARKERS[p.marker % len(MARKERS)]
            if p.path:
                axes.plot(p.x, p.y, color=colour, linewidth=0.7, alpha=0.45, zorder=2, gid=f"path-{n}")
            for part, keep in enumerate(_by_count(p)):
                if keep.any():
                    x, y = np.asarray(p.x)[keep], np.asarray(p.y)[keep]
                    (line,) = axes.plot(x, y, marker, color=colour, markersize=dot + 1.6 * part, zorder=3)
                    line.set(alpha=0.75, markeredgewidth=0, clip_on=False, gid=f"points-{n}-{part}")
        if whole is not None:
            if whole[2] is not None:
                axes.plot(whole[0], whole[2], "D", color=MUTED, markerfacecolor=PAPER, markersize=6, zorder=4)
            axes.plot(whole[0], whole[1], "D", color=INK, markersize=6, zorder=5)
        axes.set_xscale("log")
        if log:
            axes.set_yscale("log")
        axes.margins(x=0.06, y=0.08)
        _value_axis(axes, "x", Scale(), True)
        _value_axis(axes, "y", scale, log)
        axes.set_xlabel(clean(size, 48), loc="right")
        return figure

    marks = {}
    for n, p in enumerate(points):
        for part, keep in enumerate(_by_count(p)):
            classes = [c for c, k in zip(p.classes, keep, strict=True) if k] if p.classes else ()
            marks[f"points-{n}-{part}"] = Marks(p.series, [t for t, k in zip(p.tips, keep, strict=True) if k], classes)
        marks[f"path-{n}"] = Marks(p.series, ())
    return Chart(name, title, alt or f"{title} against {size}, its null in grey", draw, marks)


def _by_count(points: Points) -> list[np.ndarray]:
    """Which points stand for one matrix, for a few and for many: each is drawn larger than the last."""
    counts = np.asarray(points.counts or [1] * len(points.x))
    return [counts == 1, (counts > 1) & (counts < 10), counts >= 10]


def trajectory(
    name: str, title: str, scale: Scale, series: Sequence[Series], x_label: str = "step", walk: bool = False
) -> Chart:
    """A diagnostic against the step. Bands are the spread that the caption names. Grey lines are the null."""

    def draw() -> Figure:
        many = len(series) > 1
        figure, axes = _frame(
            2.35 + (0.2 * ((len(series) + 2) // 3) if many else 0.2), [], top=0.2 * ((len(series) + 3) // 3) + 0.08
        )
        finite = [v for s in series for v in (*s.y, *(n for n in (s.null or ()) if n is not None)) if v is not None]
        log = scale.log and bool(finite) and min(finite) > 0 and max(finite) > 20 * min(finite)
        for one in series:
            colour, marker = SERIES[one.style], MARKERS[one.style]
            if one.null is not None and any(n is not None for n in one.null):
                grey = [np.nan if n is None else n for n in one.null]
                if one.null_std is not None:
                    middle, wide = np.asarray(grey), np.asarray([np.nan if n is None else 2 * n for n in one.null_std])
                    low = np.maximum(middle - wide, 0.1 * middle) if log else middle - wide
                    axes.fill_between(one.x, low, middle + wide, color=NULL, alpha=0.22, linewidth=0, zorder=0.9)
                axes.plot(one.x, grey, color=NULL, linewidth=1.2, linestyle=(0, (4, 2)), zorder=2)
                axes.plot(
                    one.x[-1:], grey[-1:], color=NULL, marker=marker, markersize=4.5, markerfacecolor=PAPER, zorder=2.2
                )
            if one.low is not None and one.high is not None:
                axes.fill_between(one.x, one.low, one.high, color=colour, alpha=0.16, linewidth=0, zorder=1)
            axes.plot(
                one.x,
                one.y,
                color=colour,
                marker=marker,
                markersize=3.4 if len(one.x) <= 20 else 0,
                zorder=3,
                label=clean(one.label, 24),
            )
        if any(s.null is not None and any(n is not None for n in s.null) for s in series):
            axes.plot(
                [],
                [],
                color=NULL,
                linewidth=1.2,
                linestyle=(0, (4, 2)),
                label="null: walk" if walk else "null: same size",
            )
        if log:
            axes.set_yscale("log")
        _value_axis(axes, "y", scale, log)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=x_label in ("step", "checkpoint")))
        if x_label.startswith("share"):
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.4g}"))
        axes.set_xlabel(x_label, loc="right")
        axes.margins(y=0.12)
        _legend(figure, axes)
        return figure

    return Chart(name, title, f"{title} along training", draw)


def thresholds(
    name: str, title: str, limits: Sequence[float], lines: Sequence[tuple[str, Sequence[int | None], bool]]
) -> Chart:
    """A step of training over thresholds. `lines` holds label, steps (None: not before the last checkpoint) and whether it is a null."""

    def draw() -> Figure:
        figure, axes = _frame(2.35, [], top=0.28)
        for i, (text, steps, null) in enumerate(lines):
            axes.step(
                limits,
                [np.nan if s is None else s for s in steps],
                where="mid",
                marker=MARKERS[i],
                markersize=3.4,
                color=NULL if null else SERIES[i],
                linestyle=(0, (4, 2)) if null else "-",
                label=clean(text, 24),
            )
        axes.set_xlim(min(limits) - 0.03, max(limits) + 0.03)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("threshold", loc="right")
        _legend(figure, axes)
        return figure

    return Chart(name, title, title, draw)


def heatmap(
    name: str,
    title: str,
    scale: Scale,
    cells: Mapping[tuple[int | None, str], float],
    *,
    roles: Sequence[str],
    layers: Sequence[int | None],
    limits: tuple[float, float] | None = None,
    excess: bool = False,
) -> Chart:
    """A map with the layers from top to bottom and the roles from left to right.

    Args:
        cells: (layer, role) → a value. A missing cell stays open.
        limits: the ends of the colour scale, so that several charts can share one.
        excess: centres a diverging scale on 0.
    """

    def draw() -> Figure:
        row = 0.1 if len(layers) > 12 else 0.2
        names = [short_role(r) for r in roles]
        slanted = max(map(len, names), default=0) * len(names) > 44
        height = 0.78 + row * len(layers) + (0.05 * max(map(len, names)) if slanted else 0)
        figure = Figure(figsize=(_WIDTH, height))
        bottom = 0.52
        left, right = 0.42, 0.16
        axes = figure.add_axes(
            (left / _WIDTH, bottom / height, (_WIDTH - left - right) / _WIDTH, row * len(layers) / height)
        )
        low, high = _ends(limits or (min(cells.values()), max(cells.values())), excess)
        colours, norm = (_DIVERGING if excess else _SEQUENTIAL), Normalize(low, high)
        for (layer, role), value in cells.items():
            patch = Rectangle(
                (roles.index(role) - 0.5, layers.index(layer) - 0.5),
                1,
                1,
                facecolor=colours(norm(value)),
                edgecolor=PAPER,
            )
            patch.set_linewidth(0.8 if len(layers) <= 12 else 0.4)
            patch.set_clip_on(False)
            axes.add_artist(patch)  # unlike `add_patch`, without new data limits: they are set below
        axes.set_xlim(-0.5, max(len(roles), 1) - 0.5)
        axes.set_ylim(max(len(layers), 1) - 0.5, -0.5)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.xaxis.tick_top()
        axes.set_xticks(range(len(roles)), names, rotation=40 if slanted else 0, ha="left" if slanted else "center")
        every = 1 if len(layers) <= 12 else 5
        shown = [i for i, layer in enumerate(layers) if layer is None or layer % every == 0]
        axes.set_yticks(shown, ["–" if layers[i] is None else str(layers[i]) for i in shown])
        axes.set_ylabel("layer", labelpad=2)
        bar = figure.add_axes((left / _WIDTH, 0.3 / height, (_WIDTH - left - right) / _WIDTH, 0.09 / height))
        steps = 48
        for i in range(steps):
            at = low + (high - low) * (i + 0.5) / steps
            width = (high - low) / steps
            bar.add_artist(Rectangle((at - width / 2, 0), width * 1.05, 1, facecolor=colours(norm(at)), linewidth=0))
        bar.set_xlim(low, high)
        bar.set_ylim(0, 1)
        bar.set_yticks([])
        bar.grid(visible=False)
        for spine in bar.spines.values():
            spine.set_visible(False)
        bar.xaxis.set_major_locator(MaxNLocator(4))
        unit = "points" if excess and scale.unit == "share" else scale.unit
        _numbers(bar, "x", unit)
        return figure

    return Chart(name, title, f"{title} by layer and role", draw)


def _ends(limits: tuple[float, float], excess: bool) -> tuple[float, float]:
    """The ends of a map's colour scale: of an excess on both sides of 0 alike."""
    low, high = limits
    if excess:
        high = max(abs(low), abs(high)) or 1.0
        return -high, high
    return (low, high) if high > low else (low - abs(low) * 0.01 - 1e-12, high + abs(high) * 0.01 + 1e-12)


def colours(values: Sequence[float], limits: tuple[float, float], excess: bool = False) -> list[str]:
    """The colours that a map gives these values, as #rrggbb."""
    low, high = _ends(limits, excess)
    scaled = (np.asarray(values, float) - low) / (high - low)
    found = (_DIVERGING if excess else _SEQUENTIAL)(np.clip(scaled, 0, 1), bytes=True)
    return ["#" + bytes(c[:3]).hex() for c in found]


def spectra(name: str, title: str, base: Sequence[float], tuned: Sequence[float], update: Sequence[float]) -> Chart:
    """Singular values of one matrix before and after training, and those of its update, on one logarithmic axis."""

    def draw() -> Figure:
        figure, axes = _frame(2.55, [], top=0.28)
        for values, colour, style, text in (
            (base, MUTED, "-", "σ(W₀)"),
            (tuned, SERIES[0], (0, (2, 1.5)), "σ(W₊)"),
            (update, SERIES[1], "-", "σ(ΔW)"),
        ):
            y = np.asarray(values, float)
            axes.plot(np.arange(1, len(y) + 1), np.where(y > 0, y, np.nan), color=colour, linestyle=style, label=text)
        positive = [v for values in (base, tuned, update) for v in values if v > 0]
        if positive:
            _log_axis(axes, max(min(positive), max(positive) * 1e-8) * 0.7, max(positive) * 1.5)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("index i", loc="right")
        _legend(figure, axes)
        return figure

    return Chart(name, title, title, draw)


def spectrum_shift(
    name: str, title: str, base: Sequence[float], tuned: Sequence[float], update: Sequence[float]
) -> Chart:
    """|σᵢ(W₊) − σᵢ(W₀)| by index on a logarithmic axis, below the ‖ΔW‖₂ that Weyl's inequality allows."""

    def draw() -> Figure:
        figure, axes = _frame(2.55, [], top=0.28)
        shift = np.abs(np.asarray(tuned, float) - np.asarray(base, float))
        bound = float(max(update, default=0.0))
        axes.plot(
            np.arange(1, len(shift) + 1),
            np.where(shift > 0, shift, np.nan),
            color=SERIES[0],
            linewidth=1.2,
            label="|σ(W₊) − σ(W₀)|",
        )
        if bound > 0:
            axes.axhline(bound, color=NULL, linewidth=1.6, label="bound ‖ΔW‖₂")
            _log_axis(axes, max(shift[shift > 0].min(initial=bound), bound * 1e-6) * 0.7, bound * 1.6)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("index i", loc="right")
        _legend(figure, axes)
        return figure

    return Chart(name, title, title, draw)


def update_spectra(
    name: str, title: str, groups: Sequence[tuple[str, int, Sequence[Sequence[float]], Sequence[tuple[int, int]]]]
) -> Chart:
    """σᵢ(ΔW)/‖ΔW‖_F of every matrix (thin), the median of each group (thick) and a Gaussian update of the same shape and norm (grey).

    `groups` holds label, style, the spectra and the shapes (rows, cols). The grey line is the Marchenko–Pastur law, exact for large matrices.
    """

    def draw() -> Figure:
        figure, axes = _frame(2.75, [], top=0.28 if len(groups) < 3 else 0.48)
        drawn = set()
        for text, style, spectra_, shapes in groups:
            kept = []
            for values, shape in zip(spectra_, shapes, strict=True):
                sigma = np.asarray(values, float)
                norm = float(np.sqrt((sigma**2).sum()))
                if norm <= 0:
                    continue
                position = (np.arange(len(sigma)) + 0.5) / len(sigma)
                axes.plot(
                    position, np.where(sigma > 0, sigma / norm, np.nan), color=SERIES[style], linewidth=0.4, alpha=0.25
                )
                kept.append(np.interp(np.linspace(0.002, 0.998, 120), position, sigma / norm))
                if shape not in drawn:
                    drawn.add(shape)
                    gauss = _marchenko_pastur(*shape)
                    axes.plot(
                        (np.arange(len(gauss)) + 0.5) / len(gauss),
                        gauss,
                        color=NULL,
                        linestyle=(0, (4, 2)),
                        linewidth=1.4,
                        zorder=3,
                    )
            if kept:
                axes.plot(
                    np.linspace(0.002, 0.998, 120),
                    np.median(kept, axis=0),
                    color=SERIES[style],
                    label=clean(text, 24),
                    zorder=4,
                )
        if drawn:
            axes.plot([], [], color=NULL, linestyle=(0, (4, 2)), linewidth=1.4, label="Gaussian update")
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            _log_axis(axes, max(low, high * 1e-5), high)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.4g}"))
        axes.set_xlabel("index, % of the singular values", loc="right")
        _legend(figure, axes)
        return figure

    return Chart(name, title, title, draw)


def claim_panel(name: str, title: str, unit: str, axis: str, arms: Sequence[tuple[str, int, dict[str, Any]]]) -> Chart:
    """One row an arm: mean with its interval, the seeds as open dots, the null as a grey bar."""

    def draw() -> Figure:
        figure, axes = _frame(0.66 + 0.34 * len(arms), [a for a, _, _ in arms])
        for row, (_, style, got) in enumerate(arms):
            colour = SERIES[style]
            if got.get("null") is not None:
                axes.plot(
                    [got["null"]],
                    [row + 0.16],
                    marker="|",
                    markersize=13,
                    markeredgewidth=2.6,
                    color=NULL,
                    linestyle="",
                )
            seeds = [s for s in got.get("seeds") or [] if s is not None]
            if len(seeds) > 1:
                axes.plot(
                    seeds,
                    [row + 0.16] * len(seeds),
                    linestyle="",
                    marker="o",
                    markersize=3.6,
                    markerfacecolor="none",
                    markeredgecolor=colour,
                )
            if got.get("low") is not None and got.get("high") is not None:
                axes.hlines(row - 0.1, got["low"], got["high"], color=colour, linewidth=3.4, alpha=0.4)
            if got.get("mean") is not None:
                axes.plot([got["mean"]], [row - 0.1], marker=MARKERS[style], markersize=6, color=colour, linestyle="")
        axes.set_yticks(range(len(arms)), [clean(a, 22) for a, _, _ in arms])
        axes.set_ylim(len(arms) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.08)
        _value_axis(axes, "x", Scale(unit), False)
        axes.set_xlabel(clean(axis, 48), loc="left")
        return figure

    return Chart(name, title, f"{title}: arms with intervals and nulls", draw)


def inline_svg(chart: Chart) -> str:
    """The figure as an <svg> element for an HTML page: no ids or style rules that leak, colours as variables of the page."""
    text = _svg(chart, "none")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style[^>]*>.*?</style>|<defs>\s*</defs>", "", text, flags=re.S)
    # names may hold quotes: once those are escaped, no pattern below that ends at a quote can run from a text into a tag
    text = re.sub(r">([^<]*)<", lambda m: ">" + m[1].replace('"', "&quot;") + "<", text)
    view = re.search(r'viewBox="([^"]+)"', text)
    start = f'<svg viewBox="{view[1] if view else "0 0 288 180"}" role="img" aria-label="{_escaped(chart.alt)}">'
    text = start + text[text.index(">") + 1 :]
    for gid, marks in chart.marks.items():
        text = _marked(text, gid, marks)
    kept = {a or b for a, b in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)}
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in kept else "", text)
    text = re.sub(r'( (?:d|x|y|transform|points|width|height)=")([^"]*)"', lambda m: m[1] + _short(m[2]) + '"', text)
    text = re.sub(r' style="([^"]*)"', lambda m: f' style="{_page_style(m[1])}"', text)
    text = text.replace(' xlink:href="', ' href="')
    text = re.sub(r"<g>((?:\s*<use [^>]*/>)+)\s*</g>", _share_style, text)
    return re.sub(r">\s+<", "><", text)


def _marked(text: str, gid: str, marks: Marks) -> str:
    """The series of that id with its class, and every point of it with its tooltip."""
    before, found, rest = text.partition(f'<g id="{gid}">')
    if not found:
        return text
    end = rest.find('<g id="')
    own, rest = (rest, "") if end < 0 else (rest[:end], rest[end:])
    style = re.search(r'<use [^>]*style="([^"]*)"', own)
    tips, classes = iter(marks.tips), iter(marks.classes or [""] * len(marks.tips))

    def point(match: re.Match[str]) -> str:
        attributes = re.sub(r' style="[^"]*"', "", match[1])
        kind = next(classes, "")
        return f"<use{attributes}{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}><title>{_escaped(next(tips, ''))}</title></use>"

    own = re.sub(r"<use( [^>]*?) ?/>", point, own)
    shared = f' style="{style[1]}"' if style else ""
    return f'{before}<g class="{marks.series}"{shared}>{own}{rest}'


_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", NULL: "--null", PAPER: "--paper"} | {
    c: f"--s{i}" for i, c in enumerate(SERIES)
}


def _short(numbers: str) -> str:
    """Coordinates to a hundredth of a point, in one line."""
    return " ".join(re.sub(r"(\.\d\d)\d+", r"\1", numbers).split())


def _page_style(style: str) -> str:
    style = re.sub(r"font-family: [^;]*", "font-family: var(--sans)", style)
    style = re.sub(r"font: ([\d.]+)px [^;]*", r"font: \1px var(--sans)", style).replace("stroke-linejoin: miter", "")
    return re.sub("|".join(_VARIABLES), lambda m: f"var({_VARIABLES[m[0]]})", style).strip("; ")


def _escaped(text: str) -> str:
    return escape(clean(text), {'"': "&quot;"})


def save(chart: Chart, folder: Path) -> list[Path]:
    """Write NAME.svg (letters as outlines) and NAME.pdf into `folder`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    pdf = io.BytesIO()
    with matplotlib.rc_context(_RC):
        chart.draw().savefig(pdf, format="pdf", facecolor="white", metadata={"CreationDate": None})
    written = []
    for path, content in (
        (folder / f"{chart.name}.svg", _svg(chart, "path").encode()),
        (folder / f"{chart.name}.pdf", pdf.getvalue()),
    ):
        write_whole(path, content)
        written.append(path)
    return written


def write_whole(path: Path, content: bytes) -> None:
    """Replace `path` in one step, so that a reader finds the old file or the new one and never a part."""
    remove_orphans(path.parent)
    write_atomically(path, lambda partial: partial.write_bytes(content))


def _svg(chart: Chart, fonts: str) -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({**_RC, "svg.fonttype": fonts, "svg.hashsalt": chart.name}):
        chart.draw().savefig(buffer, format="svg", metadata=nothing, facecolor="none" if fonts == "none" else "white")
    return buffer.getvalue()


def _share_style(match: re.Match[str]) -> str:
    """Markers of one series carry the same style each: say it once on their group."""
    styles = set(re.findall(r' style="([^"]*)"', match[1]))
    if len(styles) != 1:
        return match[0]
    return f'<g style="{styles.pop()}">' + re.sub(r' style="[^"]*"', "", match[1]) + "</g>"


def _frame(height: float, labels: Sequence[str], top: float = 0.06) -> tuple[Figure, Axes]:
    """A figure of the common width whose left margin holds the row labels; sizes in inches."""
    left = 0.2 + 0.072 * max((len(clean(s, 22)) for s in labels), default=5)
    bottom = 0.46
    height = max(height, bottom + top + 0.4)
    figure = Figure(figsize=(_WIDTH, height))
    axes = figure.add_axes(
        (left / _WIDTH, bottom / height, (_WIDTH - left - 0.2) / _WIDTH, (height - bottom - top) / height)
    )
    return figure, axes


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles,
            labels,
            loc="upper left",
            ncols=min(3, len(handles)),
            bbox_to_anchor=(0, 1.0),
            borderpad=0.1,
            handlelength=1.6,
            columnspacing=1.3,
            handletextpad=0.5,
            borderaxespad=0.1,
        )


def _numbers(axes: Axes, which: str, unit: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis

    def text(value: float, _: int | None) -> str:
        low, high = sorted(axis.get_view_interval())
        if abs(value) < 1e-9 * max(abs(low), abs(high)):
            value = 0.0
        scaled = 100 * value if unit in ("share", "points") else value
        return f"{scaled:.4g}".replace("-", "−", 1 if scaled < 0 else 0)

    axis.set_major_formatter(FuncFormatter(text))


def _log_axis(axes: Axes, low: float, high: float) -> None:
    """A logarithmic y axis from `low` to `high` with a few labels in plain numbers."""
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_minor_locator(NullLocator())
    _numbers(axes, "y", "number")


def _value_axis(axes: Axes, which: str, scale: Scale, log: bool) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    if log:
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1.0,) if high > 30 * low else (1.0, 2.0, 5.0), numticks=6))
        if high < 3 * low:
            axis.set_major_locator(MaxNLocator(4))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(5))
    _numbers(axes, which, scale.unit)


def _marchenko_pastur(rows: int, cols: int) -> np.ndarray:
    """Singular values of a Gaussian rows × cols matrix of Frobenius norm 1, descending: quantiles of the Marchenko–Pastur law."""
    small, large = sorted((rows, cols))
    ratio = small / large
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    # in s = √x the density stays finite at 0 for a square matrix
    grid = np.linspace(low**0.5, high**0.5, 4001)
    density = np.sqrt(np.maximum((high - grid**2) * (grid**2 - low), 0)) / np.maximum(grid, grid[1] * 1e-3)
    share = np.cumsum(density)
    quantiles = np.interp((np.arange(small)[::-1] + 0.5) / small, share / share[-1], grid)
    return np.asarray(quantiles / np.sqrt((quantiles**2).sum()))
