"""How long raystar waits can be set, and nonsense is refused before anything starts."""

from __future__ import annotations

import pytest

from raystar.base.errors import RaystarError
from raystar.base.limits import LIMITS, NODE, check_limits, limit
from raystar.sweep.plan import make_plan
from raystar.sweep.request import SweepRequest
from tests.kit.support import ROOT


def test_each_has_a_default_and_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in LIMITS.items():
        monkeypatch.delenv(name, raising=False)
        assert limit(name) == seconds > 0
        monkeypatch.setenv(name, "0.25")
        assert limit(name) == 0.25
    check_limits()


@pytest.mark.parametrize("text", ["0", "-1", "a minute", "nan", "inf"])
def test_nonsense(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(NODE, text)
    with pytest.raises(RaystarError, match=f"RAYSTAR_NODE_TIMEOUT_S: expected seconds, .* found '{text}'"):
        make_plan(SweepRequest(space=ROOT / "search_spaces/loss.yaml"))


def test_each_is_in_the_documents() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text()
    assert not [name for name in LIMITS if name not in text]
