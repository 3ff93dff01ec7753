"""What several test files need: where the shared data lies, and small configurations."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


def needs_shared(name: str):
    """Skips a test whose data, `../shared/<name>`, is not on this machine."""
    return pytest.mark.skipif(not (SHARED / name).exists(), reason=f"needs ../shared/{name}, which is not here")
