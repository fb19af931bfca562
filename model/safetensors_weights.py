"""Weights from safetensors files, one or many shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.errors import WeightError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Old exports store the rotary frequencies, which the config determines; tied models may store the head twice.
_IGNORABLE = ("rotary_emb.inv_freq", "lm_head.weight")


class SafetensorsWeights:
    """Tensors by name out of one or more safetensors files, memory-mapped; raises WeightError for a damaged file."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files: dict[str, Any] = {}
        self._homes: dict[str, str] = {}
        self._asked: set[str] = set()
        for path in paths:
            try:
                file: Any = safe_open(str(path), framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise WeightError(f"{path.name}: cannot be read as safetensors ({error})") from error
            self._files[path.name] = file
            names: list[str] = file.keys()
            for name in names:
                if name in self._homes:
                    raise WeightError(f"tensor {name!r} stands in {self._homes[name]} and again in {path.name}")
                self._homes[name] = path.name

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Give one tensor in its stored float dtype; raises WeightError."""
        home = self._homes.get(name)
        if home is None:
            raise WeightError(f"tensor {name!r} is missing from {', '.join(self._files)}; expected shape {shape}")
        self._asked.add(name)
        try:
            tensor: Tensor = self._files[home].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise WeightError(f"{home}: tensor {name!r} cannot be read ({error})") from error
        if tuple(tensor.shape) != shape:
            raise WeightError(f"{home}: tensor {name!r} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype not in _FLOATS:
            raise WeightError(f"{home}: tensor {name!r} has dtype {tensor.dtype}, expected a float of 16 to 64 bits")
        return tensor

    def quantized(self, name: str, shape: tuple[int, int]) -> None:
        """Give nothing: this format holds floats only."""
        return None

    def is_float(self, name: str) -> bool:
        """Say yes."""
        return True

    def unused(self) -> list[str]:
        """Name the tensors that nobody asked for, without the ones known to be ignorable."""
        return [name for name in self._homes if name not in self._asked and not name.endswith(_IGNORABLE)]
