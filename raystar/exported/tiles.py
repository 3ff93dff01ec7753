"""Large pictures in overlapping tiles, blended."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def blended(
    piece: Callable[[slice, slice], Tensor], cells: tuple[int, int], tile: int, overlap: int, unit: int = 1
) -> Tensor:
    """Has `piece` make something large tile by tile, and fades the tiles into each other where they overlap.

    Args:
        piece: given rows and columns of cells, makes [1,C,rows * unit,columns * unit].
        cells: (rows, columns) of the whole.
        tile: cells along a tile's side; what is not larger is made in one piece.
        overlap: the least that neighbours share.
        unit: what `piece` makes of a cell, along one side.
    """
    rows, columns = _spans(cells[0], tile, overlap), _spans(cells[1], tile, overlap)
    if len(rows) == len(columns) == 1:
        return piece(rows[0], columns[0])
    total, weights = None, torch.zeros(cells[0] * unit, cells[1] * unit)
    down = [_fade(span, cells[0], rows, unit) for span in rows]
    across = [_fade(span, cells[1], columns, unit) for span in columns]
    for y, fade_y in zip(rows, down, strict=True):
        for x, fade_x in zip(columns, across, strict=True):
            patch = piece(y, x)
            if total is None:
                total = torch.zeros(1, patch.shape[1], *weights.shape)
            weight = fade_y[:, None] * fade_x
            here = (slice(y.start * unit, y.stop * unit), slice(x.start * unit, x.stop * unit))
            total[:, :, *here] += patch * weight
            weights[here] += weight
    assert total is not None
    return total.div_(weights)


def _spans(length: int, tile: int, overlap: int) -> list[slice]:
    """Spans of `tile` cells that cover `length`, spread evenly, with at least `overlap` in common."""
    if length <= tile:
        return [slice(0, length)]
    count = -(-(length - overlap) // (tile - overlap))
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    return [slice(start, start + tile) for start in starts]


def _fade(span: slice, length: int, spans: list[slice], unit: int) -> Tensor:
    """The weight of a span's places: falling towards its neighbours, over what is shared with them."""
    n = (span.stop - span.start) * unit
    at = torch.arange(n) + 0.5
    weight = torch.ones(n)
    number = spans.index(span)
    if number > 0:
        weight = torch.minimum(weight, at / ((spans[number - 1].stop - span.start) * unit))
    if number + 1 < len(spans):
        weight = torch.minimum(weight, (n - at) / ((span.stop - spans[number + 1].start) * unit))
    return weight
