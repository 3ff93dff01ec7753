"""`python -m raystar.tune`: a sweep from the command line."""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

from raystar.base.console import run_cli
from raystar.base.secrets import redact
from raystar.config.assignment import SET_HELP
from raystar.config.load import override
from raystar.data.batches import drawn
from raystar.sweep.plan import Plan, make_plan
from raystar.sweep.request import DEFAULT_CONFIG, SweepRequest
from raystar.training.losses import outlasting

_SCHEDULE = ("loss.ds_decay_epochs", "loss.w_ds")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m raystar.tune",
        description="Searches hyper-parameters of a latent StarGAN v2: trains trials side by side, stops the weak ones "
        "early, records all of them in MLflow and exports the best.",
        epilog="The score looks at decoded translations of held-out pictures: style, layout and diversity. 0.1 is "
        "perfect, doing nothing scores 1.1, lower is better (docs/score.md). The best are trained again from other "
        "seeds and ranked by their means. Exit status: 0 at least one trial finished, 1 none did, 2 the request was "
        "wrong, 130 interrupted.",
    )
    p.add_argument("--space", metavar="FILE", help="what to search, for example search_spaces/loss.yaml")
    p.add_argument("--config", metavar="FILE", default=DEFAULT_CONFIG, help=f"the configuration ({DEFAULT_CONFIG})")
    p.add_argument(
        "--overlay", metavar="FILE", action="append", default=[],
        help="configuration keys that replace those of --config, for example a speed sweep's fastest.yaml; repeatable",
    )  # fmt: skip
    p.add_argument("--name", metavar="NAME", help="the sweep's name (the space file's with the time)")
    p.add_argument(
        "--trials", metavar="N", type=int, help="trials to draw, the baseline among them; experiments come on top"
    )
    p.add_argument("--epochs", metavar="N", type=int, help="epochs of a trial that is not stopped early")
    p.add_argument("--max-concurrent", metavar="N", type=int, help="trials at a time (as many as fit)")
    p.add_argument("--time-budget", metavar="TIME", help="stop after 90s, 30m, 4h or 2d")
    p.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help=f"{SET_HELP}; repeatable")
    p.add_argument("--out", metavar="DIR", type=Path, default=Path("runs"), help="where everything goes (runs)")
    p.add_argument(
        "--tracking-uri", metavar="URI", help="MLflow store ($MLFLOW_TRACKING_URI, else a SQLite file in --out)"
    )
    p.add_argument(
        "--resume", metavar="NAME",
        help="resume a sweep that ended, however it ended; --set, --storage and --tracking-uri say where it lies now",
    )  # fmt: skip
    p.add_argument(
        "--force", action="store_true", help="with --resume: continue though code, configuration, space or data changed"
    )
    p.add_argument("--address", metavar="A", help="run on the Ray cluster there (auto, or HOST:PORT)")
    p.add_argument("--storage", metavar="URI", help="where trials save: a path or fsspec URI that every node reaches")
    p.add_argument("--dry-run", action="store_true", help="check everything, list the trials and stop")
    return p


def main(argv: list[str] | None = None) -> int:
    """`python -m raystar.tune`."""
    args = parser().parse_args(argv)
    plan = make_plan(request_of(args))
    if not plan.resumed:
        note_schedules(plan)
    from raystar.sweep.run import rehearse, run  # which takes seconds; a wrong request is answered before that

    if args.dry_run:
        rehearse(plan)
        print_plan(plan)
        return 0
    return run(plan)


def request_of(args: argparse.Namespace) -> SweepRequest:
    """What a command line asks for."""
    return SweepRequest(**{key: value for key, value in vars(args).items() if key != "dry_run"})


def note_schedules(plan: Plan) -> None:
    """Says on stderr if `lambda_ds` does not come to 0 within a trial: what the first such trial has, and how many."""
    swept = {key: plan.space.space[key].values for key in _SCHEDULE if key in plan.space.space}
    drawn = [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]
    # A search that draws as it goes may draw any of these.
    points = [*plan.known.values(), *drawn] if plan.points is None else plan.points
    notes = [note for point in points if (note := outlasting(override(plan.config, point)))]
    if notes and plan.purpose.models:
        many = f" ({len(notes)} of {len(points)} trials)" if plan.points is not None else ""
        print(f"note: {notes[0]}{many}", file=sys.stderr)


def print_plan(plan: Plan) -> None:
    """What a sweep would do: its data and its trials."""
    space, bank = plan.space, plan.bank
    trials = f"{plan.trials} trial{'s' if plan.trials > 1 else ''}"
    epochs = plan.config.training.epochs
    print(f"sweep {plan.name}: {trials} of up to {epochs} epochs; {space.metric} ({space.mode})")
    for domain, rows, held in zip(bank.domains, drawn(bank, plan.config), bank.held, strict=True):
        print(f"  {domain}: {len(rows)} latents to train on, {len(held)} held out")
    workers = space.resources.workers
    takes = f"{plan.cpus} cpu and {plan.gpu_share:g} gpu" + (f" for each of {workers} workers" if workers > 1 else "")
    print(f"  a trial takes {takes}; records go to {redact(plan.tracking_uri)}")
    if plan.seeds:
        whom = f"the best {space.finalists.top}{' and the baseline' if plan.baseline else ''}"
        seeds = f"seed{'s' if len(plan.seeds) > 1 else ''} {', '.join(map(str, plan.seeds))}"
        print(f"  then {whom} again at full length, from {seeds}: up to {plan.repeats} trials more")
    baseline = plan.known.get(plan.baseline or "")
    for name, point in plan.known.items():
        # Of many switches, few differ from the baseline: those are what a reader looks for.
        settings = (
            point
            if name == plan.baseline or baseline is None or not plan.purpose.table
            else {key: value for key, value in point.items() if value != baseline[key]}
        )
        values = "  ".join(f"{key}={value}" for key, value in settings.items())
        print(f"  {name}{' (baseline)' if name == plan.baseline else ''}: {values}")
    if plan.points is None:
        more = "the other" if space.experiments else "the"
        print(f"  {space.search} chooses {more} trials as it goes, from {', '.join(space.space)}")


if __name__ == "__main__":
    run_cli(main)
