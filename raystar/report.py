"""A sweep as one page to read and to send: `python -m raystar.report`, and the end of every sweep.

`report.html` holds all it shows, pictures and charts' library included, and asks nothing of a network: its own policy
forbids that to the browser. It is made from the sweep's folder alone, at any time.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raystar.base.console import run_cli
from raystar.base.errors import RaystarError
from raystar.base.scratch import check_takes
from raystar.base.storage import Storage
from raystar.page.page import write
from raystar.record import results
from raystar.record.places import Origins, find
from raystar.record.results import REPORT


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
    if args.out is None:
        check_takes(folder, f"--sweep {args.sweep}", "name a file elsewhere with --out")
    else:
        check_takes(args.out.parent, f"--out {args.out}", "choose another folder")
    path = write(folder, storage_of(folder, args.runs), args.out)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def storage_of(folder: Path, runs: Path) -> Storage:
    """Where a sweep's trials keep their files, as its record says."""
    record: Mapping[str, Any] = results.read(folder).record
    known = record.get("storage")
    return Storage(Origins(record, runs).path(find(known, runs)) if known else str(runs)).child(folder.name)


if __name__ == "__main__":
    run_cli(main)
