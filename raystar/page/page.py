"""The report of a sweep as one HTML file."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from pathlib import Path

import jinja2
from PIL import Image
from plotly.offline import get_plotlyjs

from raystar.base.console import duration
from raystar.base.files import write_whole
from raystar.base.metrics import METRICS, arrow
from raystar.base.storage import Storage
from raystar.page import charts, sections
from raystar.page.importance import FEWEST, RESAMPLES
from raystar.record.results import CONTACT_SHEET, REPORT, Results, read


def write(folder: Path, storage: Storage, out: Path | None = None) -> Path:
    """Writes a sweep's report, whole or not at all, and `contact_sheet.png` beside it where there are pictures.

    Args:
        folder: the sweep's, `runs/<name>`; `summary.json`, `sweep.json` and the journal are read from it.
        storage: the sweep's folder for what trials save; pictures are read from it.
        out: where to, if not `report.html` in `folder`; then no contact sheet is written.

    Returns:
        The report's path.

    Raises:
        RaystarError: the folder is not a sweep's, or a file of it is damaged.
    """
    results = read(folder)
    page, sheet = _page(results, folder, storage)
    if sheet is not None and out is None:
        temporary = folder / f".{CONTACT_SHEET}.part"
        sheet.save(temporary, "PNG")
        temporary.replace(folder / CONTACT_SHEET)
    path = out or folder / REPORT
    write_whole(path, page)
    return path


def _page(results: Results, folder: Path, storage: Storage) -> tuple[str, Image.Image | None]:
    gallery, sheet = sections.contact_sheet(results, storage)
    weights = sections.weights(results)
    figures = {"curves": charts.learning_curves(results), "front": charts.front(results)}
    figures["importance"] = charts.importances(results, weights) if weights else None
    slices = charts.slices(results)
    order = [k.key for k in weights.keys] if weights else []
    keys = sorted(slices, key=lambda key: order.index(key) if key in order else len(order))
    figures |= {f"slice-{number}": slices[key] for number, key in enumerate(keys)}
    here = jinja2.PackageLoader("raystar", "page")
    environment = jinja2.Environment(
        loader=here, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": sections.as_number, "value": sections.as_value, "duration": duration}
    # A hash for each script that may run: whatever else got into the page, it could not.
    scripts = [get_plotlyjs(), environment.get_template("report.js").render()]
    page = environment.get_template("report.html").render(
        results=results,
        summary=results.summary,
        headline=sections.headline(results),
        facts=sections.facts(results),
        parts=sections.parts(results),
        finalists=sections.finalists(results),
        foresight=results.foresight(),
        changes=sections.changes(results),
        better=arrow(results.summary.mode),
        explained={name: metric.meaning for name, metric in METRICS.items() if metric.meaning},
        figures={name: json.loads(figure.to_json()) for name, figure in figures.items() if figure is not None},
        slices=list(enumerate(keys)),
        most_curves=charts.MOST_CURVES,
        most_dots=charts.MOST_DOTS,
        framed_out=charts.framed_out(results),
        importance=weights,
        doubtful=weights is not None and weights.skill < sections.TRUST,
        fewest=FEWEST,
        resamples=RESAMPLES,
        stops=sections.stops(results),
        gallery=gallery,
        broken=sections.broken(results, storage),
        noted=sections.notes(results),
        error=sections.error(results, folder),
        table=sections.table(results),
        reproduce=sections.reproduce(results, folder),
        date=time.strftime("%Y-%m-%d %H:%M %Z"),
        style=environment.get_template("report.css").render(),
        scripts=scripts,
        hashes=[base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts],
    )
    return page, sheet
