"""ConsistencyImagePipeline: images of a class in one network evaluation, as a diffusers pipeline.

An image model is a folder: ``model_index.json`` (path, sampler, class names, how it was made),
``net/`` (``config.json`` and the weights as safetensors) and ``README.md`` (the model card).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import logging
from safetensors import SafetensorError
from torch import Tensor

from cmpolicy.files import replace_directory, space_note
from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.path import PATHS, get_path
from cmpolicy.flow.sampler import SAMPLERS, SamplerKind, check_sampler
from cmpolicy.hub import HubError, download
from cmpolicy.image.model import Generators, generate_images, generate_trajectory
from cmpolicy.image.net import ImageNet

INDEX, CARD, NET = "model_index.json", "README.md", "net"
_POLICY_CONFIG = "config.json"  # what a policy bundle has in place of INDEX

OutputType = Literal["pil", "np", "pt"]


class ImageModelError(ValueError):
    """An image model that cannot be opened or written, or is asked for something it has not."""


class ConsistencyImagePipeline(DiffusionPipeline):  # type: ignore[misc]
    """Class-conditional images from noise, usually in one evaluation.

    ``pipe(class_labels=[3, 7], num_inference_steps=1, generator=g).images``

    Args:
        net: the network; its weights are those that are saved.
        path: ``linear`` or ``trigonometric``.
        sampler: the one that its objective asks for, see :mod:`cmpolicy.flow.sampler`.
        class_names: label k is ``class_names[k]``; numbers if not given.
        metadata: JSON-ready facts that travel along (training command, versions, result).

    Raises:
        ImageModelError: an unknown path or sampler, or a wrong number of class names.
    """

    def __init__(
        self,
        net: ImageNet,
        path: str = "linear",
        sampler: str = "flow_map",
        class_names: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for what, value, known in (("path", path, PATHS), ("sampler", sampler, SAMPLERS)):
            if value not in known:
                raise ImageModelError(f"unknown {what} {value!r}; choose one of {sorted(known)}")
        names = [str(k) for k in range(net.n_classes)] if class_names is None else class_names
        if len(names) != net.n_classes:
            raise ImageModelError(
                f"the network has {net.n_classes} classes, but {len(names)} names were given"
            )
        self.register_modules(net=net)
        self.register_to_config(
            path=path, sampler=sampler, class_names=list(names), metadata=dict(metadata or {})
        )

    # -- what it is -----------------------------------------------------------------------------

    @property
    def class_names(self) -> tuple[str, ...]:
        """Label k is ``class_names[k]``."""
        return tuple(self.config.class_names)

    @property
    def n_classes(self) -> int:
        return cast(ImageNet, self.net).n_classes

    @property
    def image_size(self) -> int:
        """Side of the square images in pixels."""
        return cast(ImageNet, self.net).image_shape[1]

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return cast(ImageNet, self.net).image_shape[0]

    @property
    def sampler(self) -> SamplerKind:
        """How it is sampled unless told otherwise."""
        return cast(SamplerKind, self.config.sampler)

    @property
    def nfe(self) -> int:
        """Network evaluations of an image unless told otherwise."""
        return int(self.metadata.get("nfe", 1))

    @property
    def metadata(self) -> dict[str, Any]:
        """What it was saved with."""
        return dict(self.config.metadata)

    # -- images ---------------------------------------------------------------------------------

    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor,
        num_inference_steps: int | None = None,
        generator: Generators = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        sampler: SamplerKind | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """One image per label.

        Args:
            class_labels: numbers or names of classes.
            num_inference_steps: network evaluations per image; None: the model's own number.
            generator: of the noise; a list has one per image, and an image then does not depend on
                the others.
            output_type: ``pil`` images, ``np`` (N, H, W, C) or ``pt`` (N, C, H, W) in [0, 1].
            return_dict: as in diffusers; False gives ``(images,)``.
            sampler: another one than the model's own.

        Raises:
            ImageModelError: an unknown class or output type.
            ValueError: fewer than one step, or an unknown sampler.
        """
        if output_type not in get_args(OutputType):
            raise ImageModelError(
                f"output_type={output_type!r} is not one of {', '.join(get_args(OutputType))}"
            )
        if isinstance(class_labels, int | str):
            class_labels = [class_labels]
        if isinstance(class_labels, Tensor):
            class_labels = class_labels.flatten().tolist()
        labels = torch.tensor([self._label(label) for label in class_labels], dtype=torch.long)
        generated = self.generate(
            labels, nfe=num_inference_steps, generator=generator, sampler=sampler
        )
        images: Any = generated.mul(0.5).add(0.5)
        if output_type != "pt":
            images = VaeImageProcessor.pt_to_numpy(images)
        if output_type == "pil":
            images = VaeImageProcessor.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def generate(
        self,
        labels: Tensor,
        nfe: int | None = None,
        generator: Generators = None,
        sampler: SamplerKind | None = None,
    ) -> Tensor:
        """Images of these classes as the network gives them: float32 (N, C, H, W) in [-1, 1].

        Args:
            labels: (N,) int64.
            nfe, generator, sampler: see :meth:`__call__`.

        Raises:
            ImageModelError: no labels, or one that is no class.
            ValueError: fewer than one step, an unknown sampler or one for networks that predict
                something else, or another number of generators than of labels.
        """
        self._check_labels(labels)
        return generate_images(
            self._flow_map(),
            labels,
            nfe=self.nfe if nfe is None else nfe,
            generator=generator,
            sampler=self._fitting(sampler),
        )

    def trajectory(
        self,
        labels: Tensor,
        nfe: int | None = None,
        generator: Generators = None,
        sampler: SamplerKind | None = None,
    ) -> Tensor:
        """As :meth:`generate`, but all states from noise to image, (nfe + 1, N, C, H, W).

        The last is the image; none is clamped to [-1, 1].
        """
        self._check_labels(labels)
        return generate_trajectory(
            self._flow_map(),
            labels,
            nfe=self.nfe if nfe is None else nfe,
            generator=generator,
            sampler=self._fitting(sampler),
        )

    def _fitting(self, sampler: SamplerKind | None) -> SamplerKind:
        if sampler is None:
            return self.sampler
        check_sampler(sampler, self.sampler)
        return sampler

    def _flow_map(self) -> FlowMap:
        return FlowMap(self.net, get_path(self.config.path))

    def _check_labels(self, labels: Tensor) -> None:
        if labels.ndim != 1 or len(labels) == 0:
            raise ImageModelError(f"labels must be (N,) with N >= 1, got {tuple(labels.shape)}")
        for label in (int(labels.min()), int(labels.max())):
            self._label(label)

    def _label(self, label: object) -> int:
        names = self.class_names
        n = len(names)
        if isinstance(label, str):
            if label in names:
                return names.index(label)
        elif isinstance(label, int | np.integer) and not isinstance(label, bool) and 0 <= label < n:
            return int(label)
        shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise ImageModelError(
            f"there is no class {label!r}: labels run from 0 to {n - 1} ({shown})"
        )

    # -- files ----------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the model's folder; an older one stays whole until the new one is complete.

        Args:
            save_directory: the folder; replaced if it is an image model, refused if it is something
                else.
            kwargs: as in diffusers; weights are always written as safetensors.

        Raises:
            ImageModelError: the folder is something else, a weight is not finite, or the metadata
                is not JSON-ready.
            OSError: the disk is full or not writable; the older model is intact.
        """
        self.save(save_directory, card="", **kwargs)

    def save(self, directory: str | os.PathLike[str], *, card: str, **kwargs: Any) -> None:
        """:meth:`save_pretrained` with the text of the model card."""
        target = Path(directory).expanduser().absolute()
        _check_replaceable(target)
        weights = cast(ImageNet, self.net).state_dict()
        for name, value in weights.items():
            if not torch.isfinite(value).all():
                raise ImageModelError(f"refusing to write {target}: weight {name!r} is not finite")
        try:
            json.dumps(self.metadata)
        except (TypeError, ValueError) as error:
            raise ImageModelError(
                f"cannot write {target}: metadata must be JSON-ready: {error}"
            ) from error

        def fill(folder: Path) -> None:
            super(ConsistencyImagePipeline, self).save_pretrained(
                folder, **{**kwargs, "safe_serialization": True}
            )
            text = card or f"# {target.name}\n\nA cmpolicy image model.\n"
            (folder / CARD).write_text(text)

        try:
            replace_directory(target, fill)
        except (OSError, SafetensorError) as error:  # safetensors' own: the disk is full
            needed = sum(v.numel() * v.element_size() for v in weights.values())
            previous = "; the model that was there before is intact" if target.exists() else ""
            raise OSError(
                getattr(error, "errno", None),
                f"cannot write the image model {target}: {error}; "
                f"{space_note(target, needed)}{previous}",
            ) from error

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> ConsistencyImagePipeline:
        """Open an image model: a folder, or a hub id ``owner/name``.

        Args:
            pretrained_model_name_or_path: the model.
            kwargs: as in diffusers (``torch_dtype``, ...).

        Raises:
            ImageModelError: not found, a policy bundle, another pipeline, damaged, or weights that
                do not fit.
        """
        folder = _locate(pretrained_model_name_or_path)
        _check_index(folder)
        try:
            # read here, since diffusers only warns of weights that are missing
            net, report = ImageNet.from_pretrained(
                folder / NET, output_loading_info=True, use_safetensors=True
            )
        except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
            raise ImageModelError(
                f"{folder / NET} cannot be opened: {error}; it may be incomplete: copy the whole "
                "folder again"
            ) from error
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if report.get(what):
                raise ImageModelError(
                    f"{folder / NET}: its weights are of another network than its config.json "
                    f"describes ({what.replace('_', ' ')}: {', '.join(map(str, report[what][:3]))})"
                    "; copy the whole folder again"
                )
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))  # the latter is the older name
        if dtype is not None:
            net.to(dtype)
        with _no_progress_bar():  # of one component
            pipe: ConsistencyImagePipeline = super().from_pretrained(folder, net=net, **kwargs)
        cast(ImageNet, pipe.net).eval().requires_grad_(False)
        return pipe


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _locate(name_or_path: str | os.PathLike[str]) -> Path:
    """The folder of an image model."""
    text = os.fspath(name_or_path)
    path = Path(text).expanduser().absolute()
    if path.exists():
        return path
    # owner/name, unless the owner is a folder here: then it is a path with a typing error
    if text.count("/") == 1 and not text.startswith((".", "/", "~")) and not path.parent.is_dir():
        try:
            return download(text, [INDEX, CARD, f"{NET}/*"])
        except HubError as error:
            raise ImageModelError(f"no image model at {path}, and {error}") from error
    raise ImageModelError(
        f"no image model at {path}; give the folder of one, such as outputs/<run>/model, or a hub "
        "id 'owner/name'"
    )


def _check_index(folder: Path) -> None:
    """Raise ImageModelError unless the folder says that it is an image model."""
    index = folder / INDEX
    if not index.is_file():
        if (folder / _POLICY_CONFIG).is_file() and _names_policy(folder / _POLICY_CONFIG):
            raise ImageModelError(
                f"{folder} is a policy bundle, not an image model; a policy is opened with "
                "ConsistencyPolicy.from_pretrained or cmpolicy eval policy=..."
            )
        inside = sorted(p.parent.name for p in folder.glob(f"*/{INDEX}")) if folder.is_dir() else []
        hint = f"; did you mean {folder / inside[0]}?" if inside else ""
        raise ImageModelError(f"{folder} is no image model: {INDEX} is missing{hint}")
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ImageModelError(
            f"{index} is truncated or not a pipeline's: {error}; copy the folder again"
        ) from error
    if name != ConsistencyImagePipeline.__name__:
        raise ImageModelError(
            f"{folder} is a {name}, not an image model of cmpolicy; open it with diffusers"
        )


def _names_policy(config: Path) -> bool:
    try:
        return (
            str(json.loads(config.read_text(encoding="utf-8")).get("format")) == "cmpolicy-policy"
        )
    except (ValueError, AttributeError, OSError):
        return False


def _check_replaceable(target: Path) -> None:
    if target.is_file():
        raise ImageModelError(f"{target} is a file; an image model is a folder: choose another")
    if target.exists() and any(target.iterdir()):
        try:
            _check_index(target)
        except ImageModelError as error:
            raise ImageModelError(
                f"{target} exists and is not an image model ({error}); nothing was written: choose "
                "another folder, or remove it first"
            ) from error
