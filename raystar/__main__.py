"""`raystar VERB ...`, or `python -m raystar VERB ...`: every command by its verb."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from raystar import __version__
from raystar.base.console import run_cli
from raystar.base.errors import RaystarError, misspelt

VERBS = {
    "tune": "search hyper-parameters: a sweep of trials, compared and exported",
    "train": "one run of the training that a trial runs",
    "config": "a configuration as raystar reads it, and where each value comes from",
    "score": "a checkpoint's score, losses and pictures, without training",
    "encode": "folders of pictures to folders of latents",
    "translate": "pictures through an exported model",
    "export": "a sweep's best model, a trial's or a checkpoint's as plain files",
    "report": "a sweep as one page, also while it runs",
    "distill": "a small decoder that shows what an autoencoder's would",
}
"""Every command, in the order in which a user meets them, and what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names, and returns its exit status.

    Raises:
        RaystarError: there is no such command.
    """
    verb, *rest = [*(sys.argv[1:] if argv is None else argv), ""]
    if verb in ("", "-h", "--help"):
        print(_usage())
        return 0 if verb else 2
    if verb == "--version":
        print(f"raystar {__version__}")
        return 0
    if verb not in VERBS:
        raise RaystarError(f"unknown command {misspelt(verb, VERBS)}; known: {', '.join(VERBS)}")
    # Only this command's modules: Ray, torch and MLflow take seconds.
    module = "raystar.config.__main__" if verb == "config" else f"raystar.{verb}"  # that name is a room's
    command: Callable[[list[str]], int] = importlib.import_module(module).main
    return command(rest[:-1])


def _usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:{width}}  {meaning}" for verb, meaning in VERBS.items()]
    return "\n".join(
        ["usage: raystar COMMAND ...", "", *lines, "", "raystar COMMAND --help says what a command takes."]
    )


def cli() -> None:
    """The console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
