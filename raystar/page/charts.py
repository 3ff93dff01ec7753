"""The charts of a report, as Plotly figures; colours are names of the page's own, which follow light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from raystar.base.metrics import arrow, label
from raystar.page.importance import Importance
from raystar.record.results import Results
from raystar.record.statuses import BROKEN, STOPPED
from raystar.record.summary import REFERENCES, TrialRecord

BEST, BASELINE, OTHER, BAD, INK, LINE, PAPER = (
    f"var(--{name})" for name in ("best", "baseline", "other", "bad", "ink", "line", "card")
)
MOST_CURVES = 100
"""Trials whose learning curves are drawn: the best ones, and the baseline."""
MOST_DOTS = 400
"""Trials that the other charts show: the best ones, and the baseline."""
_POINTS = 200  # of a curve
_ISO = 40  # points of a line of equal score


def score_label(results: Results) -> str:
    """The sweep's metric as an axis names it, with its unit."""
    return f"{label(results.summary.metric)}, {arrow(results.summary.mode)}"


def learning_curves(results: Results) -> go.Figure | None:
    """Score over epochs, a line a trial, with ASHA's rungs; None where no trial has a score."""
    summary = results.summary
    best, baseline = summary.best, summary.baseline
    with_curve = [r for r in results.by_score() if results.curve(r.trial)]
    if not with_curve:
        return None
    records = [r for i, r in enumerate(with_curve) if i < MOST_CURVES or r is baseline]
    figure = _figure(results, "epoch", score_label(results))
    # The two that matter last, so that they lie on top.
    for record in sorted(records, key=lambda r: (r is best, r is baseline)):
        curve = results.curve(record.trial)
        epochs = _thinned(sorted(curve), keep=record.score_epoch)
        name, colour, width, dash, order = "other trials", OTHER, 1.2, "solid", 3
        if record is best:
            name, colour, width, order = f"best ({record.trial})", BEST, 3.2, 1
        elif record is baseline:
            name, colour, width, dash, order = f"baseline ({record.trial})", BASELINE, 2.6, "dash", 2
        figure.add_scatter(
            x=epochs,
            y=[curve[epoch] for epoch in epochs],
            mode="lines+markers",  # a marker a measurement
            name=name,
            legendgroup=name,
            showlegend=name not in {trace.name for trace in figure.data},
            legendrank=order,
            line={"color": colour, "width": width, "dash": dash},
            marker={"size": 6 if order < 3 else 4, "color": colour},
            opacity=1.0 if order < 3 else 0.75,
            hovertemplate=f"{_about(results, record)}<br>epoch %{{x}}: %{{y:.4f}}<extra></extra>",
        )
    _ends(figure, results, [r for r in records if r.status == STOPPED], "stopped early", "x-thin", OTHER, 4)
    _ends(figure, results, [r for r in records if r.status in BROKEN], "went wrong", "triangle-down", BAD, 5)
    for number, epoch in enumerate(results.rungs):
        label = "rung" if number == 0 else ""
        figure.add_vline(epoch, line={"color": OTHER, "width": 1.5, "dash": "dot"}, layer="below")
        figure.add_annotation(
            x=epoch, y=1, yref="paper", text=label, showarrow=False, yanchor="top", xanchor="left", font={"size": 11}
        )
    for name, words in REFERENCES.items():
        if (value := summary.reference(name)) is not None:
            figure.add_hline(
                value,
                line={"color": INK, "width": 1.2, "dash": "dashdot"},
                layer="below",
                annotation={"text": words, "font": {"size": 11}, "xanchor": "right", "yanchor": "bottom"},
            )
    figure.update_yaxes(range=_frame(_drawn_scores(results, records), summary.mode))
    first, last = (pick(e for r in records for e in results.curve(r.trial)) for pick in (min, max))
    margin = max(0.25, 0.03 * (last - first))
    figure.update_xaxes(range=[first - margin, last + margin], tickformat="d")
    if results.epochs <= 20:
        figure.update_xaxes(dtick=1 if results.epochs <= 10 else 2)
    return figure


def _drawn_scores(results: Results, records: Sequence[TrialRecord]) -> list[float]:
    """Every score of the learning curves, and those of the references."""
    references = [results.summary.reference(name) for name in REFERENCES]
    curves = [value for record in records for value in results.curve(record.trial).values()]
    return [*curves, *(value for value in references if value is not None)]


def _ends(
    figure: go.Figure, results: Results, records: Sequence[TrialRecord], name: str, symbol: str, colour: str, order: int
) -> None:
    """Marks where trials ended."""
    last = [(r, max(curve.items())) for r in records if (curve := results.curve(r.trial))]
    if last:
        figure.add_scatter(
            x=[epoch for _, (epoch, _) in last],
            y=[value for _, (_, value) in last],
            mode="markers",
            name=name,
            legendrank=order,
            marker={"symbol": symbol, "size": 9, "color": colour, "line": {"color": colour, "width": 2}},
            text=[f"{_about(results, r)}<br>{html.escape(r.reason or r.status)}" for r, _ in last],
            hovertemplate="%{text}<br>%{y:.4f}<extra></extra>",
        )


def slices(results: Results) -> dict[str, go.Figure]:
    """Of each swept key the score over its values, a dot a trial."""
    summary, ranked = results.summary, _shown(results)
    if not ranked:
        return {}
    figures = {}
    for key, (kind, _) in results.drawn.items():
        figure = _figure(results, short(key), label(summary.metric))
        values: list[Any] = [record.params.get(key) for record in ranked]
        numbers = all(isinstance(value, int | float) for value in values)  # an experiment may set what no range holds
        if kind.listed or not numbers:
            different = {text(value): value for value in values}
            order = sorted(different, key=lambda t: _place(different[t]))
            figure.update_xaxes(type="category", categoryorder="array", categoryarray=order)
            values = [text(value) for value in values]
        elif kind.logarithmic and all(value > 0 for value in values):
            ticks = _ticks(min(values), max(values))
            figure.update_xaxes(
                type="log", tickvals=ticks, ticktext=[f"{t:g}" for t in ticks], title=f"{short(key)} (log)"
            )
        groups = (
            ("other trials, run to the end", OTHER, "circle", 8, lambda r: r.status != STOPPED),
            ("stopped early: fewer epochs", OTHER, "circle-open", 9, lambda r: r.status == STOPPED),
            ("baseline", BASELINE, "diamond", 12, lambda r: r is summary.baseline),
            ("best", BEST, "star", 15, lambda r: r is summary.best),
        )
        taken: set[str] = set()
        for name, colour, symbol, size, belongs in reversed(groups):
            places = [i for i, r in enumerate(ranked) if belongs(r) and r.trial not in taken]
            taken |= {ranked[i].trial for i in places}
            if places:
                figure.add_scatter(
                    x=[values[i] for i in places],
                    y=[ranked[i].score for i in places],
                    mode="markers",
                    name=name,
                    marker={"color": colour, "symbol": symbol, "size": size, "line": {"color": PAPER, "width": 1}},
                    text=[_about(results, ranked[i]) for i in places],
                    hovertemplate=f"%{{text}}<br>{html.escape(short(key))} %{{x}}: %{{y:.4f}}<extra></extra>",
                )
        figure.data = figure.data[::-1]  # the best lies on top
        figure.update_layout(showlegend=False)
        figure.update_yaxes(range=_frame([r.score for r in ranked if r.score is not None], summary.mode))
        figures[key] = figure
    return figures


def _place(value: Any) -> tuple[int, float, str]:
    """Where a choice stands among others: numbers first, in their order, then what is text, then lists."""
    number = value if isinstance(value, int | float) else 0.0
    return 2 * isinstance(value, list) + isinstance(value, str), number, text(value)


def _shown(results: Results) -> list[TrialRecord]:
    ranked = results.summary.ranked()
    return [r for i, r in enumerate(ranked) if i < MOST_DOTS or r is results.summary.baseline]


def importances(results: Results, importance: Importance) -> go.Figure:
    """A dot a key with its interval; the most important on top."""
    keys = importance.keys[::-1]
    figure = _figure(results, f"rise of the error, {label(results.summary.metric)}", "")
    figure.add_vline(0, line={"color": LINE, "width": 2})
    figure.add_scatter(
        x=[k.rise for k in keys],
        y=[short(k.key) for k in keys],
        mode="markers",
        marker={"size": 11, "color": BEST},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [k.high - k.rise for k in keys],
            "arrayminus": [k.rise - k.low for k in keys],
            "color": BEST,
            "thickness": 2,
            "width": 5,
        },
        text=[f"{k.low:.4f} to {k.high:.4f}" for k in keys],
        hovertemplate="%{y}: %{x:.4f} (%{text})<extra></extra>",
    )
    figure.update_yaxes(automargin=True, title=None, showgrid=False)
    return figure


def front(results: Results) -> go.Figure | None:
    """Style over content, coloured by diversity, with lines of equal score; a speed sweep's compiling over speed."""
    across, up = results.purpose.front[0], results.purpose.front[1] or results.summary.metric
    scored = [r for r in _shown(results) if _finite(r.metrics.get(across)) and _finite(r.metrics.get(up))]
    if not scored:
        return None
    better = "lower is better"
    figure = _figure(
        results,
        f"{label(across)}, {better}",
        score_label(results) if up == results.summary.metric else f"{label(up)}, {better}",
    )
    x, y = ([r.metrics[name] for r in scored] for name in (across, up))
    optimal = set(undominated(results, scored))
    marker: dict[str, Any] = {"color": OTHER, "opacity": 1, "line": {}}
    marker["size"] = [16 if r.trial in optimal else 11 for r in scored]
    marker["line"]["width"] = [3 if r.trial in optimal else 1 for r in scored]
    marker["line"]["color"] = [INK if r.trial in optimal else OTHER for r in scored]
    if results.purpose.models:
        _equal_scores(figure, x, y, 1.0 if results.of_0_1 else 0.1)
        marker |= {
            "color": [r.metrics.get("eval/diversity") for r in scored],
            "colorscale": "Viridis",
            "colorbar": {
                "title": {"text": "diversity (no unit), higher is better", "side": "right"},
                "thickness": 12,
                "outlinewidth": 0,
            },
        }
    _mark_references(figure, results, across, up)
    names = {id(results.summary.best): "best", id(results.summary.baseline): "baseline"}
    figure.add_scatter(
        x=x,
        y=y,
        mode="markers+text",
        marker=marker,
        text=[names.get(id(r), "") for r in scored],
        textposition=["bottom center" if r is results.summary.best else "top center" for r in scored],
        customdata=[
            _about(results, r)
            + "".join(
                f"<br>{name.rpartition('/')[2]} {r.metrics[name]:.4f}"
                for name in dict.fromkeys((results.summary.metric, across, up, "eval/diversity"))
                if name in r.metrics
            )
            + ("<br>on the front" if r.trial in optimal else "")
            for r in scored
        ],
        hovertemplate="%{customdata}<extra></extra>",
        showlegend=False,
    )
    return figure


def _mark_references(figure: go.Figure, results: Results, across: str, up: str) -> None:
    """What a model has to beat, as crosses."""
    beside = [(words, results.summary.references.get(name, {})) for name, words in REFERENCES.items()]
    beside = [
        (words, metrics) for words, metrics in beside if _finite(metrics.get(across)) and _finite(metrics.get(up))
    ]
    if beside:
        figure.add_scatter(
            x=[metrics[across] for _, metrics in beside],
            y=[metrics[up] for _, metrics in beside],
            mode="markers+text",
            marker={"symbol": "x", "size": 11, "color": INK},
            text=[words for words, _ in beside],
            textposition="top center",
            hovertemplate="%{text}<extra></extra>",
            showlegend=False,
        )


def undominated(results: Results, records: Sequence[TrialRecord]) -> list[str]:
    """Trials than which none is better in one respect and as good in the others: style, content and diversity, or,
    of a speed sweep, speed and compiling."""
    rows: list[tuple[float, ...]]
    if not results.purpose.models:
        rows = [(r.metrics["perf/compile_s"], -r.metrics[results.summary.metric]) for r in records]
    else:
        rows = [
            (r.metrics["eval/style"], r.metrics["eval/content"], -r.metrics.get("eval/diversity", 0.0)) for r in records
        ]
    points = np.array(rows)
    beaten = [bool(((points <= p).all(axis=1) & (points < p).any(axis=1)).any()) for p in points]
    return [record.trial for record, lost in zip(records, beaten, strict=True) if not lost]


def _equal_scores(figure: go.Figure, x: Sequence[float], y: Sequence[float], perfect: float) -> None:
    """Lines along which (perfect + S)(1 + C) is the same."""
    products = sorted((perfect + s) * (1 + c) for s, c in zip(x, y, strict=True))
    levels = np.round(np.linspace(products[0], products[min(len(products) - 1, int(len(products) * 0.8))], 4), 2)
    low, high = min(x), max(x)
    s = np.linspace(max(0.0, low - 0.1 * (high - low + 0.1)), high + 0.1 * (high - low + 0.1), _ISO)
    for level in sorted(set(levels.tolist())):
        c = level / (perfect + s) - 1
        inside = (c >= 0) & (c <= max(y) * 1.25 + 0.02)
        if inside.any():
            figure.add_scatter(
                x=s[inside].tolist(),
                y=c[inside].tolist(),
                mode="lines",
                line={"color": LINE, "width": 1.2, "dash": "dot"},
                hovertemplate=f"({perfect:g} + style)(1 + content) = {level:g}<extra></extra>",
                showlegend=False,
            )


def _figure(results: Results, across: str, up: str) -> go.Figure:
    figure = go.Figure()
    axis = {"gridcolor": LINE, "zeroline": False, "linecolor": LINE, "automargin": True, "title": {"standoff": 8}}
    figure.update_layout(
        template=None,
        autosize=True,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": INK},
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        hoverlabel={"bgcolor": PAPER, "bordercolor": LINE, "font": {"color": INK}, "align": "left"},
        hovermode="closest",
        legend={"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"},
        xaxis=axis,
        yaxis=axis,
    )
    figure.update_xaxes(title={"text": across})
    figure.update_yaxes(title={"text": up})
    return figure


def _about(results: Results, record: TrialRecord) -> str:
    """A trial as a hover tells it."""
    role = {id(results.summary.best): ", best", id(results.summary.baseline): ", baseline"}.get(id(record), "")
    values = [f"{html.escape(short(key))} {html.escape(text(value))}" for key, value in record.params.items()]
    lines = ["  ".join(values[i : i + 3]) for i in range(0, len(values), 3)]
    return "<br>".join([f"<b>{html.escape(record.trial)}</b>{role}, {html.escape(record.status)}", *lines])


def short(key: str) -> str:
    """`w_cyc` of `loss.w_cyc`."""
    return key.partition(".")[2] or key


def text(value: Any) -> str:
    """A configuration's value, much as YAML writes it."""
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "null"
    return f"{value:g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)


def _thinned(epochs: list[int], keep: int | None) -> list[int]:
    if len(epochs) <= _POINTS:
        return epochs
    chosen = {epochs[round(i * (len(epochs) - 1) / (_POINTS - 1))] for i in range(_POINTS)}
    return sorted(chosen | {epoch for epoch in epochs if epoch == keep})


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 in every decade between `low` and `high`, and a little beyond; whole decades of a wide range."""
    steps = (1, 2, 5) if high / low < 300 else (1,)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
    return [tick for tick in ticks if low / 1.6 <= tick <= high * 1.6]


def _frame(values: Sequence[float], mode: str) -> list[float] | None:
    """A range without what is far worse than the rest, so that the rest can be distinguished; None to show all."""
    toward_worse = sorted(v if mode == "min" else -v for v in values)
    best, usual, worst = toward_worse[0], toward_worse[int(0.9 * (len(toward_worse) - 1))], toward_worse[-1]
    if usual == best or worst - best <= 2.5 * (usual - best):
        return None
    low, high = best - 0.08 * (usual - best), usual + 0.4 * (usual - best)
    return [low, high] if mode == "min" else [-high, -low]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def framed_out(results: Results) -> int:
    """Points of the learning curves that lie outside the frame in which they are first shown."""
    records = results.by_score()
    values = [v for r in records for v in results.curve(r.trial).values()]
    frame = _frame(_drawn_scores(results, records), results.summary.mode) if values else None
    return 0 if frame is None else sum(not frame[0] <= v <= frame[1] for v in values)
