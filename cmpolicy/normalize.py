"""Normalizer: env units to [-1, 1] and back, fitted once, saved inside the policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

#: A dimension whose range in the data is below this (in its own unit) counts as constant.
CONSTANT_RANGE = 1e-4


class Normalizer(nn.Module):
    """Per-dimension affine map ``y = x * scale + offset``, one pair of buffers per key.

    Build it with :meth:`fit` from data. A policy bundle stores :meth:`to_arrays`. Buffers are named
    after their key, so a state dict fits whatever the order of the keys was.
    """

    def __init__(self, affine: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._keys = tuple(affine)
        for key, (scale, offset) in affine.items():
            self.register_buffer(_buffer("scale", key), scale.clone())
            self.register_buffer(_buffer("offset", key), offset.clone())

    @classmethod
    def fit(
        cls,
        data: Mapping[str, npt.NDArray[Any]],
        unchanged: Mapping[str, npt.NDArray[np.bool_]] | None = None,
    ) -> Normalizer:
        """Map each dimension's minimum to -1 and maximum to 1.

        A constant dimension (range below :data:`CONSTANT_RANGE`) is only centred, so that it never
        divides by zero and comes back exactly.

        Args:
            data: (N, ...) finite values per key, in env units.
            unchanged: (...) true where a dimension of a key is left as it is, such as rotations,
                whose entries are of one unit and in [-1, 1] already.

        Raises:
            ValueError: an empty or non-finite array, with the key.
        """
        affine: dict[str, tuple[Tensor, Tensor]] = {}
        for key, values in data.items():
            if len(values) == 0:
                raise ValueError(f"cannot fit the normaliser: {key!r} holds no steps")
            low = values.min(axis=0).astype(np.float64)
            high = values.max(axis=0).astype(np.float64)
            if not (np.isfinite(low).all() and np.isfinite(high).all()):
                raise ValueError(
                    f"cannot fit the normaliser: {key!r} holds NaN or inf; "
                    "`cmpolicy data validate <path>` names the steps"
                )
            span = high - low
            scale = np.where(span < CONSTANT_RANGE, 1.0, 2.0 / np.maximum(span, CONSTANT_RANGE))
            offset = -scale * (low + high) / 2
            if unchanged is not None and key in unchanged:
                scale = np.where(unchanged[key], 1.0, scale)
                offset = np.where(unchanged[key], 0.0, offset)
            affine[key] = (
                torch.as_tensor(scale, dtype=torch.float32),
                torch.as_tensor(offset, dtype=torch.float32),
            )
        return cls(affine)

    @classmethod
    def identity(cls, shapes: Mapping[str, Iterable[int]]) -> Normalizer:
        """``y = x`` for keys of these shapes."""
        sized = {key: tuple(shape) for key, shape in shapes.items()}
        return cls({key: (torch.ones(s), torch.zeros(s)) for key, s in sized.items()})

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys it knows."""
        return self._keys

    def _affine(self, key: str) -> tuple[Tensor, Tensor]:
        if key not in self._keys:
            raise KeyError(f"normaliser has no key {key!r}; it knows {list(self._keys)}")
        return getattr(self, _buffer("scale", key)), getattr(self, _buffer("offset", key))

    def normalize(self, key: str, x: Tensor) -> Tensor:
        """(..., *shape) in env units to [-1, 1]."""
        scale, offset = self._affine(key)
        return x * scale + offset

    def unnormalize(self, key: str, y: Tensor) -> Tensor:
        """The inverse of :meth:`normalize`."""
        scale, offset = self._affine(key)
        return (y - offset) / scale

    def to_arrays(self) -> dict[str, Tensor]:
        """``{"<key>.scale": ..., "<key>.offset": ...}``, what a bundle stores."""
        arrays: dict[str, Tensor] = {}
        for key in self._keys:
            arrays[f"{key}.scale"], arrays[f"{key}.offset"] = self._affine(key)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor]) -> Normalizer:
        """The inverse of :meth:`to_arrays`.

        Raises:
            ValueError: a scale without its offset, or a scale that cannot be inverted.
        """
        affine: dict[str, tuple[Tensor, Tensor]] = {}
        for name, scale in arrays.items():
            key, _, kind = name.rpartition(".")
            if kind != "scale":
                continue
            offset = arrays.get(f"{key}.offset")
            if offset is None or offset.shape != scale.shape:
                raise ValueError(f"normaliser entry {key!r} has no offset of its scale's shape")
            if not (torch.isfinite(scale).all() and (scale != 0).all() and offset.isfinite().all()):
                raise ValueError(f"normaliser entry {key!r} holds zeros or non-finite numbers")
            affine[key] = (scale, offset)
        return cls(affine)


def _buffer(kind: str, key: str) -> str:
    """Name of a buffer: a dot in it would mean a submodule to torch."""
    return f"{kind}/{key.replace('%', '%25').replace('.', '%2E')}"
