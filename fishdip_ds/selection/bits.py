"""Boolean vectors of shards at one bit an entry."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def pack_bits(flags: torch.Tensor) -> torch.Tensor:
    """bool [n] -> uint8 [ceil(n / 8)], lowest bit first. Local."""
    padded = torch.nn.functional.pad(flags.to(torch.uint8), (0, -flags.numel() % 8)).view(-1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flags.device)
    return (padded * weights).sum(1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, n: int) -> torch.Tensor:
    """The inverse: uint8 -> bool [n]. Local."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.view(-1, 1) >> shifts) & 1).view(-1)[:n].bool()


class ShardFlags:
    """One boolean per owned element of some tensors, by tensor index; one bit each in memory."""

    def __init__(self, flags: Mapping[int, torch.Tensor] = {}) -> None:
        self.packed = {index: (pack_bits(f), f.numel()) for index, f in flags.items()}

    def __contains__(self, index: int) -> bool:
        return index in self.packed

    def __bool__(self) -> bool:
        return bool(self.packed)

    def __getitem__(self, index: int) -> torch.Tensor:
        """bool [numel], local."""
        return unpack_bits(*self.packed[index])

    def to_dict(self) -> dict[int, torch.Tensor]:
        """All of them unpacked."""
        return {index: self[index] for index in self.packed}
