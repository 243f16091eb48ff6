"""From the data files of a run to what a person reads: a table in the terminal, charts, and one HTML page that works offline."""

from __future__ import annotations

from pathlib import Path


def write_report(out: Path, figures: bool = False) -> Path:
    """Rebuild `out`/report.html from the data files in `out`, whole or not at all. With `figures`, also figures/*.svg and *.pdf.

    Raises:
        ConfigError: a data file is missing or damaged.
    """
    from opdgeo.report import pairs_page, published, signals
    from opdgeo.report.charts import save, write_whole
    from opdgeo.report.data import load
    from opdgeo.report.page import build

    out = Path(out)
    if (out / signals.TABLE).is_file():
        page, charts = signals.build(out)
    elif (out / published.TABLE).is_file():
        page, charts = published.build(out)
    else:
        results = load(out)
        page, charts = pairs_page.build(results) if results.kind == "relate" else build(results)
    if figures:
        for chart in charts:
            save(chart, out / "figures")
    path = out / "report.html"
    write_whole(path, page.encode("utf-8"))
    return path
