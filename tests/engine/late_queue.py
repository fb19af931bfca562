"""A CPU queue that behaves as a device does: what is enqueued counts as done only some looks later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.device_queue import HostQueue, Mark


@dataclass
class LateMark:
    """Passed at the n-th look."""

    num_looks: int

    def is_passed(self) -> bool:
        self.num_looks -= 1
        return self.num_looks < 0

    def wait(self) -> None:
        self.num_looks = 0


class LateQueue(HostQueue):
    """Computes at once, tells late; a fetched tensor holds rubbish until its mark was seen passed."""

    def __init__(self, num_looks: int = 3) -> None:
        super().__init__(torch.device("cpu"))
        self.num_looks = num_looks

    def mark(self) -> Mark:
        return LateMark(self.num_looks)

    def fetch(self, source: Tensor, target: Tensor | None = None) -> tuple[Tensor, Mark]:
        held = source.clone()
        shown = torch.full_like(source, 7) if target is None else target.fill_(7)
        return shown, _Revealing(self.num_looks, shown, held)


@dataclass
class _Revealing:
    num_looks: int
    shown: Tensor
    held: Any

    def is_passed(self) -> bool:
        self.num_looks -= 1
        if self.num_looks < 0 and self.held is not None:
            self.shown.copy_(self.held)
            self.held = None
        return self.num_looks < 0

    def wait(self) -> None:
        self.num_looks = 0
        self.is_passed()
