"""A sweep as one page to read and to send: `python -m raystar.report`, and the end of every sweep.

`report.html` holds all it shows, pictures and charts' library included, and asks nothing of a network: its own policy
forbids that to the browser. It is made from the sweep's folder alone, at any time.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml
from PIL import Image
from plotly.offline import get_plotlyjs

from raystar import charts, contact, finals, results
from raystar.config import Config, overlay_yaml, to_mapping
from raystar.errors import RaystarError, redact, run_cli
from raystar.importance import FEWEST, RESAMPLES, Importance, importance
from raystar.record import leaves
from raystar.results import CONTACT_SHEET, REPORT, Results
from raystar.ruler import HIGHER
from raystar.storage import Storage
from raystar.summary import BROKEN, REFERENCES, RUNNING, STOPPED, UNFINISHED, TrialRecord, duration, write_whole

_ROWS, _COLUMNS = 16, 6  # of the contact sheet
_LARGE = 3  # trials whose grids are shown large
_TABLE = 500  # rows; summary.csv has them all
_TRACE = 25  # lines of what a trial raised
# Characters of embedded pictures; with the charts' library (4.8 MB) and the numbers the page stays below 10 MB.
_THUMBS, _GRIDS = 2_900_000, 1_400_000
_SHEET_ROWS = 12
_TRUST = 0.15  # skill below which importances are told to mean nothing

_GRID_KINDS = {"grid_ref": "styles of references", "grid_noise": "styles of noise"}

_EXPLAINED = {
    "eval/score": "style and content together, plus what diversity lacks or has too much; 0.1 is perfect",
    "eval/style": "distance of translations from real pictures of the domain, as a share of the sources' distance: "
    "0 as real pictures, 1 as if nothing had been done",
    "eval/content": "how much of the source's layout is lost: 0 none, about 0.95 another picture",
    "eval/diversity": "how different the translations of one picture are under several noises: 1 as different as "
    "real pictures of the domain, 0 all alike",
    "eval/worst_pair": "(0.1 + style)(1 + content) of the pair of domains that fares worst",
    "eval/movement": "how far translations are from their own sources, as a share of how far pictures of a domain are "
    "from each other: 0 nothing has changed",
    "eval/outlook": "how much of the way to the target's latents is still to go: 1 all of it, 0 none; it ranks trials "
    "at rungs, before the score can",
    "eval/accuracy": "share of translations that a classifier takes for the target domain",
    "perf/speedup": "samples a second over those of the eager step, both timed in turn",
    "perf/steady_samples_per_s": "samples a second once everything is compiled",
    "perf/eager_samples_per_s": "samples a second of the eager step beside it",
    "perf/compile_s": "seconds that compiling took before the first step",
    "perf/compiled_modules": "networks that run compiled",
    "perf/recompilations": "compilations after the first step",
}
_HIGHER = (
    *(f"eval/{name}" for name in HIGHER),
    "perf/speedup",
    "perf/steady_samples_per_s",
    "perf/eager_samples_per_s",
)


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
    found = results.read(folder)
    page, sheet = _page(found, folder, storage)
    if sheet is not None and out is None:
        temporary = folder / f".{CONTACT_SHEET}.part"
        sheet.save(temporary, "PNG")
        temporary.replace(folder / CONTACT_SHEET)
    path = out or folder / REPORT
    write_whole(path, page)
    return path


def _page(found: Results, folder: Path, storage: Storage) -> tuple[str, Image.Image | None]:
    gallery, sheet = _contact(found, storage)
    weights = _importance(found)
    figures = {"curves": charts.learning_curves(found), "front": charts.front(found)}
    figures["importance"] = charts.importances(found, weights) if weights else None
    slices = charts.slices(found)
    order = [k.key for k in weights.keys] if weights else []
    keys = sorted(slices, key=lambda key: order.index(key) if key in order else len(order))
    figures |= {f"slice-{number}": slices[key] for number, key in enumerate(keys)}
    here = jinja2.PackageLoader("raystar", "page")
    environment = jinja2.Environment(
        loader=here, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "value": _value, "duration": duration}
    # A hash for each script that may run: whatever else got into the page, it could not.
    scripts = [get_plotlyjs(), environment.get_template("report.js").render()]
    page = environment.get_template("report.html").render(
        found=found,
        summary=found.summary,
        headline=_headline(found),
        facts=_facts(found),
        parts=_parts(found),
        finalists=_finalists(found),
        foresight=found.foresight(),
        changes=_changes(found),
        better=charts.arrow(found.summary.mode),
        explained=_EXPLAINED,
        figures={name: json.loads(figure.to_json()) for name, figure in figures.items() if figure is not None},
        slices=list(enumerate(keys)),
        most_curves=charts.MOST_CURVES,
        most_dots=charts.MOST_DOTS,
        framed_out=charts.framed_out(found),
        importance=weights,
        doubtful=weights is not None and weights.skill < _TRUST,
        fewest=FEWEST,
        resamples=RESAMPLES,
        stops=_stops(found),
        gallery=gallery,
        broken=_broken(found, storage),
        noted=_notes(found),
        error=_error(found, folder),
        table=_table(found),
        reproduce=_reproduce(found, folder),
        made=time.strftime("%Y-%m-%d %H:%M %Z"),
        style=environment.get_template("report.css").render(),
        scripts=scripts,
        hashes=[base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts],
    )
    return page, sheet


# -- what won ------------------------------------------------------------------------------------


def _headline(found: Results) -> str:
    """What won and by how much, in a sentence."""
    summary = found.summary
    best, baseline, gain = summary.best, summary.baseline, summary.gain
    name = summary.short_metric
    if summary.finals is not None:
        return finals.line(summary, summary.finals).replace("+-", "\N{PLUS-MINUS SIGN}") + "."
    if best is None or best.score is None:
        running = any(r.status in UNFINISHED for r in summary.trials.values()) and summary.status == RUNNING
        return "No trial has a score yet." if running else "No trial has a score that counts."
    leads = "is ahead" if summary.status == RUNNING else "won"
    line = f"{best.trial} {leads} with {name} {_number(best.score)} after epoch {best.score_epoch}"
    if baseline is None:
        return f"{line}; the sweep has no baseline to compare with."
    if gain is None:
        return f"{line}; the baseline, {baseline.trial}, has no score."
    if best is baseline:
        return f"{line}: it is the baseline, and no other trial beats it."
    return f"{line}, {gain:.1%} better than the baseline's {_number(baseline.score)}."


def _facts(found: Results) -> list[tuple[str, str, str]]:
    """The numbers at the top: name, text, and the exact value behind it."""
    summary = found.summary
    best, baseline, gain = summary.best, summary.baseline, summary.gain
    counts = ", ".join(f"{n} {status.replace('_', ' ')}" for status, n in summary.counts().items())
    facts = [("status", summary.status, summary.status)]
    if best is not None and best.score is not None:
        facts.append((f"best {summary.short_metric}", _number(best.score), repr(best.score)))
    if baseline is not None and baseline.score is not None:
        facts.append((f"baseline {summary.short_metric}", _number(baseline.score), repr(baseline.score)))
    if summary.finals is not None:
        mean = summary.finals.ranked[0].mean
        facts.append((f"{summary.finals.winner}'s mean over seeds", _number(mean), repr(mean)))
    for name, words in REFERENCES.items():
        if (value := summary.reference(name)) is not None:
            facts.append((words, _number(value), repr(value)))
    if gain is not None:
        facts.append(("gain over the baseline", f"{gain:.1%}", repr(gain)))
    planned = (
        f"{len(summary.trials)} of {summary.expected}" if len(summary.trials) < summary.expected else summary.expected
    )
    return [
        *facts,
        ("trials", f"{planned}: {counts}" if counts else str(planned), str(len(summary.trials))),
        ("epochs trained", str(summary.epochs_done), str(summary.epochs_done)),
        ("wall time", duration(summary.wall_s), repr(summary.wall_s)),
    ]


def _finalists(found: Results) -> list[dict[str, Any]]:
    """A row for each finalist: its mean, what that may be off by, and the score of each of its runs."""
    summary = found.summary
    if summary.finals is None:
        return []
    return [
        {
            "trial": finalist.trial,
            "baseline": finalist.trial == summary.baseline_trial,
            "mean": finalist.mean,
            "error": finalist.error,
            "scores": list(zip(finalist.runs, finalist.scores, strict=True)),
            "good": summary.good(summary.trials[finalist.trial]),
        }
        for finalist in summary.finals.ranked
    ]


def _parts(found: Results) -> list[dict[str, Any]]:
    """The measured parts of the score, of the baseline and of the best, as measured last."""
    best, baseline = found.summary.best, found.summary.baseline
    if best is None:
        return []
    group = "perf/" if found.speed else "eval/"
    names = [name for name in _EXPLAINED if name in best.metrics and name.startswith(group)]
    names = list(dict.fromkeys([found.summary.metric, *names]))
    parts = []
    for name in names:
        now, then = best.metrics.get(name), baseline.metrics.get(name) if baseline is not None else None
        change = now - then if now is not None and then is not None and best is not baseline else None
        higher = found.summary.mode == "max" if name == found.summary.metric else name in _HIGHER
        judged = name not in (
            "perf/compile_s",
            "perf/compiled_modules",
            "perf/recompilations",
            "perf/eager_samples_per_s",
        )
        parts.append(
            {
                "name": name.rpartition("/")[2],
                "baseline": then,
                "best": now,
                "change": change,
                "better": None if not change or not judged else (change > 0) == higher,
                "meaning": _EXPLAINED.get(name, "")
                + (
                    ""
                    if not judged
                    else f"; {charts.arrow('max' if higher else 'min')}"
                    if _EXPLAINED.get(name)
                    else ""
                ),
            }
        )
    return parts


def _changes(found: Results) -> list[tuple[str, Any, Any, str]]:
    """Swept keys with the baseline's and the best trial's values, and how they were drawn."""
    best, baseline = found.summary.best, found.summary.baseline
    if best is None:
        return []
    return [
        (
            key,
            baseline.params.get(key) if baseline is not None else None,
            best.params.get(key),
            _drawn(kind, values),
        )
        for key, (kind, values) in found.drawn.items()
    ]


def _drawn(kind: str, values: Any) -> str:
    """From what a key's values were drawn: `0.5 to 4, log`, or the choices."""
    if kind == "choice":
        return ", ".join(_value(value) for value in dict.fromkeys(values))
    low, high = values
    return (
        f"{_value(low)} to {_value(high - 1 if kind == 'randint' else high)}{', log' if kind == 'loguniform' else ''}"
    )


# -- why -----------------------------------------------------------------------------------------


def _importance(found: Results) -> Importance | None:
    known = [r for r in found.summary.ranked() if r.parent is None and found.curve(r.trial)]
    logarithmic = [key for key, (kind, _) in found.drawn.items() if kind == "loguniform"]
    return importance([r.params for r in known], [found.curve(r.trial) for r in known], logarithmic)


def _stops(found: Results) -> str:
    """How many trials were stopped early, and where."""
    stopped = Counter(r.epochs for r in found.summary.trials.values() if r.status == STOPPED)
    if not stopped:
        return "No trial was stopped early."
    where = ", ".join(f"{n} after epoch {epoch}" for epoch, n in sorted(stopped.items()))
    total = sum(stopped.values())
    return f"{total} trial{'s were' if total > 1 else ' was'} stopped early: {where}."


# -- pictures ------------------------------------------------------------------------------------


def _contact(found: Results, storage: Storage) -> tuple[dict[str, Any], Image.Image | None]:
    """Pictures of trials by epochs, the best trials' grids large, and the sheet as one picture."""
    first = finals.featured(found.summary)
    ranked = [*first, *(record for record in found.summary.ranked() if record not in first)]
    shown = ranked[:_ROWS]
    names = [record.trial for record in shown]
    epochs = contact.epochs_to_show(storage, names, found.rungs, _COLUMNS)  # where many trials ended
    if not epochs:
        return {"rows": [], "epochs": [], "large": [], "hidden": 0}, None
    sheet = [
        (
            record,
            {
                epoch: picture
                for epoch in epochs
                if (picture := contact.read_picture(storage, record.trial, contact.FIRST_CHOICE, epoch, 512))
            },
        )
        for record in shown
    ]
    embedded = iter(contact.embed([picture for _, row in sheet for picture in row.values()], _THUMBS))
    rows = [(record, {epoch: next(embedded) for epoch in pictures}) for record, pictures in sheet]
    together = contact.contact_sheet([(_label(found, r), p) for r, p in sheet[:_SHEET_ROWS]], epochs)
    large = _large(found, storage, first[:_LARGE])
    return {"rows": rows, "epochs": epochs, "large": large, "hidden": len(ranked) - len(shown)}, together


def _large(found: Results, storage: Storage, records: list[TrialRecord]) -> list[tuple[TrialRecord, list[Any]]]:
    """Of each trial its grids of the epoch that it was measured in last: (what it shows, epoch, picture)."""
    read: list[tuple[TrialRecord, str, int, Image.Image]] = []
    for record in records:
        for key in _GRID_KINDS:
            epoch = contact.nearest_epoch(storage, record.trial, key, record.score_epoch or 0)
            picture = None if epoch is None else contact.read_picture(storage, record.trial, key, epoch, 1024)
            if epoch is not None and picture is not None:
                read.append((record, key, epoch, picture))
    embedded = contact.embed([picture for *_, picture in read], _GRIDS)
    return [
        (
            record,
            [
                (_GRID_KINDS[key], epoch, data)
                for (of, key, epoch, _), data in zip(read, embedded, strict=True)
                if of is record
            ],
        )
        for record in records
        if any(of is record for of, *_ in read)
    ]


def _label(found: Results, record: TrialRecord) -> str:
    roles = [name for name in ("best", "baseline") if getattr(found.summary, name) is record]
    return "\n".join([record.trial, *([] if record.score is None else [f"{record.score:.4f}"]), *roles])


# -- what failed, all trials, how to do it again ---------------------------------------------------


def _broken(found: Results, storage: Storage) -> list[tuple[TrialRecord, str]]:
    """Trials that went wrong or broke off, each with the end of what it raised."""
    broken = []
    for record in sorted(found.summary.trials.values(), key=lambda r: r.trial):
        if record.status in BROKEN or (record.status in UNFINISHED and record.status != RUNNING and record.reason):
            try:
                trace = storage.read(f"trials/{record.trial}/error.txt").decode(errors="replace")
            except FileNotFoundError:
                trace = ""
            broken.append((record, redact("\n".join(trace.strip().splitlines()[-_TRACE:]))))
    return broken


def _notes(found: Results) -> dict[str, list[str]]:
    """What went other than asked for, each with its trials."""
    noted: dict[str, list[str]] = {}
    for record in found.by_score():
        if record.note:
            noted.setdefault(record.note, []).append(record.trial)
    return noted


def _error(found: Results, folder: Path) -> str:
    """What ended the whole sweep, if something did."""
    trace = folder / "error.txt"
    if found.summary.status != "failed" or not trace.is_file():
        return ""
    return redact("\n".join(trace.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_TRACE:]))


def _table(found: Results) -> dict[str, Any]:
    """All trials, best first, and the references: columns as (title, what it is), rows of (text, exact value)."""
    speed = found.speed
    metrics = [m for m in _EXPLAINED if m.startswith("perf/" if speed else "eval/") and m != found.summary.metric]
    records = found.by_score()
    metrics = [m for m in metrics if any(m in r.metrics for r in records)]
    columns = [
        ("trial", "name"), ("status", "how it ended"), (found.summary.short_metric, "as measured last"),
        ("after epoch", "of that measurement"), ("epochs", "trained"),
        *((m.rpartition("/")[2].replace("_", " "), _EXPLAINED[m]) for m in metrics),
        ("time", "h:mm:ss"), *((charts.short(key), key) for key in found.drawn),
    ]  # fmt: skip
    rows = []
    for record in (*records[:_TABLE], *found.summary.reference_records()):
        cells: list[tuple[str, Any]] = [
            (record.trial, record.trial),
            (record.status.replace("_", " ") + (", unmoved" if record.unmoved else ""), record.status),
            (_number(record.score), record.score),
            (_value(record.score_epoch), record.score_epoch),
            (str(record.epochs), record.epochs),
            *((_number(record.metrics.get(m)), record.metrics.get(m)) for m in metrics),
            (duration(record.wall_s), record.wall_s),
            *((_value(record.params.get(key)), record.params.get(key)) for key in found.drawn),
        ]
        rows.append((record, [(text, "" if exact is None else exact) for text, exact in cells]))
    return {"columns": columns, "rows": rows, "hidden": max(0, len(records) - _TABLE)}


def _reproduce(found: Results, folder: Path) -> dict[str, Any]:
    """Commands, versions, seeds, data, and what the configuration has that the defaults have not."""
    record, best = found.record, found.summary.best
    config, request = record["config"], record["request"]
    code = {name: text for name, text in record["code"].items() if "/" not in name}
    defaults = dict(leaves("", to_mapping(Config())))
    differing = [(key, defaults.get(key), value) for key, value in leaves("", config) if value != defaults.get(key)]
    runs = "" if folder.parent == Path("runs") else f" --runs {folder.parent}"
    left = (folder / ("fastest.yaml" if found.speed else "best")).exists()
    data = record["data"]
    return {
        "command": redact(str(record.get("command", ""))),
        "commit": record.get("git_commit"),
        "facts": [
            *code.items(),
            ("configuration", request.get("config")),
            ("space", request.get("space")),
            ("signature of the configuration", record.get("signature")),
            ("seed of training", config["training"]["seed"]),
            ("seed of the search", record["space"].get("seed", 0)),
            ("search", record["space"].get("search", "random")),
            ("latents", f"{data['latents']} in {', '.join(config['data']['domains'])}"),
            ("digest of the latents", data["digest"]),
        ],
        "differing": differing,
        "overlay": overlay_yaml(best.params) if best is not None else "",
        "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        "space": yaml.safe_dump(record["space"], sort_keys=False, allow_unicode=True),
        "export": f"python -m raystar.export --sweep {found.summary.sweep}{runs} --out my_model"
        if left and not found.speed
        else "",
        "again": f"python -m raystar.report --sweep {found.summary.sweep}{runs}",
    }


def _number(value: float | None) -> str:
    """As the terminal tells scores: four decimals; more digits of what is tiny, fewer of what is large."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    value = value if abs(value) > 1e-7 else 0.0  # what rounding has left of nothing
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e3 else f"{value:.4g}"


def _value(value: Any) -> str:
    return "\N{EN DASH}" if value is None else charts.text(value)


def main(argv: list[str] | None = None) -> int:
    """`python -m raystar.report`."""
    parser = argparse.ArgumentParser(
        prog="python -m raystar.report", description="Makes a sweep's report, also while the sweep runs."
    )
    parser.add_argument("--sweep", metavar="NAME", required=True, help="a sweep below --runs")
    parser.add_argument("--runs", metavar="DIR", type=Path, default=Path("runs"), help="folder of sweeps (runs)")
    parser.add_argument("--out", metavar="FILE", type=Path, help=f"where to ({REPORT} in the sweep's folder)")
    args = parser.parse_args(argv)
    folder = results.find(args.runs, args.sweep)
    if args.out is not None and (args.out.is_dir() or not args.out.parent.is_dir()):
        raise RaystarError(f"--out {args.out}: expected a file in a folder that is there")
    path = write(folder, storage_of(folder, args.runs), args.out)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def storage_of(folder: Path, runs: Path) -> Storage:
    """Where a sweep's trials keep their files, as its record says."""
    there: Mapping[str, Any] = results.read(folder).record
    return Storage(there.get("storage") or str(runs)).child(folder.name)


if __name__ == "__main__":
    run_cli(main)
