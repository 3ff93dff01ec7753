"""What a trial can be: waiting, running, ended in one of several ways."""

from __future__ import annotations

PENDING, STARTING, RUNNING = "pending", "starting", "running"
FINISHED, STOPPED, INTERRUPTED = "finished", "stopped", "interrupted"
DIVERGED, COLLAPSED, OUT_OF_MEMORY, FAILED, KILLED = "diverged", "collapsed", "out_of_memory", "failed", "killed"
"""Statuses of trials. `STARTING` is never recorded: a group of workers says so that it is there."""

COMPARABLE = (FINISHED, STOPPED, RUNNING, INTERRUPTED)
"""Statuses whose trials may be best."""
BROKEN = (DIVERGED, COLLAPSED, OUT_OF_MEMORY, FAILED, KILLED)
"""Statuses of trials that went wrong, each with its reason; they are never best."""
UNFINISHED = (PENDING, RUNNING, INTERRUPTED, FAILED, KILLED)
"""Statuses of trials that a resumed sweep runs, from their last checkpoints: what failed may be mended by then."""
