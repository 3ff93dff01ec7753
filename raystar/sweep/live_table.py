"""A sweep in the terminal: a table redrawn in place, or a line an epoch where output goes to a file."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from raystar.base.console import duration, shows
from raystar.record.statuses import BROKEN, PENDING, RUNNING
from raystar.record.summary import REFERENCES, Summary, TrialRecord
from raystar.search.purpose import Column

logger = logging.getLogger(__name__)

_ROWS = 16
_STYLES = {
    "finished": "green",
    "running": "cyan",
    "stopped": "dim",
    "pending": "dim",
    "interrupted": "yellow",
    **dict.fromkeys(BROKEN, "red"),
}


class Board:
    """Shows a `Summary` while it changes.

    Args:
        epochs: of a trial that runs to its end.
        repeats: trials that the finals will have, while these have not begun.
    """

    def __init__(self, summary: Summary, epochs: int, repeats: int = 0) -> None:
        self.summary = summary
        self.epochs = epochs
        self.repeats = repeats
        self.console = Console()
        self.live: Live | None = None
        if self.console.is_terminal and shows():
            self.live = Live(get_renderable=self._render, console=self.console, refresh_per_second=2)

    def start(self) -> None:
        """Begins to draw."""
        if self.live is not None:
            self.live.start()

    def stop(self) -> None:
        """Leaves the last state on the screen."""
        if self.live is not None:
            self.live.refresh()
            self.live.stop()

    def changed(self, record: TrialRecord, value: float | None = None) -> None:
        """Shows a trial's new epoch (`value` is its score there) or status."""
        if self.live is not None:
            return
        best = self.summary.best
        score = f"{self.summary.short_metric} {value:.4f}  " if value is not None else ""
        state = f"{record.status}, unmoved" if record.unmoved else record.status
        leader = f"best {best.score:.4f} ({best.trial})  " if best is not None and best.score is not None else ""
        reason = f"  {record.reason}" if record.reason and record.status not in (RUNNING, "stopped") else ""
        logger.info(
            f"{record.trial}  {state:<9} epoch {record.epochs}/{self.epochs}  {score}{leader}{self._clock()}{reason}"
        )

    def show_references(self) -> None:
        """Shows what a model has to beat, which is known from now on."""
        if self.live is None:
            for line in reference_lines(self.summary):
                logger.info(line)

    def _clock(self) -> str:
        elapsed = time.time() - self.summary.started
        rest = self.rest_s()
        return f"elapsed {duration(elapsed)}" + (f"  about {duration(rest)} left" if rest is not None else "")

    def rest_s(self) -> float | None:
        """An estimate of the seconds left, once a trial has ended: what is left, at the pace so far."""
        ended, epochs_done, running = self.summary.ended, self.summary.epochs_done, self.summary.running
        if not ended.trials or not epochs_done:
            return None
        pace = (time.time() - self.summary.started) / epochs_done
        usual = ended.epochs / ended.trials
        # A trial that has outlived the usual one is likely to run to its end.
        epochs_left = sum(
            (usual if r.epochs < usual and r.parent is None else self.epochs) - r.epochs for r in running.values()
        )
        waiting = self.summary.planned - ended.trials - sum(r.parent is None for r in running.values())
        repeats = [self.summary.trials[name].status for name in self.summary.repeats]
        waiting_repeats = repeats.count(PENDING) if repeats else self.repeats
        return pace * (epochs_left + usual * waiting + self.epochs * waiting_repeats)

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column, justify in (
            ("trial", "left"),
            ("status", "left"),
            ("epoch", "right"),
            (self.summary.short_metric, "right"),
        ):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        table.add_column("changed", overflow="ellipsis", no_wrap=True, max_width=90)
        best = self.summary.best
        records = self._shown()
        for record in records:
            style = _STYLES.get(record.status, "")
            score = "" if record.score is None else f"{record.score:.4f}"
            mark = " *" if record is best else ""
            values = (
                record.reason if record.reason and record.status != "stopped" else _values(self.summary.changed(record))
            )
            table.add_row(
                record.trial + mark,
                Text(f"{record.status}, unmoved" if record.unmoved else record.status, style),
                f"{record.epochs}/{self.epochs}",
                score,
                values,
            )
        for name, words in REFERENCES.items():
            if (value := self.summary.reference(name)) is not None:
                table.add_row(Text(words, "dim"), "", "", f"{value:.4f}", "")
        hidden = len(self.summary.trials) - len(records)
        counts = ", ".join(f"{n} {status}" for status, n in self.summary.counts().items())
        line = f"{counts}{f' ({hidden} not shown)' if hidden else ''}"
        if best is not None and best.score is not None:
            line += f"  best {best.score:.4f} ({best.trial})"
        return Group(table, Text(f"{line}  {self._clock()}", "bold"))

    def _shown(self) -> list[TrialRecord]:
        """All trials if they fit, else the running ones, then the best."""
        records = list(self.summary.trials.values())
        if len(records) <= _ROWS:
            return records
        sign = 1 if self.summary.mode == "min" else -1
        order = sorted(records, key=lambda r: (r.status != RUNNING, r.score is None, sign * (r.score or 0.0)))
        return order[:_ROWS]


def reference_lines(summary: Summary) -> list[str]:
    """What a model has to beat, a line each; none where the metric is not of the ruler's."""
    known = [(words, summary.reference(name)) for name, words in REFERENCES.items()]
    return [f"  {words}: {summary.short_metric} {value:.4f}" for words, value in known if value is not None]


def ranking(summary: Summary, columns: Sequence[Column]) -> list[str]:
    """All trials with a score, best first: `columns`, and how each differs from the baseline."""
    titles = "".join(f"{c.title:>{len(format(0.0, c.form) + c.unit)}}" for c in columns)
    ranked = summary.ranked()
    wide = max([6, *(len(record.trial) for record in ranked)])
    lines = [f"  {'trial':{wide}}{titles}  changed"]
    for record in ranked:
        values = "".join(format(record.metrics[c.metric], c.form) + c.unit for c in columns)
        changed = "baseline" if record is summary.baseline else _values(summary.changed(record))
        lines.append(f"  {record.trial:{wide}}{values}  {changed}")
    return lines


def _values(params: dict[str, Any]) -> str:
    return "  ".join(f"{key.rpartition('.')[2]}={value}" for key, value in params.items())
