"""Normalizer: env units to [-1, 1] and back, fitted once, saved inside the policy."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

#: A dimension counts as constant if its range is below this share of its largest magnitude: float32
#: holds seven digits, so what varies less is rounding.
CONSTANT_SHARE = 1e-6
#: Scales and offsets beyond this are of no data: their products would be infinite in float32.
_LARGEST = 1e36
#: No range below this can be scaled to 2 in float32.
_SMALLEST_RANGE = 1e-37


class Normalizer(nn.Module):
    """Per-dimension affine map ``y = x * scale + offset``, one pair of buffers per key.

    A scale of 0 says that the dimension is constant: it is 0 for the network, and comes back as the
    value that is stored in its offset, whatever the network says.

    A key may have limits: values beyond them are cut to them, before they are scaled and after they
    came back, so that no action leaves what was seen and no glitch reaches the network.

    A key may have an origin, in float64, which is taken off before anything else and added at the
    end: single precision does not resolve centimetres in metres of a map grid. Scale, offset and
    limits of such a key are relative to it.

    Build it with :meth:`fit` from data. A policy bundle stores :meth:`to_arrays`. Buffers are named
    after their key, so a state dict fits whatever the order of the keys was.
    """

    def __init__(
        self,
        affine: Mapping[str, tuple[Tensor, Tensor]],
        limits: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        origins: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._keys = tuple(affine)
        for key, (scale, offset) in affine.items():
            self.register_buffer(_buffer("scale", key), scale.clone())
            self.register_buffer(_buffer("offset", key), offset.clone())
        for key, (low, high) in (limits or {}).items():
            self.register_buffer(_buffer("low", key), low.clone())
            self.register_buffer(_buffer("high", key), high.clone())
        for key, origin in (origins or {}).items():
            self.register_buffer(_buffer("origin", key), origin.to(torch.float64))
        self._find_constants()
        self.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            lambda module, keys: module._find_constants()
        )

    def _find_constants(self) -> None:
        """Which keys have constant dimensions: known once, so that no call asks the device."""
        self._with_constants = {
            key for key in self._keys if bool((self._affine(key)[0] == 0).any())
        }

    @classmethod
    def fit(
        cls,
        data: Mapping[str, npt.NDArray[Any]],
        unchanged: Mapping[str, npt.NDArray[np.bool_]] | None = None,
        *,
        spans: Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]] | None = None,
        limits: Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]] | None = None,
        origins: Mapping[str, npt.NDArray[np.float64]] | None = None,
    ) -> Normalizer:
        """Map each dimension's minimum to -1 and maximum to 1.

        A dimension is constant where its range is below :data:`CONSTANT_SHARE` of its largest
        magnitude, in whatever unit; a warning names those that are not exactly constant.

        Args:
            data: (N, ...) finite values per key, in env units.
            unchanged: (...) true where a dimension of a key is left as it is, such as rotations,
                whose entries are of one unit and in [-1, 1] already.
            spans: two arrays (...) by key, in place of minimum and maximum.
            limits: two arrays (...) by key, beyond which values are cut; none by default.
            origins: (...) float64 by key; ``spans`` and ``limits`` are in env units all the same.

        Raises:
            ValueError: an empty or non-finite array, with the key.
        """
        affine: dict[str, tuple[Tensor, Tensor]] = {}
        for key, values in data.items():
            if len(values) == 0:
                raise ValueError(f"cannot fit the normaliser: {key!r} holds no steps")
            low, high = (spans or {}).get(key) or (values.min(axis=0), values.max(axis=0))
            origin = (origins or {}).get(key, 0.0)
            low, high = low.astype(np.float64) - origin, high.astype(np.float64) - origin
            if not (np.isfinite(low).all() and np.isfinite(high).all()):
                raise ValueError(
                    f"cannot fit the normaliser: {key!r} holds NaN or inf; "
                    "`cmpolicy data validate <path>` names the steps"
                )
            span, middle = high - low, (low + high) / 2
            magnitude = np.maximum(np.abs(low), np.abs(high))
            constant = span <= np.maximum(CONSTANT_SHARE * magnitude, _SMALLEST_RANGE)
            if unchanged is not None and key in unchanged:
                constant &= ~unchanged[key]
            _warn_of_rounding(key, constant & (span > 0), span, middle)
            scale = np.where(constant, 0.0, 2.0 / np.where(constant, 1.0, span))
            offset = np.where(constant, middle, -scale * middle)
            if unchanged is not None and key in unchanged:
                scale = np.where(unchanged[key], 1.0, scale)
                offset = np.where(unchanged[key], 0.0, offset)
            affine[key] = (
                torch.as_tensor(scale, dtype=torch.float32),
                torch.as_tensor(offset, dtype=torch.float32),
            )
        at = {key: torch.as_tensor(origin) for key, origin in (origins or {}).items()}
        cut = {
            key: (
                (torch.as_tensor(low).double() - at.get(key, 0.0)).float(),
                (torch.as_tensor(high).double() - at.get(key, 0.0)).float(),
            )
            for key, (low, high) in (limits or {}).items()
        }
        return cls(affine, cut, at)

    @classmethod
    def identity(cls, shapes: Mapping[str, Iterable[int]]) -> Normalizer:
        """``y = x`` for keys of these shapes."""
        sized = {key: tuple(shape) for key, shape in shapes.items()}
        return cls({key: (torch.ones(s), torch.zeros(s)) for key, s in sized.items()})

    @property
    def keys(self) -> tuple[str, ...]:
        return self._keys

    def _affine(self, key: str) -> tuple[Tensor, Tensor]:
        if key not in self._keys:
            raise KeyError(f"normaliser has no key {key!r}; it knows {list(self._keys)}")
        return getattr(self, _buffer("scale", key)), getattr(self, _buffer("offset", key))

    def normalize(self, key: str, x: Tensor) -> Tensor:
        """(..., *shape) in env units to [-1, 1]; constant dimensions to 0."""
        scale, offset = self._affine(key)
        origin = self._origin(key)
        if origin is not None:
            x = (x.double() - origin).to(scale.dtype)
        y = self._cut(key, x) * scale + offset
        return y.masked_fill(scale == 0, 0.0) if key in self._with_constants else y

    def unnormalize(self, key: str, y: Tensor) -> Tensor:
        """The inverse of :meth:`normalize`; constant dimensions to their value, exactly."""
        scale, offset = self._affine(key)
        if key in self._with_constants:
            constant = scale == 0
            x = torch.where(constant, offset, (y - offset) / scale.masked_fill(constant, 1.0))
        else:
            x = (y - offset) / scale
        origin = self._origin(key)
        return self._cut(key, x) if origin is None else self._cut(key, x).double() + origin

    def limits(self, key: str) -> tuple[Tensor, Tensor] | None:
        """(low, high) (...) to which values of the key are cut; None if they are not."""
        low = getattr(self, _buffer("low", key), None)
        return None if low is None else (low, getattr(self, _buffer("high", key)))

    def _cut(self, key: str, x: Tensor) -> Tensor:
        limits = self.limits(key)
        return x if limits is None else x.clamp(*limits)

    def _origin(self, key: str) -> Tensor | None:
        return getattr(self, _buffer("origin", key), None)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Normalizer:
        """Move with the module, but keep the precision of the origins."""
        before = {name: b for name, b in self._buffers.items() if name.startswith("origin/")}
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        for name, origin in before.items():
            moved = self._buffers[name]
            if origin is not None and moved is not None and moved.dtype is not torch.float64:
                self._buffers[name] = origin.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Take over which keys have limits, too: training states from before them have none."""
        for key in self._keys:
            for name in (_buffer(kind, key) for kind in ("low", "high", "origin")):
                there = state_dict.get(prefix + name)
                if there is None:
                    self._buffers.pop(name, None)
                elif name not in self._buffers:
                    self.register_buffer(name, torch.empty_like(there))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def to_arrays(self) -> dict[str, Tensor]:
        """Scale and offset by ``<key>.scale`` and so on; low and high where there are limits."""
        arrays: dict[str, Tensor] = {}
        for key in self._keys:
            arrays[f"{key}.scale"], arrays[f"{key}.offset"] = self._affine(key)
            limits = self.limits(key)
            if limits is not None:
                arrays[f"{key}.low"], arrays[f"{key}.high"] = limits
            origin = self._origin(key)
            if origin is not None:
                arrays[f"{key}.origin"] = origin
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor]) -> Normalizer:
        """The inverse of :meth:`to_arrays`.

        Raises:
            ValueError: a scale without its offset, or a number that is not finite.
        """
        affine: dict[str, tuple[Tensor, Tensor]] = {}
        limits: dict[str, tuple[Tensor, Tensor]] = {}
        origins: dict[str, Tensor] = {}
        for name, scale in arrays.items():
            key, _, kind = name.rpartition(".")
            if kind != "scale":
                continue
            offset = arrays.get(f"{key}.offset")
            if offset is None or offset.shape != scale.shape:
                raise ValueError(f"normaliser entry {key!r} has no offset of its scale's shape")
            if not (scale.isfinite().all() and offset.isfinite().all()):
                raise ValueError(f"normaliser entry {key!r} holds non-finite numbers")
            if max(float(scale.abs().max()), float(offset.abs().max())) > _LARGEST:
                raise ValueError(f"normaliser entry {key!r} holds numbers above {_LARGEST:g}")
            affine[key] = (scale, offset)
            low, high = arrays.get(f"{key}.low"), arrays.get(f"{key}.high")
            if low is not None and high is not None:
                if not (low.shape == high.shape == scale.shape and bool((low <= high).all())):
                    raise ValueError(f"normaliser entry {key!r} has limits that cannot be")
                limits[key] = (low, high)
            origin = arrays.get(f"{key}.origin")
            if origin is not None:
                if origin.shape != scale.shape or not origin.isfinite().all():
                    raise ValueError(f"normaliser entry {key!r} has an origin that cannot be")
                origins[key] = origin
        return cls(affine, limits, origins)


def _warn_of_rounding(
    key: str, which: npt.NDArray[np.bool_], span: npt.NDArray[Any], middle: npt.NDArray[Any]
) -> None:
    """Name the dimensions that vary by no more than rounding."""
    for index in map(tuple, np.argwhere(which)):
        place = f"{key}[{', '.join(map(str, index))}]" if index else key
        warnings.warn(
            f"{place} is taken for constant: it varies by {span[index]:.3g} around "
            f"{middle[index]:.6g}, which is within the rounding of float32. If that matters, store "
            "it relative to a fixed value",
            stacklevel=3,
        )


def _buffer(kind: str, key: str) -> str:
    """Name of a buffer: a dot in it would mean a submodule to torch."""
    return f"{kind}/{key.replace('%', '%25').replace('.', '%2E')}"
