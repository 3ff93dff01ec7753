"""What a trial's process opens once for many trials."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from raystar.backend import loop
from raystar.config.load import override
from raystar.data.bank import open_bank
from tests.kit.support import tiny_config, write_latents


def test_trials_that_draw_from_other_numbers_of_latents_share_bank_and_ruler(tmp_path: Path) -> None:
    config = tiny_config(write_latents(tmp_path / "data"))
    bank = open_bank(config, tmp_path / "cache")
    request: Any = SimpleNamespace(cache_dir=str(tmp_path / "cache"), bank_key=bank.key)
    settings = [config, *(override(config, {"data.max_samples": few}) for few in (2, [3, 4, 5], 9))]
    for opened in (loop._bank, loop._ruler):
        first: Any = opened(config, request)
        assert all(opened(other, request) is first for other in settings)
    assert loop._bank(config, request).digest == bank.digest
    assert loop._bank(override(config, {"data.holdout": 0.5}), request).digest != bank.digest
