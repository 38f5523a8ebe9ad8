"""``cmpolicy image sample`` and ``eval``, with a small model that nobody has trained."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from cmpolicy.cli.main import main as cmpolicy
from cmpolicy.experiment.image.results import ImageResult
from cmpolicy.experiment.image.sampling import noise_generators, parse_classes, spread_over
from cmpolicy.image.net import UNetConfig, build_net
from cmpolicy.image.pipeline import ConsistencyImagePipeline
from cmpolicy.schema import ConfigError


def main(words: Sequence[str]) -> int:
    """``cmpolicy image``."""
    return cmpolicy(["image", *words])


NAMES = ["lying", "standing"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 40 bars, lying and standing, 8x8 grey."""
    root = tmp_path_factory.mktemp("data") / "bars"
    rng = np.random.default_rng(0)
    for name in NAMES:
        (root / name).mkdir(parents=True)
        for i in range(20):
            image = rng.integers(0, 60, (8, 8))
            place = rng.integers(0, 6)
            image[place : place + 3] += 150
            image = image if name == "lying" else image.T
            Image.fromarray(image.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory, images):
    """The folder of a run with the model in it."""
    run = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    net = build_net(
        UNetConfig(widths=(8,), groups=4, embedding=8), image_size=8, channels=1, n_classes=2
    )
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    dataset = {"name": "folder", "path": str(images), "test_fraction": 0.2}
    pipe = ConsistencyImagePipeline(net, class_names=NAMES, metadata={"dataset": dataset})
    pipe.save_pretrained(run / "model")
    return run


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """One cache for all tests of this file, so that the classifier is trained once."""
    folder = tmp_path_factory.getbasetemp() / "image-eval-cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "cmpolicy" / "images"


def sample(model, out, *words):
    return main(["sample", f"model={model}", f"out={out / 'grid.png'}", *words])


def evaluate(model, out, *words):
    return main(["eval", f"model={model}", "samples=20", f"out={out}", *words])


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# -- sample ----------------------------------------------------------------------------------------


def test_sample_writes_what_was_asked_for(model, tmp_path, capsys):
    status = sample(
        model, tmp_path, "per_class=3", f"files={tmp_path / 'f'}", f"paths={tmp_path / 'way.png'}"
    )
    assert status == 0
    assert "ms per image" in capsys.readouterr().out
    grid = Image.open(tmp_path / "grid.png")
    assert grid.width > 3 * 48
    assert Image.open(tmp_path / "way.png").width > 8 * 48  # noise, 1, 2 and 4 states
    written = files(tmp_path / "f")
    assert list(written) == [f"{k}_{i:04d}.png" for k in (0, 1) for i in range(3)]
    assert Image.open(tmp_path / "f" / "0_0000.png").size == (8, 8)
    assert len(set(written.values())) == 6
    capsys.readouterr()
    assert sample(model, tmp_path, "per_class=1", f"files={tmp_path / 'f'}") == 2  # of two models
    assert "choose an empty folder" in capsys.readouterr().err


def test_an_image_depends_on_seed_class_and_number_alone(model, tmp_path):
    def made(name, *words):
        assert sample(model, tmp_path, f"files={tmp_path / name}", *words) == 0
        return files(tmp_path / name)

    every = made("a", "per_class=4")
    some = made("b", "per_class=2", "classes=standing", "batch_size=1")
    assert {name: every[name] for name in some} == some
    other = made("c", "per_class=4", "seed=1")
    assert all(other[name] != every[name] for name in every)
    two = made("d", "per_class=4", "nfe=2")
    assert all(two[name] != every[name] for name in every)


def test_the_picture_is_the_images_of_the_pipeline(model, tmp_path):
    assert sample(model, tmp_path, "per_class=1", f"files={tmp_path / 'f'}", "seed=3") == 0
    pipe = ConsistencyImagePipeline.from_pretrained(model / "model")
    noise = noise_generators(np.array([0, 1]), 3)
    direct = pipe(class_labels=["lying", "standing"], generator=noise).images
    written = [Image.open(tmp_path / "f" / f"{k}_0000.png") for k in (0, 1)]
    for ours, theirs in zip(written, direct, strict=True):
        difference = np.asarray(ours).astype(int) - np.asarray(theirs)
        assert np.abs(difference).max() <= 1  # diffusers rounds in another place


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["classes=2"], "there is no class 2; the model has 0 to 1 (lying, standing)"),
        (["classes=0-2"], "there is no class 2"),
        (["classes=1-0"], "cannot read '1-0'"),
        (["classes=[0,lying]"], "each once, got [0, 'lying']"),
        (["classes=[]"], "at least one class"),
        (["classes=flying"], "cannot read 'flying'; give numbers from 0 to 1"),
        (["nfe=0"], "nfe=0 must be at least 1"),
        (["per_class=0"], "per_class=0 must be at least 1"),
        (["seed=-1"], "seed=-1 must be at least 0"),
        (["out=grid.jpg"], "out=grid.jpg must end in .png"),
        (["sampler=euler"], "sampler='euler' is not one of flow_map, diagonal"),
        (["device=tpu"], "device='tpu' is not one of auto, cpu, cuda"),
        (["clases=1"], "unknown setting 'clases'; did you mean 'classes' or"),
        (["model=null"], "model is not set; give model=<text>"),
        (["model=nowhere"], "no image model at"),
    ],
)
def test_sample_with_bad_words(model, tmp_path, capsys, words, message):
    assert sample(model, tmp_path, *words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_policy_is_not_an_image_model(tmp_path, repository, capsys):
    policy = repository / "cmpolicy" / "pretrained" / "pusht"
    for command in (sample, evaluate):
        assert command(policy, tmp_path) == 2
        error = capsys.readouterr().err
        assert "pusht is a policy bundle, not an image model" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(model, tmp_path, capsys):
    assert sample(model, tmp_path, "device=cuda") == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_help(capsys):
    for command in ("sample", "eval"):
        assert main([command, "--help"]) == 0
        assert "network evaluations per image" in capsys.readouterr().out
        assert main([command]) == 2
        capsys.readouterr()


def test_parse_classes():
    names = [*"abcdefghij", "7"]  # class 10 is called "7"
    assert parse_classes(None, names) == list(range(11))
    assert parse_classes("0-3, j,5", names) == [0, 1, 2, 3, 9, 5]
    assert parse_classes(["7", 1], names) == [10, 1]  # a name comes before a number
    months = sorted(map(str, range(1, 13)))  # 1, 10, 11, 12, 2, ...
    assert [months[label] for label in parse_classes("2-4", months)] == ["2", "3", "4"]
    with pytest.raises(ConfigError, match="there is no class 11"):
        parse_classes(11, names)


def test_spread_over():
    assert spread_over(7, [2, 5, 6]).tolist() == [2, 2, 2, 5, 5, 6, 6]


# -- eval ------------------------------------------------------------------------------------------


def test_eval_writes_results_a_report_and_pictures(model, tmp_path, capsys, cache):
    assert evaluate(model, tmp_path, "nfe=[1,2]", "name=ours", "seed=4") == 0
    printed = capsys.readouterr().out
    assert "this is not FID" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "nearest_nfe1.png",
        "nearest_nfe2.png",
        "paths.png",
        "report.md",
        "result_nfe1.json",
        "result_nfe2.json",
        "samples_nfe1.png",
        "samples_nfe2.png",
    ]
    report = (tmp_path / "report.md").read_text()
    assert report.count("| ours ") == 2
    assert "real test images of folder bars" in report
    assert "![samples_nfe2](samples_nfe2.png)" in report
    raw = json.loads((tmp_path / "result_nfe2.json").read_text())
    assert raw["command"].startswith("cmpolicy image eval model=")
    assert {"device", "versions", "git_commit", "seed", "sampler"} <= set(raw)
    assert {"python", "torch", "diffusers", "scikit-learn"} <= set(raw["versions"])
    assert raw["scores"]["n"] == 20
    assert raw["real"]["n"] == 8
    assert raw["judge"]["accuracy"] == 1.0
    assert raw["judge"]["n_test"] == 8
    assert raw["fidelity"] is None
    result = ImageResult.load(tmp_path / "result_nfe2.json")
    assert result.nfe == 2
    assert result.data.class_names == ("lying", "standing")
    # noise of another number of evaluations is the same, the images are not
    assert raw["scores"] != json.loads((tmp_path / "result_nfe1.json").read_text())["scores"]

    before = files(cache)
    assert {name.split("-")[0] for name in before} == {"classifier", "features"}
    assert evaluate(model, tmp_path / "again", "nfe=2", "seed=4", "pictures=false") == 0
    assert files(cache) == before
    again = ImageResult.load(tmp_path / "again" / "result_nfe2.json")
    assert again.scores == result.scores
    assert not list((tmp_path / "again").glob("*.png"))


def test_results_are_compared_in_one_report(model, tmp_path, capsys):
    for name in ("a", "b"):
        assert evaluate(model, tmp_path / name, f"name={name}", "pictures=false") == 0
    results = ",".join(str(tmp_path / name / "result_nfe1.json") for name in ("a", "b"))
    capsys.readouterr()
    assert main(["eval", "report", f"results=[{results}]", f"out={tmp_path / 'both'}"]) == 0
    printed = capsys.readouterr().out
    assert "| a " in printed
    assert "| b " in printed
    assert printed.count("real test images") >= 1
    assert printed.count("| real test images") == 1  # the mark is the same
    assert (tmp_path / "both" / "report.md").is_file()


def test_reports_of_what_is_no_result(tmp_path, capsys):
    junk = tmp_path / "junk.json"
    junk.write_text('{"nfe": 1}')
    for word, message in (
        ("results=[]", "results is empty"),
        (f"results=[{junk}]", "junk.json cannot be read as a result"),
        (f"results=[{tmp_path / 'none.json'}]", "none.json cannot be read as a result"),
        ("files=[a]", "unknown setting 'files'"),
    ):
        assert main(["eval", "report", word, f"out={tmp_path / 'r'}"]) == 2
        assert message in capsys.readouterr().err


def test_the_data_may_lie_elsewhere(model, images, tmp_path):
    words = ["dataset=folder", f"dataset.path={images}", "dataset.test_fraction=0.2"]
    assert evaluate(model, tmp_path, "pictures=false", *words) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset=digits"], "does not fit the model: its image_size is 16, the model's 8"),
        (
            ["dataset=digits", "dataset.image_size=8"],
            "does not fit the model: its classes are ('0', ",
        ),
        (["dataset=folder", "dataset.path=nowhere"], "dataset=folder: there is no directory"),
        (["dataset=birds"], "unknown choice dataset=birds"),
        (
            ["dataset.path=a.npz"],
            "dataset.path is set, but no dataset is chosen; add dataset=cifar10|digits|",
        ),
        (["samples=3"], "samples=3 is too few: scores need 2 images of each of 2 classes"),
        (["nfe=[]"], "nfe=[] must name something"),
        (["nfe=[1,1]"], "nfe=[1, 1] must name something, and nothing twice"),
        (["features=inception"], "features='inception' is not one of classifier, efficientnet"),
        (["inception=a.pth"], "inception=a.pth is for fid=true"),
        (["fid=true", "inception=a.pth"], "FID needs torch-fidelity's Inception weights"),
    ],
)
def test_eval_with_bad_words(model, tmp_path, capsys, words, message):
    assert evaluate(model, tmp_path, *words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_say_what_it_was_trained_on(model, tmp_path, capsys):
    pipe = ConsistencyImagePipeline.from_pretrained(model / "model")
    bare = ConsistencyImagePipeline(pipe.net, class_names=NAMES)
    bare.save_pretrained(tmp_path / "bare")
    assert evaluate(tmp_path / "bare", tmp_path / "out") == 2
    assert "does not say what it was trained on; give dataset=" in capsys.readouterr().err


def test_a_model_is_evaluated_as_often_as_it_was_made_for(model, tmp_path, capsys):
    """A flow-matching model says that it takes more than one evaluation."""
    pipe = ConsistencyImagePipeline.from_pretrained(model / "model")
    many = ConsistencyImagePipeline(
        pipe.net, class_names=NAMES, metadata={**pipe.metadata, "nfe": 3}
    )
    many.save_pretrained(tmp_path / "many")
    assert evaluate(tmp_path / "many", tmp_path / "out", "pictures=false") == 0
    assert (tmp_path / "out/result_nfe3.json").is_file()
    assert main(["sample", f"model={tmp_path / 'many'}", f"out={tmp_path / 'grid.png'}"]) == 0
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    given, asked = [
        many(["lying"], generator=seed, output_type="pt", **steps).images
        for seed, steps in zip(seeds, [{}, {"num_inference_steps": 3}], strict=True)
    ]
    assert torch.equal(given, asked)
