"""From latents to what is measured of their pictures."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from raystar.pictures import decoder as decoders
from raystar.pictures.autoencoders import SCALE
from raystar.pictures.decoder import Decoder
from raystar.ruler.feature_file import FeatureFile
from raystar.ruler.feature_file import load as load_features
from raystar.ruler.picture_stats import sketch, statistics

CHUNK = 32  # latents in one pass of the networks and the decoder
_CPU_CHUNK = 4  # pictures a thread decodes at once: the same bits, and what lies between two layers stays in its cache


class Eye(nn.Module):
    """From latents to what is measured of their pictures; float32, whatever the networks train in."""

    def __init__(self, feature_file: str | None) -> None:
        super().__init__()
        # On a CPU, convolutions of few channels run twice as fast in this layout.
        self.decoder: Decoder = decoders.load().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.added: FeatureFile | None = load_features(feature_file) if feature_file is not None else None

    def pictures(self, unscaled: Tensor) -> Iterator[Tensor]:
        """[b,3,4H,4W] in [0,1] of unscaled latents [B,C,H,W], a chunk at a time."""
        for chunk in unscaled.split(CHUNK):
            with torch.autocast(chunk.device.type, enabled=False):
                small = (chunk.float() * SCALE).contiguous(memory_format=torch.channels_last)
                pieces = small.split(_CPU_CHUNK * torch.get_num_threads() if small.device.type == "cpu" else CHUNK)
                rgb = torch.cat([self.decoder.half_size(piece) for piece in pieces])
                # In one layout, whatever the last piece's: statistics would differ in their last bits.
                yield (rgb.contiguous(memory_format=torch.channels_last).clamp(-1, 1) + 1) / 2

    def see(self, rgb: Tensor) -> tuple[Tensor, Tensor]:
        """Raw statistics [B,d] and sketches [B,G,G] of pictures [B,3,h,w] in [0,1]."""
        raw = statistics(rgb)
        return (raw if self.added is None else torch.cat([raw, self.added(rgb)], dim=1)), sketch(rgb)

    def look(self, unscaled: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What `see` gives of unscaled latents [B,C,H,W], a chunk at a time."""
        return map(self.see, self.pictures(unscaled))
