"""The page says what the summary says, shows what there is, asks for nothing, and stays small."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr

from raystar import report
from raystar.base.errors import RaystarError
from raystar.base.journal import Journal
from raystar.base.storage import Storage
from raystar.page import charts, sections
from raystar.page import contact_sheet as contact
from raystar.page import page as page_module
from raystar.page.importance import FEWEST, importance
from raystar.record import results
from raystar.record.summary import Summary
from raystar.sweep import finish as outcome
from raystar.sweep.plan import Plan
from tests.kit.support import ROOT
from tests.kit.sweeps import EPOCHS, draw_pictures, make_sweep


class Page(HTMLParser):
    """What a browser would find in a report."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.figures: dict[str, Any] = {}
        self.text = ""
        self._open: dict[str, str | None] | None = None
        self._style = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = dict(attrs) if tag == "script" else None
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._open, self._style = None, False

    def handle_data(self, data: str) -> None:
        if self._open is None:
            self.text += "" if self._style else data
        elif self._open.get("type") == "application/json":
            self.figures = json.loads(data)
        else:
            self.scripts.append(data)

    def facts(self) -> dict[str, str]:
        return {str(a["data-fact"]): str(a["data-value"]) for _, a in self.tags if "data-fact" in a}

    def table(self) -> list[list[str]]:
        """Exact values of the table of all trials."""
        at = next(i for i, (tag, a) in enumerate(self.tags) if tag == "table" and a.get("id") == "table")
        rows: list[list[str]] = []
        for tag, attributes in self.tags[at:]:
            if tag == "section":
                break
            if tag == "tr":
                rows.append([])
            elif "data-value" in attributes:
                rows[-1].append(str(attributes["data-value"]))
        return [row for row in rows if row]


def page_of(folder: Path) -> Page:
    return Page(page_module.write(folder, Storage(str(folder))).read_text())


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    """Fifty trials, some broken, with pictures as large as five domains make them."""
    folder = make_sweep(
        tmp_path_factory.mktemp("fifty"),
        50,
        broken={3: ("diverged", "train/g_loss became NaN at epoch 3"), 7: ("out_of_memory", "20 of 30 batches")},
    )
    draw_pictures(folder, pixels=822)
    return folder, page_of(folder)


# -- the same numbers ----------------------------------------------------------------------------


def test_the_table_is_the_summary(sweep: tuple[Path, Page]) -> None:
    folder, page = sweep
    trials = {trial["trial"]: trial for trial in summary_of(folder)["trials"]}
    rows = page.table()
    assert sorted(row[0] for row in rows) == sorted(trials)
    names = ("style", "content", "diversity", "worst_pair", "accuracy", "movement", "outlook")
    for row in rows:
        trial = trials[row[0]]
        expected = [trial["trial"], trial["status"], trial["score"], trial["score_epoch"], trial["epochs"]]
        expected += [trial["metrics"][f"eval/{name}"] for name in names]
        expected += [trial["wall_s"], *trial["params"].values()]
        assert row == [str(value) for value in expected]
    comparable = [float(row[2]) for row in rows if row[1] in ("finished", "stopped")]
    assert comparable == sorted(comparable)
    assert len(comparable) == 48


def test_the_facts_are_the_summary(sweep: tuple[Path, Page]) -> None:
    folder, page = sweep
    summary, facts = summary_of(folder), page.facts()
    best, baseline = summary["best"], summary["baseline"]
    assert float(facts["best score"]) == best["score"]
    assert float(facts["baseline score"]) == baseline["score"]
    assert float(facts["gain over the baseline"]) == (baseline["score"] - best["score"]) / baseline["score"]
    assert float(facts["wall time"]) == summary["wall_s"]
    assert int(facts["epochs trained"]) == sum(trial["epochs"] for trial in summary["trials"])
    gain = f"{(baseline['score'] - best['score']) / baseline['score']:.1%}"
    won = f"{best['trial']} won with score {best['score']:.4f} after epoch {best['score_epoch']}, {gain} better"
    assert won in page.text


def test_the_curves_are_the_journal(sweep: tuple[Path, Page]) -> None:
    folder, page = sweep
    told: dict[str, dict[int, float]] = {}
    for event in Journal(folder / "journal.jsonl"):
        if event["event"] == "epoch":
            told.setdefault(event["trial"], {})[event["epoch"]] = event["metrics"]["eval/score"]
    traces = [t for t in page.figures["curves"]["data"] if "lines" in t["mode"]]
    drawn = {re.search(r"<b>(\w+)</b>", t["hovertemplate"])[1]: t for t in traces}  # type: ignore[index]
    assert {name: dict(zip(t["x"], t["y"], strict=True)) for name, t in drawn.items()} == told
    best, baseline = (summary_of(folder)[role]["trial"] for role in ("best", "baseline"))
    assert drawn[best]["name"] == f"best ({best})"
    assert drawn[baseline]["line"]["dash"] == "dash"
    stopped = next(t for t in page.figures["curves"]["data"] if t["name"] == "stopped early")
    ended = [t for t in summary_of(folder)["trials"] if t["status"] == "stopped"]
    assert sorted(stopped["x"]) == sorted(t["epochs"] for t in ended)
    rungs = [shape["x0"] for shape in page.figures["curves"]["layout"]["shapes"]]
    assert rungs == [1, 2, 4]


def test_every_chart_says_what_and_in_which_unit(sweep: tuple[Path, Page]) -> None:
    _, page = sweep
    assert set(page.figures) == {"curves", "front", "importance", "slice-0", "slice-1", "slice-2"}
    places = {a["id"]: a["aria-label"] for _, a in page.tags if str(a.get("id", "")).startswith("chart-")}
    assert set(places) == {f"chart-{name}" for name in page.figures}
    for name, figure in page.figures.items():
        across, up = (figure["layout"][axis].get("title", {}).get("text", "") for axis in ("xaxis", "yaxis"))
        assert across == "epoch" or "(no unit)" in across or (name.startswith("slice") and across)
        assert "(no unit)" in up or name == "importance"
    assert page.figures["front"]["data"][-1]["marker"]["colorbar"]["title"]["text"].startswith("diversity (no unit)")


def test_the_front_holds_what_nothing_beats(sweep: tuple[Path, Page]) -> None:
    folder, page = sweep
    found = results.read(folder)
    trials = {t["trial"]: t["metrics"] for t in summary_of(folder)["trials"] if t["status"] in ("finished", "stopped")}
    dots = page.figures["front"]["data"][-1]
    assert sorted(dots["x"]) == sorted(m["eval/style"] for m in trials.values())
    from raystar.page.charts import undominated

    front = undominated(found, found.summary.ranked())
    for name, m in trials.items():
        beaten = [
            o
            for o in trials.values()
            if o["eval/style"] <= m["eval/style"]
            and o["eval/content"] <= m["eval/content"]
            and o["eval/diversity"] >= m["eval/diversity"]
            and o is not m
        ]
        assert (name in front) == (not beaten)


def test_failures_and_their_reasons(sweep: tuple[Path, Page]) -> None:
    _, page = sweep
    assert "train/g_loss became NaN at epoch 3" in page.text
    assert "out of memory" in page.text
    assert "20 of 30 batches" in page.text


def test_how_to_reproduce(sweep: tuple[Path, Page]) -> None:
    _, page = sweep
    for fact in ("python -m raystar.tune --space space.yaml --name s", "0" * 40, "feedc0de", "0123456789ab", "2.9.1"):
        assert fact in page.text


# -- one file, which asks for nothing ---------------------------------------------------------------


def test_it_is_small(sweep: tuple[Path, Page]) -> None:
    folder, page = sweep
    assert (folder / "report.html").stat().st_size < 10_000_000
    pictures = [a for tag, a in page.tags if tag == "img" and str(a["src"]).startswith("data:image/webp")]
    assert len(pictures) > 30
    assert all(a["alt"] for a in pictures)
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.width <= 1300
        assert sheet.height <= 2300
    assert (folder / "contact_sheet.png").stat().st_size < 10_000_000


def test_it_loads_nothing(sweep: tuple[Path, Page]) -> None:
    folder, page = sweep
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            assert str(attributes.get(name, "#")).startswith(("#", "data:"))
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    directives = dict(part.strip().partition(" ")[::2] for part in str(policy).split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["img-src"] == "data:"
    assert "connect-src" not in directives
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in page.scripts]
    assert directives["script-src"].split() == [f"'sha256-{found}'" for found in hashes]
    style = re.search(r"<style>(.*?)</style>", (folder / "report.html").read_text(), re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium, which is not here")
def test_a_browser_draws_every_chart_offline(sweep: tuple[Path, Page], tmp_path: Path) -> None:
    folder, page = sweep
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--proxy-server=127.0.0.1:1", "--dump-dom",
        "--virtual-time-budget=8000", "--enable-logging=stderr", f"--user-data-dir={tmp_path}",
        f"file://{folder / 'report.html'}",
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shown.stdout.count('class="plot-container plotly"') == len(page.figures)
    assert "Refused to" not in shown.stderr
    assert "Uncaught" not in shown.stderr


# -- sweeps of every kind ----------------------------------------------------------------------------


def test_what_is_written_is_escaped(tmp_path: Path) -> None:
    bad = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    folder = make_sweep(
        tmp_path,
        6,
        broken={2: ("failed", bad)},
        space={"loss.w_cyc": {"loguniform": [0.1, 10.0]}, "training.amp_dtype": {"choice": [bad, "bf16"]}},
        description=bad,
        note=bad,
    )
    (folder / "trials/t02").mkdir(parents=True)
    (folder / "trials/t02/error.txt").write_text(f"Traceback\n{bad}\npassword=hunter2")
    text = page_module.write(folder, Storage(str(folder))).read_text()
    assert text.count("<script>") == 2
    page = Page(text)
    assert len(page.scripts) == 2
    assert not [tag for tag, a in page.tags if a.get("src") == "x"]
    assert bad in page.text
    assert "hunter2" not in text
    assert "<img" not in json.dumps(page.figures["curves"])


def test_no_trial_but_the_baseline(tmp_path: Path) -> None:
    page = page_of(make_sweep(tmp_path, 1))
    assert "it is the baseline, and no other trial beats it" in page.text
    assert f"1 trial has a score, and below {FEWEST}" in page.text
    assert "There are no pictures" in page.text
    assert "importance" not in page.figures
    assert "dialog" not in [tag for tag, _ in page.tags]


def test_no_baseline(tmp_path: Path) -> None:
    page = page_of(make_sweep(tmp_path, 4, baseline=False))
    assert "has no baseline to compare with" in page.text
    assert "gain over the baseline" not in page.facts()
    assert len(page.table()) == 4


def test_all_failed(tmp_path: Path) -> None:
    broken = {number: ("failed", f"ValueError: number {number}") for number in range(3)}
    folder = make_sweep(tmp_path, 3, broken=broken, status="failed")
    (folder / "error.txt").write_text("Traceback (most recent call last):\nKeyError: 'lost'")
    page = page_of(folder)
    assert "No trial has a score that counts." in page.text
    for number in range(3):
        assert f"ValueError: number {number}" in page.text
    assert "KeyError: 'lost'" in page.text
    assert set(page.figures) == {"curves"}  # what they had learnt until then
    assert page.facts()["status"] == "failed"


def test_while_it_runs(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path, 3, status="running")
    last = summary_of(folder)["trials"][-1]
    # The journal knows an epoch that the summary does not, and a line that is being written.
    ahead = {"event": "epoch", "at": 1.8e9, "trial": "t02", "epoch": last["epochs"] + 1, "metrics": {"eval/score": 0.5}}
    with (folder / "journal.jsonl").open("a") as journal:
        journal.write(json.dumps(ahead) + '\n{"event": "ep')
    page = page_of(folder)
    assert "is ahead with" in page.text
    assert 0.5 not in [y for t in page.figures["curves"]["data"] for y in t["y"]]
    assert "while the sweep ran" in page.text


REFERENCES = {
    "nothing": {"eval/score": 1.1, "eval/style": 1.0, "eval/content": 0.0},
    "transfer": {"eval/score": 0.9, "eval/style": 0.7, "eval/content": 0.125},
}


def test_the_finals(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path, 20, references=REFERENCES, seeds=2)
    draw_pictures(folder)
    page, summary = page_of(folder), summary_of(folder)
    found = summary["finals"]
    won = found["ranked"][0]
    assert won["trial"] == found["winner"]
    assert f"winner {won['trial']}: score {won['mean']:.4f} \N{PLUS-MINUS SIGN} " in page.text
    assert float(page.facts()["gain over the baseline"]) == found["gain"]
    assert float(page.facts()[f"{won['trial']}'s mean over seeds"]) == won["mean"]
    at = next(i for i, (tag, a) in enumerate(page.tags) if tag == "table" and a.get("id") == "finals")
    shown = [str(a["data-value"]) for tag, a in page.tags[at:] if tag == "td" and "data-value" in a]
    assert shown[: len(found["ranked"])] == [str(finalist["mean"]) for finalist in found["ranked"]]
    for finalist in found["ranked"]:
        assert ", ".join(f"{score:.4f}" for score in finalist["scores"]) in page.text
    assert "Every trial was trained once" not in page.text
    assert summary["best"]["trial"] in won["runs"]
    # The finalists' best runs and the baseline's lead the pictures.
    rows = [str(a["alt"]).partition(",")[0] for tag, a in page.tags if tag == "img" and ", epoch 8" in str(a["alt"])]
    leading = [min(zip(f["scores"], f["runs"], strict=True))[1] for f in found["ranked"]]
    sheet = [name for name in dict.fromkeys(rows) if name in summary_names(summary)]
    assert sheet[: len(leading)] == leading


def summary_names(summary: dict[str, Any]) -> set[str]:
    return {trial["trial"] for trial in summary["trials"]}


def test_what_a_model_has_to_beat_is_everywhere(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path, 20, references=REFERENCES)
    page, summary = page_of(folder), summary_of(folder)
    assert summary["references"] == REFERENCES
    assert (page.facts()["doing nothing"], page.facts()["channel transfer"]) == ("1.1", "0.9")
    best = summary["best"]
    assert best["score"] < 0.9
    assert f"{best['trial']} beats doing nothing (1.1000) and the channel transfer (0.9000)." in page.text
    layout = page.figures["curves"]["layout"]
    assert [s["y0"] for s in layout["shapes"] if s["y0"] == s["y1"]] == [1.1, 0.9]
    assert {"doing nothing", "channel transfer"} <= {a["text"] for a in layout["annotations"]}
    crosses = page.figures["front"]["data"][-2]
    assert (crosses["x"], crosses["y"], crosses["text"]) == (
        [1.0, 0.7], [0.0, 0.125], ["doing nothing", "channel transfer"],
    )  # fmt: skip


def test_no_model_is_called_good_that_is_not(tmp_path: Path) -> None:
    unbeaten = {name: {**values, "eval/score": 0.01} for name, values in REFERENCES.items()}
    page = page_of(make_sweep(tmp_path, 6, references=unbeaten))
    assert "no trial beats doing nothing (0.0100)." in page.text
    assert "warn" in [a.get("class") for _, a in page.tags if a.get("id") == "standing"]


def test_what_the_rungs_say_of_the_end(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path, 30, seeds=2)
    found = results.read(folder)
    summary = found.summary
    ended = [r.trial for r in summary.trials.values() if r.status == "finished"]
    assert [rung.epoch for rung in found.foresight()] == found.rungs == [1, 2, 4]
    for rung in found.foresight():
        then = [found.curve(name, "eval/outlook")[rung.epoch] for name in ended]
        last = [summary.trials[name].score for name in ended]
        assert rung.runs == len(ended)
        assert rung.correlation == pytest.approx(spearmanr(then, last).statistic)
    page = page_of(folder)
    assert f"{found.foresight()[0].correlation:+.2f}" in page.text
    assert "What the rungs say of the end" in page.text


@pytest.mark.parametrize(
    ("runs", "correlation", "said"),
    [
        (3, 0.9, "too few to say what it is worth (runs to the end: 3)"),
        (9, math.nan, "too few to say"),
        (4, 0.1, "+0.10 over 4 runs"),
        (9, 0.8, "+0.80 over 9 runs"),
        (5, 0.4, "+0.40 over 5 runs; it says little of the end: raise scheduler.grace_epochs"),
    ],
)
def test_a_rung_in_words(runs: int, correlation: float, said: str) -> None:
    rung = results.Foresight(2, "eval/outlook", runs, correlation)
    assert said in rung.words
    assert rung.doubtful == ("says little" in said)


def test_choices_of_numbers_and_lists_stand_in_their_order(tmp_path: Path) -> None:
    space = {"data.max_samples": {"choice": [50, [9, 20, 3], None, 7]}}
    found = results.read(make_sweep(tmp_path, 30, space=space))
    figure = charts.slices(found)["data.max_samples"]
    assert list(figure.layout.xaxis.categoryarray) == ["null", "7", "50", "[9, 20, 3]"]
    assert sections.changes(found)[0][3] == "50, [9, 20, 3], \N{EN DASH}, 7"


def test_a_speed_sweep(tmp_path: Path) -> None:
    space = {"training.channels_last": {"choice": [False, True]}, "training.compile_mode": {"choice": ["default", "x"]}}
    folder = make_sweep(tmp_path, 9, purpose="speed", space=space, note="E runs eager")
    page, summary = page_of(folder), summary_of(folder)
    assert float(page.facts()["best speedup"]) == max(t["score"] for t in summary["trials"])
    assert page.figures["front"]["layout"]["xaxis"]["title"]["text"] == "compiling, s, lower is better"
    assert page.figures["front"]["layout"]["yaxis"]["title"]["text"] == "speed, times eager, higher is better"
    assert "shapes" not in page.figures["curves"]["layout"]  # nothing stops a trial of it
    assert "pictures" not in [a.get("id") for _, a in page.tags]
    assert "importance" in page.figures
    assert page.text.count("E runs eager: ") == 1
    assert page.figures["slice-0"]["layout"]["xaxis"]["type"] == "category"


def test_pictures_that_are_missing_or_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_sweep(tmp_path, 2)
    draw_pictures(folder)
    (folder / "pictures/t00/grid_ref_0001.png").unlink()
    damaged = folder / "pictures/t00/grid_ref_0002.png"
    content = damaged.read_bytes()
    damaged.unlink()  # it shares its content with others
    damaged.write_bytes(content[:200])
    page = page_of(folder)
    shown = {str(a["alt"]) for tag, a in page.tags if tag == "img"}
    assert "t00, epoch 4" in shown
    assert not {"t00, epoch 1", "t00, epoch 2"} & shown
    assert "grid_ref_0002.png cannot be read and is left out" in capsys.readouterr().err


def test_summaries_are_read_back(tmp_path: Path) -> None:
    content = summary_of(make_sweep(tmp_path, 20, broken={4: ("killed", "twice")}))
    again = Summary.from_mapping(content, 20).to_mapping()
    assert again == content


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("summary.json", None, "is not there"),
        ("summary.json", "{", "cannot be read"),
        ("summary.json", "[]", "expected a JSON object"),
        ("summary.json", "{}", "not those of a sweep"),
        ("sweep.json", '{"trials": 3}', "not those of a sweep"),
    ],
)
def test_damaged_records(tmp_path: Path, file: str, content: str | None, told: str) -> None:
    folder = make_sweep(tmp_path, 1)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(RaystarError, match=told):
        page_module.write(folder, Storage(str(folder)))
    assert not (folder / "report.html").exists()


# -- the command, and the end of a sweep ---------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_sweep(tmp_path / "runs", 2)
    draw_pictures(folder)
    assert report.main(["--sweep", "s", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "mine.html")]) == 0
    assert Page((tmp_path / "mine.html").read_text()).table()
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "mine.html"}
    assert not (folder / "report.html").exists()
    assert report.main(["--sweep", "s", "--runs", str(tmp_path / "runs")]) == 0
    assert str(folder / "report.html") in capsys.readouterr().out
    assert (folder / "contact_sheet.png").is_file()
    with pytest.raises(RaystarError, match=r"--sweep z: no such sweep in .*; there are s"):
        report.main(["--sweep", "z", "--runs", str(tmp_path / "runs")])
    with pytest.raises(RaystarError, match="expected a file in a folder that is there"):
        report.main(["--sweep", "s", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)])


def test_pictures_in_another_storage(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "runs", 2)
    draw_pictures(folder)
    (tmp_path / "far").mkdir()
    (tmp_path / "far/s").mkdir()
    (folder / "pictures").rename(tmp_path / "far/s/pictures")
    record = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps(record | {"storage": str(tmp_path / "far")}))
    report.main(["--sweep", "s", "--runs", str(tmp_path / "runs")])
    assert [a for tag, a in Page((folder / "report.html").read_text()).tags if tag == "img" and a["alt"]]


def test_a_report_that_fails_costs_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_sweep(tmp_path, 1)
    plan = SimpleNamespace(folder=folder, storage=Storage(str(folder)), out=tmp_path, name="s")
    assert set(outcome.report(cast("Plan", plan))) == {"report.html"}
    (folder / "report.html").unlink()
    (folder / "sweep.json").write_text("{")
    assert outcome.report(cast("Plan", plan)) == {}
    told = capsys.readouterr().err
    assert told.startswith("note: the report could not be made: RaystarError: ")
    assert told.endswith(f"python -m raystar.report --sweep s --runs {tmp_path} tries again\n")
    assert told.count("\n") == 1


def test_a_sweep_begins_without_the_reports_libraries() -> None:
    code = "import sys, raystar.tune; print([m for m in ('plotly', 'sklearn', 'jinja2') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() in ("[]", "['jinja2']")  # torch may bring jinja2


# -- importance ----------------------------------------------------------------------------------------


def _trials(n: int, effect: float, seed: int = 0) -> tuple[list[dict[str, Any]], list[Mapping[int, float]]]:
    """Trials whose score falls with the epoch and, by `effect`, with `a` near 1; the worse are stopped sooner."""
    rng = np.random.default_rng(seed)
    params: list[dict[str, Any]] = []
    curves: list[Mapping[int, float]] = []
    for _ in range(n):
        values = {"a": float(10 ** rng.uniform(-1, 1)), "b": float(rng.uniform()), "c": bool(rng.integers(2)), "d": 1.0}
        far = effect * np.log10(values["a"]) ** 2
        last = 8 if far + 0.2 * rng.uniform() < 0.15 else int(rng.choice([1, 2, 4]))
        curves.append({e: 1.5 + 2.0 / e + far + 0.02 * rng.normal() for e in range(1, last + 1)})
        params.append(values)
    return params, curves


def test_importance_finds_what_matters() -> None:
    found = importance(*_trials(40, 0.6), {"a"})
    assert found is not None
    assert found.keys[0].key == "a"
    assert found.constant == ("d",)
    assert found.keys[0].low > 0.03
    assert found.skill > 0.4
    for key in found.keys[1:]:
        assert abs(key.rise) < 0.1 * found.keys[0].rise


def test_importance_is_not_taken_in_by_epochs() -> None:
    """Scores differ by epoch alone, by a lot: no key is told to matter."""
    found = importance(*_trials(40, 0.0, seed=1), {"a"})
    assert found is not None
    assert found.skill < 0.15
    assert all(key.rise < 0.01 for key in found.keys)


def test_importance_of_few_trials_is_not_told() -> None:
    params, curves = _trials(FEWEST, 0.6)
    assert importance(params, curves, ()) == importance(params, curves, ()) is not None
    assert importance(params[1:], curves[1:], ()) is None
    assert importance(params, [{}, *curves[1:]], ()) is None
    assert importance([{"a": 1.0}] * FEWEST, curves, ()) is None


# -- pictures --------------------------------------------------------------------------------------------


def test_the_contact_sheet() -> None:
    red, blue = (Image.new("RGB", (100, 100), colour) for colour in ("red", "blue"))
    sheet = contact.contact_sheet([("t00\n1.2345\nbest", {0: red, 4: blue}), ("t01", {4: red})], [0, 4], cell=50)
    assert sheet.size == (96 + 2 * 56, 26 + 2 * 56)
    centres = {
        (row, column): sheet.getpixel((96 + column * 56 + 25, 26 + row * 56 + 25))
        for row in (0, 1)
        for column in (0, 1)
    }
    assert centres[0, 0] == (255, 0, 0)
    assert centres[0, 1] == (0, 0, 255)
    assert centres[1, 1] == (255, 0, 0)
    assert sheet.crop((96, 26 + 56, 146, 26 + 106)).getcolors(9999)[0][1] == (255, 255, 255)  # type: ignore[index]


def test_pictures_fit_their_budget() -> None:
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)) for _ in range(5)]
    for budget in (1_000_000, 200_000, 40_000):
        found = contact.embed(noise, budget)
        assert sum(len(picture.uri) for picture in found) <= budget
        assert all(abs(picture.height / picture.width - 0.75) < 0.02 for picture in found)
    with pytest.raises(ValueError, match="do not fit"):
        contact.embed(noise, 1000)
    assert contact.embed([], 0) == []


def test_the_sheets_columns(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path, 1)
    draw_pictures(folder)
    storage = Storage(str(folder))
    assert contact.epochs_to_show(storage, ["t00"], [1, 2, 4], 6) == [0, 1, 2, 4, 6, EPOCHS]
    assert contact.epochs_to_show(storage, ["t00"], [], 3) == [0, 4, EPOCHS]
    assert contact.epochs_to_show(storage, ["t00"], [], 99) == list(range(EPOCHS + 1))
    assert contact.epochs_to_show(storage, ["t09"], [], 6) == []
