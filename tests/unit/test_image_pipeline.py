"""ConsistencyImagePipeline: files, images, and everything that can be wrong with either."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import cmpolicy
from cmpolicy.flow.objectives import OBJECTIVES, build_objective
from cmpolicy.image.guidance import Guidance
from cmpolicy.image.model import ImageFlowModel
from cmpolicy.image.net import ImageNet, UNetConfig, build_net
from cmpolicy.image.pipeline import ConsistencyImagePipeline, ImageModelError
from cmpolicy.policy.bundle import BundleError, bundled_names, locate
from cmpolicy.policy.policy import ConsistencyPolicy

SMALL = UNetConfig(widths=(8,), groups=4, embedding=8)


def make_net(seed: int = 0, channels: int = 1) -> ImageNet:
    torch.manual_seed(seed)
    net = build_net(SMALL, image_size=8, channels=channels, n_classes=3)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net.eval()


def make_pipe(seed: int = 0, channels: int = 1, **settings: Any) -> ConsistencyImagePipeline:
    settings = {"class_names": ["cat", "dog", "eel"], "metadata": {"samples": 7}} | settings
    return ConsistencyImagePipeline(make_net(seed, channels), **settings)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The folder of a model, alone in its parent."""
    folder = tmp_path / "models" / "m"
    make_pipe().save_pretrained(folder)
    return folder


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(pipe: ConsistencyImagePipeline, labels: Any = (0, 1, 2), **settings: Any) -> Any:
    settings = {"generator": seeded(), "output_type": "pt"} | settings
    return pipe(class_labels=labels, **settings).images


@pytest.mark.parametrize("path", ["linear", "trigonometric"])
@pytest.mark.parametrize("sampler", ["flow_map", "diagonal"])
def test_round_trip(tmp_path: Path, path: str, sampler: str) -> None:
    pipe = make_pipe(path=path, sampler=sampler)
    pipe.save_pretrained(tmp_path / "m")
    loaded = ConsistencyImagePipeline.from_pretrained(tmp_path / "m")
    assert isinstance(loaded, DiffusionPipeline)
    for steps in (1, 3):
        expected = images(pipe, num_inference_steps=steps)
        assert torch.equal(images(loaded, num_inference_steps=steps), expected)
    assert (loaded.sampler, loaded.config.path) == (sampler, path)
    assert loaded.class_names == ("cat", "dog", "eel")
    assert loaded.metadata == {"samples": 7}
    assert (loaded.n_classes, loaded.image_size, loaded.channels) == (3, 8, 1)
    assert not any(p.requires_grad for p in loaded.net.parameters())
    files = sorted(str(p.relative_to(tmp_path / "m")) for p in (tmp_path / "m").rglob("*.*"))
    assert files == [
        "README.md",
        "model_index.json",
        "net/config.json",
        "net/diffusion_pytorch_model.safetensors",
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_opened_in_another_precision(model: Path, dtype: torch.dtype) -> None:
    pipe = cmpolicy.ConsistencyImagePipeline.from_pretrained(model, dtype=dtype)
    assert pipe.net.dtype == dtype
    generated = pipe.generate(torch.tensor([0, 1]), generator=seeded())
    assert generated.dtype == torch.float32
    assert bool(generated.isfinite().all())


def test_names_are_numbers_unless_given(tmp_path: Path) -> None:
    ConsistencyImagePipeline(make_net()).save_pretrained(tmp_path / "m")
    loaded = ConsistencyImagePipeline.from_pretrained(tmp_path / "m")
    assert loaded.class_names == ("0", "1", "2")
    assert loaded.metadata == {}


def test_output_types_are_the_same_images() -> None:
    pipe = make_pipe(channels=3)
    tensor = images(pipe)
    assert tensor.shape == (3, 3, 8, 8)
    assert 0 <= float(tensor.min()) < float(tensor.max()) <= 1
    array = images(pipe, output_type="np")
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    pictures = images(pipe, output_type="pil")
    assert [(p.mode, p.size) for p in pictures] == [("RGB", (8, 8))] * 3
    np.testing.assert_array_equal(np.asarray(pictures[1]), np.round(array[1] * 255))
    (in_tuple,) = pipe([0, 1, 2], generator=seeded(), output_type="pt", return_dict=False)
    assert torch.equal(in_tuple, tensor)
    assert images(make_pipe(), output_type="pil")[0].mode == "L"


def test_classes_by_number_name_or_tensor() -> None:
    pipe = make_pipe()
    expected = images(pipe, [2, 0])
    assert torch.equal(images(pipe, ["eel", "cat"]), expected)
    assert torch.equal(images(pipe, torch.tensor([2, 0])), expected)
    assert torch.equal(images(pipe, np.array([2, 0])), expected)
    assert torch.equal(images(pipe, "dog"), images(pipe, 1))
    assert not torch.allclose(images(pipe, [0]), images(pipe, [1]), atol=1e-3)


def test_an_image_with_a_generator_of_its_own_does_not_depend_on_the_others() -> None:
    pipe = make_pipe()
    together = images(pipe, [0, 1, 2], generator=[seeded(1), seeded(2), seeded(3)])
    alone = images(pipe, [1], generator=[seeded(2)])
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-5)


def test_generate_is_what_the_model_generates() -> None:
    """The pipeline's images are those of the model that was trained."""
    pipe = make_pipe()
    model = ImageFlowModel(pipe.net, objective=build_objective("isd"), guidance=Guidance(2.0))
    labels = torch.tensor([0, 2])
    expected = model.generate(labels, nfe=2, generator=seeded())
    assert torch.equal(pipe.generate(labels, nfe=2, generator=seeded()), expected)
    assert float(expected.min()) >= -1
    assert torch.equal(images(pipe, labels, num_inference_steps=2), expected / 2 + 0.5)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_images_take_every_objective(tmp_path: Path, name: str) -> None:
    """A gradient for every weight that the objective uses, and images by its own sampler."""
    objective = build_objective(name)
    nfe = 10 if name == "ddpm" else objective.nfe
    model = ImageFlowModel(make_net().train(), sampler=objective.sampler, objective=objective)
    generator = seeded()
    batch: Any = {
        "images": torch.rand(4, 1, 8, 8, generator=generator) * 2 - 1,
        "labels": torch.tensor([0, 1, 2, 0]),
    }
    output = model.compute_loss(batch, draws=model.draw(4, generator), progress=0.6)
    assert output.per_example.shape == (4,)
    output.loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert float(model.health(batch, generator).variance_ratio) >= 0
    pipe = ConsistencyImagePipeline(model.net.eval(), sampler=model.sampler)
    pipe.save_pretrained(tmp_path / "m")
    loaded = ConsistencyImagePipeline.from_pretrained(tmp_path / "m")
    several = [seeded(k) for k in range(3)]
    found = images(loaded, num_inference_steps=nfe, generator=several)
    assert found.shape == (3, 1, 8, 8)
    assert torch.isfinite(found).all()
    again = [seeded(k) for k in range(3)]
    assert torch.equal(images(pipe, num_inference_steps=nfe, generator=again), found)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"class_labels": [3]}, "there is no class 3: labels run from 0 to 2 (cat, dog, eel)"),
        ({"class_labels": [0, -1]}, "there is no class -1"),
        ({"class_labels": ["horse"]}, "there is no class 'horse'"),
        ({"class_labels": [1.5]}, "there is no class 1.5"),
        ({"class_labels": [True]}, "there is no class True"),
        ({"class_labels": torch.tensor([4])}, "there is no class 4"),
        ({"class_labels": []}, "labels must be (N,) with N >= 1"),
        ({"class_labels": 0, "num_inference_steps": 0}, "must be at least 1"),
        ({"class_labels": 0, "output_type": "jpg"}, "output_type='jpg' is not one of pil, np, pt"),
        ({"class_labels": 0, "sampler": "euler"}, "unknown sampler 'euler'"),
        ({"class_labels": 0, "sampler": "ddim"}, "networks that predict the noise"),
        (
            {"class_labels": [0, 1], "generator": [torch.Generator()]},
            "1 generators were given",
        ),
    ],
)
def test_bad_requests(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is what is tested
        make_pipe()(**call)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "bent"}, "unknown path 'bent'; choose one of ['linear', 'trigonometric']"),
        ({"sampler": "euler"}, "unknown sampler 'euler'"),
        ({"class_names": ["a"]}, "the network has 3 classes, but 1 names were given"),
    ],
)
def test_bad_models(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ImageModelError) as caught:
        make_pipe(**settings)
    assert message in str(caught.value)


# -- files that are no image model ---------------------------------------------------------------


def test_a_policy_is_named_where_an_image_model_is_wanted() -> None:
    policy = locate(bundled_names()[0])
    with pytest.raises(ImageModelError, match=r"is a policy bundle, not an image model.*Policy"):
        ConsistencyImagePipeline.from_pretrained(policy)


def test_an_image_model_is_named_where_a_policy_is_wanted(model: Path) -> None:
    with pytest.raises(BundleError, match=r"no policy; an image model is opened with"):
        ConsistencyPolicy.from_pretrained(model)


def _rewrite_index(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | changes))

    return edit


def _cut(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return edit


def _edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "net" / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file, metadata={"format": "pt"})

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut("model_index.json"), "model_index.json is truncated or not a pipeline's"),
        (_cut("net/config.json"), "cannot be opened"),
        (_cut("net/diffusion_pytorch_model.safetensors"), "cannot be opened"),
        (lambda f: (f / "net" / "config.json").unlink(), "cannot be opened"),
        (_rewrite_index(_class_name="DiTPipeline"), "is a DiTPipeline, not an image model"),
        (
            lambda f: (f / "model_index.json").unlink(),
            "no image model: model_index.json is missing",
        ),
        (_edit_weights(lambda w: w.pop("classes.weight")), "missing keys: classes.weight"),
        (_edit_weights(lambda w: w.update(a=torch.zeros(1))), "unexpected keys: a"),
    ],
)
def test_damaged_models(model: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(model)
    with pytest.raises(ImageModelError) as caught:
        ConsistencyImagePipeline.from_pretrained(model)
    assert message in str(caught.value)
    assert str(model) in str(caught.value)


def test_nothing_there(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent.parent)
    with pytest.raises(ImageModelError, match=r"no image model at .*/nowhere; give the folder"):
        ConsistencyImagePipeline.from_pretrained("nowhere")
    with pytest.raises(ImageModelError, match=r"no image model at .*models/n; give the folder"):
        ConsistencyImagePipeline.from_pretrained("models/n")
    with pytest.raises(ImageModelError, match=r"did you mean .*models/m"):
        ConsistencyImagePipeline.from_pretrained("models")


# -- writing ---------------------------------------------------------------------------------------


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("words")
    with pytest.raises(ImageModelError, match="exists and is not an image model"):
        make_pipe().save_pretrained(tmp_path / "thesis")
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter1.txt"]
    (tmp_path / "file").write_text("words")
    with pytest.raises(ImageModelError, match="is a file"):
        make_pipe().save_pretrained(tmp_path / "file")


def test_an_older_model_is_replaced_and_what_lies_beside_it_kept(model: Path) -> None:
    (model / "grid.png").write_bytes(b"picture")
    make_pipe(seed=1).save_pretrained(model)
    assert (model / "grid.png").read_bytes() == b"picture"
    loaded = ConsistencyImagePipeline.from_pretrained(model)
    assert torch.equal(images(loaded), images(make_pipe(seed=1)))
    assert [p.name for p in model.parent.iterdir()] == ["m"], "litter"


def test_what_cannot_be_written_leaves_the_older_model(model: Path) -> None:
    before = {p: p.read_bytes() for p in model.rglob("*.*")}
    broken = make_pipe()
    with torch.no_grad():
        broken.net.classes.weight[0, 0] = float("nan")
    with pytest.raises(ImageModelError, match=r"weight 'classes.weight' is not finite"):
        broken.save_pretrained(model)
    with pytest.raises(ImageModelError, match="metadata must be JSON-ready"):
        make_pipe(metadata={"x": {1, 2}}).save_pretrained(model)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match=r"MB free; the model that was there before is intact"):
            make_pipe(seed=1).save_pretrained(model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p: p.read_bytes() for p in model.rglob("*.*")} == before
    assert [p.name for p in model.parent.iterdir()] == ["m"], "litter"
