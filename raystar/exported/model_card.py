"""The model card: what an exported model is, how it was made, how good it is, how to use it and what it cannot do.

Its words are in `model_card.md`, a template.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2

from raystar import __version__
from raystar.base import markdown
from raystar.base.command import command
from raystar.base.metrics import METRICS, OF_0_1, measured_by_0_1
from raystar.config.schema import Config

_TEMPLATE = Path(__file__).with_suffix(".md")
_MEANINGS = {name: metric.card for name, metric in METRICS.items() if metric.card}
_REFERENCES = {
    "nothing": "the untouched sources",
    "transfer": "the sources with their references' channel means and deviations",
}
_OPTIONAL = (
    "sweep", "trial", "epoch", "metric", "score", "params", "run_id", "data", "baseline", "finals", "standing",
    "trials", "versions", "git_commit",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Of what made a model."""
    return {"raystar": __version__, "torch": version("torch"), "python": platform.python_version()}


def card(config: Config, facts: Mapping[str, Any], files: Collection[str]) -> str:
    """The card as Markdown.

    Args:
        config: of the model.
        facts: what `metrics.json` says: `trial`, `epoch`, and what is known of `sweep`, `metric`, `mode`, `score`,
            `metrics`, `params`, `run_id`, `data`, `baseline`, `finals`, `references`, `standing`, `trials`,
            `versions`, `git_commit` and `onnx`.
        files: names of the export's files.
    """
    measured, references = facts.get("metrics") or {}, facts.get("references") or {}
    old = measured_by_0_1(measured)
    meanings = {**_MEANINGS, **OF_0_1} if old else _MEANINGS
    gain = _gain(facts)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"escaped": _text, "code": _code, "literal": _literal}
    text = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        config=config,
        domains=config.data.domains,
        facts=dict.fromkeys(_OPTIONAL) | dict(facts),
        files=files,
        rows=[(key.partition("/")[2], measured[key], words) for key, words in meanings.items() if key in measured],
        old_ruler=old,
        references=[(words, references[name]) for name, words in _REFERENCES.items() if name in references],
        metric=str(facts.get("metric", "score")).rpartition("/")[2],
        gain=gain,
        better=gain is not None and (gain < 0 if facts.get("mode", "min") == "min" else gain > 0),
        command=command(
            "translate",
            ("--model", "this_folder"),
            ("--input", "photo.jpg"),
            ("--domain", config.data.domains[-1]),
            ("--out", "translated"),
        ),
        fence=markdown.fence(config.data.domains),
        agreement=facts.get("onnx", {}).get("difference"),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _text(value: Any) -> str:
    return markdown.escaped(str(value))


def _code(value: Any) -> str:
    return markdown.code(str(value))


def _literal(text: str) -> str:
    """A text as Python reads it."""
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _gain(facts: Mapping[str, Any]) -> float | None:
    """How much more the score is than the baseline's, as a share of that; None where one of them is not known."""
    score, baseline = facts.get("score"), (facts.get("baseline") or {}).get("score")
    if not isinstance(score, float) or not isinstance(baseline, float):
        return None
    return (score - baseline) / max(abs(baseline), 1e-12)
