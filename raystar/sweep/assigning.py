"""What Ray gets of a sweep: the request that all trials share, and which of them run in one go."""

from __future__ import annotations

import math

from raystar.backend.placing import Placed
from raystar.backend.reporting import Request
from raystar.backend.tuner import Assignment
from raystar.config.load import to_mapping
from raystar.record.state import Ledger
from raystar.record.summary import Summary
from raystar.sweep.plan import Plan


def request(plan: Plan, ledger: Ledger, placed: Placed | None, alone: bool) -> Request:
    """What all trials share.

    Args:
        placed: on a cluster, the files that nodes must hold.
        alone: whether they run one at a time, each with its GPUs to itself.
    """
    return Request(
        config=to_mapping(plan.config),
        metric=plan.space.metric,
        mode=plan.space.mode,
        cache_dir=str(plan.cache_dir),
        placed=placed,
        bank_key=plan.bank.key,
        starts=plan.starts,
        storage=plan.storage.uri,
        scratch="",
        known={name: record.epochs for name, record in ledger.summary.trials.items() if record.epochs},
        gpu_share=math.ceil(plan.gpu_share) if alone else plan.gpu_share,
        cpus=plan.cpus,
        workers=plan.space.resources.workers,
        measure_at=tuple(ledger.rungs.places) if ledger.rungs is not None else (),
        purpose=plan.purpose,
    )


def assignment(plan: Plan, summary: Summary, names: list[str], fresh: list[str], alone: bool) -> Assignment:
    """The trials `names`, whose values are known, and `fresh` ones, whose values the search proposes."""
    space, records = plan.space, summary.trials
    scores = [
        ({key: record.params[key] for key in space.space}, record.score)
        for record in records.values()
        if record.trial not in names
        and record.score is not None
        and record.parent is None
        # What an experiment has tried elsewhere says nothing of the space.
        and space.holds({key: record.params[key] for key in space.keys}, plan.config)
    ]
    return Assignment(
        known={name: records[name].params for name in names},
        fresh=fresh,
        scores=scores,
        # On a cluster all trials are handed to Ray, which gives each to the first node that has room, also a new one.
        at_a_time=1 if alone else plan.max_concurrent or 0 if plan.address else plan.at_a_time,
    )
