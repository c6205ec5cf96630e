"""Layers whose pieces lie on several processes: which, and the sums of squares over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Groups = tuple[ProcessGroup | None, ...]
Cut = tuple[int, int, int]  # layer, start, stop

ROWS = 3  # at most that many squares are taken of one layer: of w, g and g + βw


class Span(NamedTuple):
    """The layers that a parameter holds pieces of: ``cuts`` are (layer, start, stop), None where it is one piece.

    The squares of a layer are summed over each of ``groups``, which is empty where the layer is whole.
    """

    groups: Groups = ()
    layers: int = 1
    cuts: tuple[Cut, ...] | None = None


WHOLE = Span()


def span_of(p: Tensor) -> Span:
    """A DTensor is one layer, summed over the mesh dimensions that do not replicate it; any other tensor is whole."""
    mesh: Any = getattr(p, "device_mesh", None)
    if mesh is None:
        return WHOLE
    placements: Sequence[Any] = p.placements  # type: ignore[attr-defined]
    return Span(tuple(mesh.get_group(dim) for dim, where in enumerate(placements) if not where.is_replicate()))


def local(t: Tensor) -> Tensor:
    """This process's part of a DTensor; any other tensor as it is."""
    part: Tensor = t.to_local() if hasattr(t, "to_local") else t
    return part


def checked(partition: Tensor, segments: Sequence[Cut], layers: int) -> tuple[Cut, ...]:
    """The segments, or ValueError for one that is outside the partition or the layers, or that overlaps another."""
    if partition.ndim != 1 or not partition.is_contiguous():
        raise ValueError(f"partition of shape {tuple(partition.shape)}: give a contiguous one-dimensional tensor")
    end = 0
    for layer, start, stop in sorted(segments, key=lambda segment: segment[1:]):
        if not (0 <= layer < layers and end <= start <= stop <= len(partition)):
            raise ValueError(
                f"segment {(layer, start, stop)}: give (layer, start, stop) with layer < {layers}, within the "
                f"{len(partition)} elements of the partition and apart from the other segments"
            )
        end = stop
    return tuple(segments)


@dataclass
class Extent:
    """The layers that are summed over one tuple of groups; alike on all their processes."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    layers: int = 0


class Extents(dict[Groups, Extent]):
    """For each tuple of groups, in the order of the parameters, what its processes sum together."""

    def add(self, p: Tensor, span: Span, *, adapt: bool) -> int:
        """Count the layers of a parameter whose ratios are wanted; the number of the first of them."""
        if span.groups not in self:
            self[span.groups] = Extent(p.device)
        extent = self[span.groups]
        if p.dtype == torch.float64:
            extent.dtype = torch.float64
        first = extent.layers
        extent.layers += span.layers if adapt else 0
        return first


def sum_over_layers(pieces: Sequence[tuple[Tensor, list[int]]], groups: Groups, extent: Extent) -> list[Tensor]:
    """For each of several (squares of shape (k, N), the layers of the N pieces): the squares of those whole layers.

    k is at most ROWS. One all-reduce over each of the groups, of ROWS numbers for each layer in ``extent``, whatever
    this process holds.
    """
    if not groups or not extent.layers:
        return [squares for squares, _ in pieces]
    whole = torch.zeros(ROWS, extent.layers, dtype=extent.dtype, device=extent.device)
    places = [_places(tuple(layers), extent.device) for _, layers in pieces]
    for (squares, _), place in zip(pieces, places, strict=True):
        whole[: len(squares)].index_add_(1, place, squares.to(extent.dtype))
    _all_reduce(whole, groups)
    return [whole[: len(squares), place] for (squares, _), place in zip(pieces, places, strict=True)]


@lru_cache(maxsize=128)
def _places(layers: tuple[int, ...], device: torch.device) -> Tensor:
    """The same in every step, so that nothing has to reach a GPU."""
    return torch.tensor(layers, dtype=torch.int64, device=device)


def sum_over_groups(parts: Sequence[tuple[Groups, Tensor]], extents: Extents) -> Tensor:
    """The sum of 0-dim parts, each over the processes of its groups; one all-reduce for each group in ``extents``."""
    whole = []
    for groups, extent in extents.items():
        zero = torch.zeros((), dtype=extent.dtype, device=extent.device)
        whole.append(_all_reduce(sum((part.to(zero) for where, part in parts if where == groups), zero), groups))
    return torch.stack([part.to(whole[0].device, torch.float64) for part in whole]).sum()


def _all_reduce(tensor: Tensor, groups: Groups) -> Tensor:
    for group in groups:
        dist.all_reduce(tensor, group=group)
    return tensor
