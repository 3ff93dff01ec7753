"""The parts of the report, each as plain values for the template."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from raystar.base.command import below, command
from raystar.base.console import duration
from raystar.base.metrics import METRICS, OF_0_1, arrow, higher_is_better
from raystar.base.secrets import redact
from raystar.base.storage import Storage
from raystar.config.load import overlay_yaml, to_mapping
from raystar.config.schema import Config
from raystar.config.strict_yaml import dump_yaml
from raystar.page import charts
from raystar.page import contact_sheet as contact
from raystar.page.importance import Importance, importance
from raystar.record import finals
from raystar.record.results import Results
from raystar.record.statuses import BROKEN, RUNNING, STOPPED, UNFINISHED
from raystar.record.summary import REFERENCES, TrialRecord
from raystar.record.sweep_file import leaves

_EXPLAINED = {name: metric.meaning for name, metric in METRICS.items() if metric.meaning}
_ROWS, _COLUMNS = 16, 6  # of the contact sheet
_LARGE = 3  # trials whose grids are shown large
_TABLE = 500  # rows; summary.csv has them all
_TRACE = 25  # lines of what a trial raised

# Characters of embedded pictures; with the charts' library (4.8 MB) and the numbers the page stays below 10 MB.
_THUMBS, _GRIDS = 2_900_000, 1_400_000
_SHEET_ROWS = 12
TRUST = 0.15  # skill below which importances are said to mean nothing

_GRID_KINDS = {"grid_ref": "styles of references", "grid_noise": "styles of noise"}


def explained(results: Results) -> dict[str, str]:
    """What measures mean; of a sweep of 0.1, what they meant there."""
    return {**_EXPLAINED, **OF_0_1} if results.of_0_1 else _EXPLAINED


def headline(results: Results) -> str:
    """What won and by how much, in a sentence."""
    summary = results.summary
    best, baseline, gain = summary.best, summary.baseline, summary.gain
    name = summary.short_metric
    if summary.finals is not None:
        return finals.line(summary, summary.finals).replace("+-", "\N{PLUS-MINUS SIGN}") + "."
    if best is None or best.score is None:
        running = any(r.status in UNFINISHED for r in summary.trials.values()) and summary.status == RUNNING
        return "No trial has a score yet." if running else "No trial has a score that counts."
    leads = "is ahead" if summary.status == RUNNING else "won"
    line = f"{best.trial} {leads} with {name} {as_number(best.score)} after epoch {best.score_epoch}"
    if baseline is None:
        return f"{line}; the sweep has no baseline to compare with."
    if gain is None:
        return f"{line}; the baseline, {baseline.trial}, has no score."
    if best is baseline:
        return f"{line}: it is the baseline, and no other trial beats it."
    return f"{line}, {gain:.1%} better than the baseline's {as_number(baseline.score)}."


def facts(results: Results) -> list[tuple[str, str, str]]:
    """The numbers at the top: name, text, and the exact value behind it."""
    summary = results.summary
    best, baseline, gain = summary.best, summary.baseline, summary.gain
    counts = ", ".join(f"{n} {status.replace('_', ' ')}" for status, n in summary.counts().items())
    facts = [("status", summary.status, summary.status)]
    if best is not None and best.score is not None:
        facts.append((f"best {summary.short_metric}", as_number(best.score), repr(best.score)))
    if baseline is not None and baseline.score is not None:
        facts.append((f"baseline {summary.short_metric}", as_number(baseline.score), repr(baseline.score)))
    if summary.finals is not None:
        mean = summary.finals.ranked[0].mean
        facts.append((f"{summary.finals.winner}'s mean over seeds", as_number(mean), repr(mean)))
    for name, words in REFERENCES.items():
        if (value := summary.reference(name)) is not None:
            facts.append((words, as_number(value), repr(value)))
    data = results.record["config"]["data"]
    if results.purpose.models and data.get("holdout") == 0 and data.get("eval_data_root") is None:
        facts.append(("measured on", "training latents", "data.holdout is 0: no score is of pictures new to training"))
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


def finalists(results: Results) -> list[dict[str, Any]]:
    """A row for each finalist: its mean, what that may be off by, and the score of each of its runs."""
    summary = results.summary
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


def parts(results: Results) -> list[dict[str, Any]]:
    """The measured parts of the score, of the baseline and of the best, as measured last."""
    best, baseline = results.summary.best, results.summary.baseline
    if best is None:
        return []
    group = results.purpose.group
    names = [name for name in _EXPLAINED if name in best.metrics and name.startswith(group)]
    names = list(dict.fromkeys([results.summary.metric, *names]))
    meanings = explained(results)
    parts = []
    for name in names:
        now, then = best.metrics.get(name), baseline.metrics.get(name) if baseline is not None else None
        change = now - then if now is not None and then is not None and best is not baseline else None
        higher = results.summary.mode == "max" if name == results.summary.metric else higher_is_better(name)
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
                "meaning": meanings.get(name, "")
                + ("" if not judged else f"; {arrow('max' if higher else 'min')}" if meanings.get(name) else ""),
            }
        )
    return parts


def changes(results: Results) -> list[tuple[str, Any, Any, str]]:
    """Swept keys with the baseline's and the best trial's values, and how they were drawn."""
    best, baseline = results.summary.best, results.summary.baseline
    if best is None:
        return []
    return [
        (
            key,
            baseline.params.get(key) if baseline is not None else None,
            best.params.get(key),
            kind.describe(values),
        )
        for key, (kind, values) in results.drawn.items()
    ]


def weights(results: Results) -> Importance | None:
    """What each key weighs in the search's trials; None where there are too few."""
    known = [r for r in results.summary.ranked() if r.parent is None and results.curve(r.trial)]
    logarithmic = [key for key, (kind, _) in results.drawn.items() if kind.logarithmic]
    return importance([r.params for r in known], [results.curve(r.trial) for r in known], logarithmic)


def stops(results: Results) -> str:
    """How many trials were stopped early, and where."""
    stopped = Counter(r.epochs for r in results.summary.trials.values() if r.status == STOPPED)
    if not stopped:
        return "No trial was stopped early."
    where = ", ".join(f"{n} after epoch {epoch}" for epoch, n in sorted(stopped.items()))
    total = sum(stopped.values())
    return f"{total} trial{'s were' if total > 1 else ' was'} stopped early: {where}."


def contact_sheet(results: Results, storage: Storage) -> tuple[dict[str, Any], Image.Image | None]:
    """Pictures of trials by epochs, the best trials' grids large, and the sheet as one picture."""
    first = finals.featured(results.summary)
    ranked = [*first, *(record for record in results.summary.ranked() if record not in first)]
    records = ranked[:_ROWS]
    names = [record.trial for record in records]
    epochs = contact.epochs_to_show(storage, names, results.rungs, _COLUMNS)  # where many trials ended
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
        for record in records
    ]
    embedded = iter(contact.embed([picture for _, row in sheet for picture in row.values()], _THUMBS))
    rows = [(record, {epoch: next(embedded) for epoch in pictures}) for record, pictures in sheet]
    together = contact.contact_sheet([(_label(results, r), p) for r, p in sheet[:_SHEET_ROWS]], epochs)
    large = _large(results, storage, first[:_LARGE])
    return {"rows": rows, "epochs": epochs, "large": large, "hidden": len(ranked) - len(records)}, together


def _large(results: Results, storage: Storage, records: list[TrialRecord]) -> list[tuple[TrialRecord, list[Any]]]:
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


def _label(results: Results, record: TrialRecord) -> str:
    roles = [name for name in ("best", "baseline") if getattr(results.summary, name) is record]
    return "\n".join([record.trial, *([] if record.score is None else [f"{record.score:.4f}"]), *roles])


def broken(results: Results, storage: Storage) -> list[tuple[TrialRecord, str]]:
    """Trials that went wrong or broke off, each with the end of what it raised."""
    broken = []
    for record in sorted(results.summary.trials.values(), key=lambda r: r.trial):
        if record.status in BROKEN or (record.status in UNFINISHED and record.status != RUNNING and record.reason):
            try:
                trace = storage.read(f"trials/{record.trial}/error.txt").decode(errors="replace")
            except FileNotFoundError:
                trace = ""
            broken.append((record, redact("\n".join(trace.strip().splitlines()[-_TRACE:]))))
    return broken


def notes(results: Results) -> dict[str, list[str]]:
    """What went other than asked for, each with its trials."""
    noted: dict[str, list[str]] = {}
    for record in results.by_score():
        if record.note:
            noted.setdefault(record.note, []).append(record.trial)
    return noted


def error(results: Results, folder: Path) -> str:
    """What ended the whole sweep, if something did."""
    trace = folder / "error.txt"
    if results.summary.status != "failed" or not trace.is_file():
        return ""
    return redact("\n".join(trace.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_TRACE:]))


def table(results: Results) -> dict[str, Any]:
    """All trials, best first, and the references: columns as (title, what it is), rows of (text, exact value)."""
    metrics = [m for m in _EXPLAINED if m.startswith(results.purpose.group) and m != results.summary.metric]
    records = results.by_score()
    metrics = [m for m in metrics if any(m in r.metrics for r in records)]
    columns = [
        ("trial", "name"), ("status", "how it ended"),
        (results.summary.short_metric, "the best of its epochs" if results.of_0_1 else "as measured last"),
        ("after epoch", "of that measurement"), ("epochs", "trained"),
        *((m.rpartition("/")[2].replace("_", " "), explained(results)[m]) for m in metrics),
        ("time", "h:mm:ss"), *((charts.short(key), key) for key in results.drawn),
    ]  # fmt: skip
    rows = []
    for record in (*records[:_TABLE], *results.summary.reference_records()):
        cells: list[tuple[str, Any]] = [
            (record.trial, record.trial),
            (record.status.replace("_", " ") + (", unmoved" if record.unmoved else ""), record.status),
            (as_number(record.score), record.score),
            (as_value(record.score_epoch), record.score_epoch),
            (str(record.epochs), record.epochs),
            *((as_number(record.metrics.get(m)), record.metrics.get(m)) for m in metrics),
            (duration(record.wall_s), record.wall_s),
            *((as_value(record.params.get(key)), record.params.get(key)) for key in results.drawn),
        ]
        rows.append((record, [(text, "" if exact is None else exact) for text, exact in cells]))
    return {"columns": columns, "rows": rows, "hidden": max(0, len(records) - _TABLE)}


def reproduce(results: Results, folder: Path) -> dict[str, Any]:
    """Commands, versions, seeds, data, and what the configuration has that the defaults have not."""
    record, best = results.record, results.summary.best
    config, request = record["config"], record["request"]
    code = {name: text for name, text in record["code"].items() if "/" not in name}
    defaults = dict(leaves("", to_mapping(Config())))
    differing = [(key, defaults.get(key), value) for key, value in leaves("", config) if value != defaults.get(key)]
    sweep = [("--sweep", results.summary.sweep), *below("--runs", folder.parent)]
    has_output = (folder / results.purpose.output).exists()
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
            ("search", record["space"].get("search", "random") if record["space"].get("space") else "experiments"),
            ("latents", f"{data['latents']} in {', '.join(config['data']['domains'])}"),
            ("digest of the latents", data["digest"]),
        ],
        "differing": differing,
        "overlay": overlay_yaml(best.params) if best is not None else "",
        "config": dump_yaml(config),
        "space": dump_yaml(record["space"]),
        "export": command("export", *sweep, ("--out", "my_model")) if has_output and results.purpose.models else "",
        "again": command("report", *sweep),
    }


def as_number(value: float | None) -> str:
    """As the terminal tells scores: four decimals; more digits of what is tiny, fewer of what is large."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    value = value if abs(value) > 1e-7 else 0.0  # what rounding has left of nothing
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e3 else f"{value:.4g}"


def as_value(value: Any) -> str:
    """A value as the page's tables have it; a dash for None."""
    return "\N{EN DASH}" if value is None else charts.text(value)
