"""How numbers and names become markup. Every number passes through `shown`, which keeps the exact value beside it."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup, escape

from opdgeo.report.glossary import READINGS, about, arm_label, clean, interval_decimals, number, short_role


def resource(name: str) -> str:
    """The text of a file of this package."""
    return resources.files("opdgeo.report").joinpath(name).read_text(encoding="utf-8")


@cache
def environment() -> jinja2.Environment:
    """Templates of this package. What they print is escaped; a name that they do not know is an error."""
    made = jinja2.Environment(
        loader=jinja2.FunctionLoader(resource),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "num": shown,
        "interval": interval,
        "clean": clean,
        "arm": arm_label,
        "points": points,
        "excess": excess,
        "mean": arm_mean,
        "title_of": lambda name: about(name).title,
        "formula": formula,
        "said": lambda part: clean(part) if isinstance(part, str) else shown(*part),
        "short_role": short_role,
        "capitalize_first": lambda text: text[:1].upper() + text[1:],
    }
    script = resource("sort.js")
    made.globals |= {
        "readings": READINGS,
        "style": Markup(resource("style.css")),
        "script": Markup(script),
        "policy": policy(script),
    }
    return made


def policy(script: str) -> Markup:
    """The page's Content-Security-Policy: it asks for nothing, and of all scripts this one alone may run."""
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return Markup(
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def shown(
    value: float | None, unit: str = "number", signed: bool = False, decimals: int | None = None, bare: bool = False
) -> Markup:
    """A number of the data files with its exact value in a <data> element; an en dash where there is none."""
    text = number(value, unit, signed=signed, decimals=decimals, bare=bare)
    if value is None or value != value:
        return Markup('<span class="nil">–</span>')
    return Markup('<data value="{}">{}</data>').format(repr(value), text)


def interval(low: float | None, high: float | None, unit: str = "number", signed: bool = False) -> Markup:
    if low is None or high is None:
        return Markup("")
    decimals = interval_decimals(low, high, unit)
    ends = (shown(v, unit, signed=signed, decimals=decimals, bare=True) for v in (low, high))
    return Markup('<span class="interval">[{}, {}]</span>').format(*ends)


def excess(null: dict[str, Any], unit: str, signed: bool = True) -> Markup:
    """The mean excess with the digits of its interval."""
    decimals = interval_decimals(null.get("low"), null.get("high"), unit)
    return shown(null.get("excess"), unit, signed=signed, decimals=decimals)


def arm_mean(got: dict[str, Any], unit: str) -> Markup:
    """The mean of an arm with the digits of its interval."""
    return shown(got.get("mean"), unit, decimals=interval_decimals(got.get("low"), got.get("high"), unit))


def points(unit: str) -> str:
    """Unit of a difference of two values in `unit`."""
    return "points" if unit == "share" else unit


def say(clause: str, value: Markup) -> Markup:
    """A part of a sentence with its number."""
    before, _, after = clause.partition("{}")
    return Markup("{}{}{}").format(before, value, after)


def formula(text: str) -> Markup:
    """A diagnostic's formula with its subscripts (`_x`, `_{xy}`) and superscripts (`^x`, `^{xy}`) set.

    >>> formula("‖ΔW‖_F² / σ_{i<k}")
    Markup('‖ΔW‖<sub>F</sub>² / σ<sub>i&lt;k</sub>')
    """
    tags = {"_": "sub", "^": "sup"}
    found = re.sub(
        r"([_^])(?:\{([^}]*)\}|(\w|\*))",
        lambda m: f"<{tags[m[1]]}>{m[2] or m[3]}</{tags[m[1]]}>",
        str(escape(text)),
    )
    return Markup(found)


_DARK = ('[data-jp-theme-light="false"]', ".vscode-dark", '[theme="dark"]', '[data-theme="dark"]')
"""How JupyterLab, VS Code, Colab and Sphinx mark a dark theme. It need not be that of the system, which a page goes by."""


def embedded(content: str) -> str:
    """HTML for the output of a notebook: in the page's colours and the notebook's theme, on a ground of its own."""
    light, dark = re.findall(r":root \{([^}]*)\}", resource("style.css"))[:2]
    hosts = ", ".join(f"{host} .opdgeo" for host in _DARK)
    style = f".opdgeo {{{light}}}\n{hosts} {{{dark}}}\n{resource('notebook.css')}"
    return f'<div class="opdgeo"><style>{style}</style>{content}</div>'


def slug(text: str) -> str:
    """A part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")[:40]
