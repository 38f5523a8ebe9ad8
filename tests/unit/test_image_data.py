"""Image data sets: what they hold, and every way in which they can be wrong."""

import builtins
import io

import numpy as np
import pytest
from PIL import Image

from cmpolicy.image.datasets import ImageDataConfig, ImageDataError, ImageSet, load_images
from cmpolicy.image.datasets.split import stratified_test_rows
from cmpolicy.schema import ConfigError, from_mapping

RNG = np.random.default_rng(0)


def picture(size=(12, 12), mode="RGB", value=None):
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    pixels = RNG.integers(0, 256, shape) if value is None else np.full(shape, value)
    return Image.fromarray(pixels.astype(np.uint8), mode)


@pytest.fixture
def folder(tmp_path):
    """Two classes, five RGB images of 12x12 each."""
    root = tmp_path / "images"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(5):
            picture().save(root / name / f"{i}.png")
    return root


def load_folder(root, **settings):
    return load_images(ImageDataConfig(name="folder", path=str(root), **settings))


# -- digits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 16, 32])
def test_digits(size):
    data = load_images(ImageDataConfig(image_size=size))
    assert data.image_size == size
    assert data.channels == 1
    assert data.class_names == tuple("0123456789")
    assert len(data.train) + len(data.test) == 1797
    assert len(data.test) == 359
    assert not data.flip
    assert data.train.images.max() == 255
    assert data.train.images.min() == 0


def test_the_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    data = load_images(ImageDataConfig(image_size=8))
    stored = {
        (image.round().astype(int).tobytes(), int(k))
        for image, k in zip(*bunch_of(bunch), strict=True)
    }
    ours = np.concatenate([data.train.images, data.test.images])[..., 0]
    labels = np.concatenate([data.train.labels, data.test.labels])
    read = {(image.astype(int).tobytes(), int(k)) for image, k in zip(ours, labels, strict=True)}
    assert read == stored


def bunch_of(bunch):
    return (bunch.images * (255 / 16)).astype(np.float32), bunch.target


def test_a_missing_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without_sklearn(name, *args, **kwargs):
        if name.split(".")[0] == "sklearn":
            raise ImportError("No module named 'sklearn'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(ImageDataError, match=r"scikit-learn.*pip install 'cmpolicy\[image\]'"):
        load_images(ImageDataConfig())


# -- folder ----------------------------------------------------------------------------------------


def test_folder(folder):
    (folder / ".cache").mkdir()
    (folder / "cat" / ".note").write_text("no image")
    data = load_folder(folder)
    assert data.class_names == ("cat", "dog")
    assert data.train.images.shape == (8, 12, 12, 3)
    assert data.test.images.shape == (2, 12, 12, 3)
    assert sorted(data.test.labels.tolist()) == [0, 1]
    assert not data.flip
    assert load_folder(folder, flip=True).flip
    files = {np.asarray(Image.open(file)).tobytes() for file in folder.glob("cat/*.png")}
    read = {i.tobytes() for part in (data.train, data.test) for i in part.images[part.labels == 0]}
    assert read == files


def test_uniform_images_are_scaled_to_the_size_asked_for(folder):
    assert load_folder(folder, image_size=8).image_size == 8


@pytest.mark.parametrize(
    ("name", "image", "message"),
    [
        ("wide.png", picture((20, 12)), r"2 sizes: 12x12 \(10, as cat/0.png\), 20x12 \(1, as dog/"),
        ("grey.png", picture(mode="L"), r"2 modes: RGB \(10, .*\), L \(1, as dog/grey.png\)"),
        ("clear.png", picture(mode="RGBA"), r"2 modes: RGB \(10, .*\), RGBA \(1"),
    ],
)
def test_mixed_folders_are_refused_or_converted_as_configured(folder, name, image, message):
    image.save(folder / "dog" / name)
    with pytest.raises(ImageDataError, match=message + r".*mixed=convert"):
        load_folder(folder)
    data = load_folder(folder, mixed="convert", image_size=10, mode="L")
    assert data.train.images.shape[1:] == (10, 10, 1)
    assert len(data.train) + len(data.test) == 11


def test_conversion_crops_the_centre_and_lays_on_white(folder):
    wide = Image.new("RGB", (20, 10), "black")
    wide.paste((200, 0, 0), (5, 0, 15, 10))
    wide.save(folder / "cat" / "wide.png")
    picture((10, 10), "RGBA", 0).save(folder / "dog" / "clear.png")  # black, wholly transparent
    data = load_folder(folder, mixed="convert", image_size=10, mode="RGB")
    images = np.concatenate([data.train.images, data.test.images])
    flat = [tuple(i[0, 0].tolist()) for i in images if (i == i[0, 0]).all()]
    assert sorted(flat) == [(200, 0, 0), (255, 255, 255)]


def test_photographs_are_turned_upright(folder):
    half = Image.new("L", (12, 12), 0)
    half.paste(255, (0, 0, 6, 12))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: the left half becomes the top
    for name in ("cat", "dog"):
        for file in (folder / name).iterdir():
            file.unlink()
        for i in range(2):
            half.save(folder / name / f"{i}.png", exif=exif)
    image = load_folder(folder).train.images[0, :, :, 0]
    assert (image[:6] == 255).all()
    assert (image[6:] == 0).all()


def test_palettes_are_converted_only_when_asked(folder):
    for file in folder.glob("*/*.png"):
        Image.open(file).quantize(16).save(file)
    with pytest.raises(
        ImageDataError, match=r"have mode P, not L \(grey\) or RGB; give mixed=conv"
    ):
        load_folder(folder)
    data = load_folder(folder, mixed="convert", image_size=12, mode="RGB")
    first = np.asarray(Image.open(folder / "cat" / "0.png").convert("RGB")).tobytes()
    assert first in {i.tobytes() for part in (data.train, data.test) for i in part.images}


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_more_than_8_bits_are_not_guessed_at(folder, mode):
    depth = np.uint16 if mode == "I;16" else np.float32
    Image.fromarray(np.zeros((12, 12), depth)).save(folder / "cat" / "deep.tiff")
    for mixed in ({}, {"mixed": "convert", "image_size": 12, "mode": "L"}):
        with pytest.raises(ImageDataError, match=r"deep.tiff has more than 8 bits"):
            load_folder(folder, **mixed)


def test_images_that_are_not_square(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            picture((12, 8)).save(tmp_path / name / f"{i}.png")
    with pytest.raises(ImageDataError, match=r"12x8, not square; give mixed=convert"):
        load_folder(tmp_path)


def test_a_mode_that_the_images_have_not(folder):
    with pytest.raises(ImageDataError, match=r"have mode RGB, not mode=L; give mode=RGB, or mixed"):
        load_folder(folder, mode="L")


@pytest.mark.parametrize(
    "content", [b"", b"no image at all", "truncated"], ids=["empty", "text", "truncated"]
)
def test_a_broken_file_is_named_and_skipped_only_when_asked(folder, content):
    broken = folder / "dog" / "broken.png"
    if content == "truncated":
        picture((64, 64)).save(broken)
        content = broken.read_bytes()[:300]
    broken.write_bytes(content)
    with pytest.raises(ImageDataError, match=r"dog/broken.png cannot be read.*broken=skip"):
        load_folder(folder)
    data = load_folder(folder, broken="skip")
    assert data.skipped == ("dog/broken.png",)
    assert len(data.train) + len(data.test) == 10


def test_a_class_without_images(folder):
    (folder / "eel").mkdir()
    with pytest.raises(ImageDataError, match=r"class 'eel' is empty: .*/eel has no images"):
        load_folder(folder)
    (folder / "eel" / "a.png").write_bytes(b"broken")
    with pytest.raises(ImageDataError, match=r"class 'eel' .* has 0 readable image\(s\)"):
        load_folder(folder, broken="skip")
    picture().save(folder / "eel" / "b.png")
    with pytest.raises(ImageDataError, match=r"has 1 readable image\(s\); at least 2"):
        load_folder(folder, broken="skip")


def test_folders_of_another_layout(folder, tmp_path):
    with pytest.raises(ImageDataError, match=r"there is no directory .*/nowhere"):
        load_folder(tmp_path / "nowhere")
    (tmp_path / "void").mkdir()
    with pytest.raises(ImageDataError, match=r"has no class directories"):
        load_folder(tmp_path / "void")
    (folder / "cat" / "more").mkdir()
    with pytest.raises(ImageDataError, match=r"cat/more is a directory within a class"):
        load_folder(folder)
    picture().save(folder / "stray.png")
    with pytest.raises(ImageDataError, match=r"stray.png lies beside the class directories"):
        load_folder(folder)


# -- npz -------------------------------------------------------------------------------------------


def mnist_arrays(n=20):
    labels = np.arange(n) % 10
    return {
        "x_train": RNG.integers(0, 256, (n, 28, 28), np.uint8),
        "y_train": labels,
        "x_test": RNG.integers(0, 256, (n, 28, 28), np.uint8),
        "y_test": labels.astype(np.uint8),
    }


def cifar_arrays(n=20):
    arrays = {"classes": np.array(["x"] * 10)}
    for part in ("train", "test"):
        jpegs = []
        for _ in range(n):
            buffer = io.BytesIO()
            picture((32, 32)).save(buffer, "JPEG")
            jpegs.append(buffer.getvalue())
        arrays[f"jpeg_{part}"] = np.frombuffer(b"".join(jpegs), np.uint8)
        arrays[f"offset_{part}"] = np.cumsum([0, *map(len, jpegs)])
        arrays[f"y_{part}"] = np.arange(n) % 10
    return arrays


def load_arrays(tmp_path, arrays, name="mnist", **settings):
    path = tmp_path / f"{name}.npz"
    np.savez(path, **arrays)
    return load_images(ImageDataConfig(name=name, path=str(path), **settings))


def test_mnist_from_pixels(tmp_path):
    arrays = mnist_arrays()
    data = load_arrays(tmp_path, arrays)
    assert (data.train.images[..., 0] == arrays["x_train"]).all()
    assert (data.test.labels == arrays["y_test"]).all()
    assert not data.flip
    assert load_arrays(tmp_path, arrays, image_size=32).image_size == 32


def test_cifar10_from_jpegs(tmp_path):
    arrays = cifar_arrays()
    data = load_arrays(tmp_path, arrays, "cifar10")
    assert data.train.images.shape == (20, 32, 32, 3)
    assert data.flip
    assert data.class_names[3] == "cat"
    first = arrays["jpeg_test"][: arrays["offset_test"][1]].tobytes()
    assert (data.test.images[0] == np.asarray(Image.open(io.BytesIO(first)))).all()


def test_a_broken_jpeg_is_named_and_skipped_only_when_asked(tmp_path):
    arrays = cifar_arrays()
    jpegs = arrays["jpeg_train"].copy()
    start, stop = arrays["offset_train"][12:14]
    jpegs[start:stop] = 0
    arrays["jpeg_train"] = jpegs
    with pytest.raises(ImageDataError, match=r"cifar10.npz: train image 12 cannot be read"):
        load_arrays(tmp_path, arrays, "cifar10")
    data = load_arrays(tmp_path, arrays, "cifar10", broken="skip")
    assert len(data.train) == 19
    assert data.skipped == ("cifar10.npz: train image 12",)
    assert data.train.labels.tolist() == [*range(10), 0, 1, *range(3, 10)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_train": None}, r"has no array 'y_train'; expected .* It has: x_test, x_train, y_test"),
        ({"x_train": None}, r"has no array 'jpeg_train'"),
        ({"y_test": np.arange(19) % 10}, r"20 test images but 19 labels"),
        ({"x_train": np.zeros((20, 28, 28), np.float32)}, r"'x_train' is float32 .*expected uint8"),
        ({"x_train": np.zeros((20, 32, 32), np.uint8)}, r"\(32, 32, 1\).*mnist has \(28, 28, 1\)"),
        ({"y_train": np.full(20, 0.5)}, r"'y_train' is float64 .*whole numbers"),
        ({"y_train": np.arange(20) % 10 + 1}, r"2 train labels are outside 0..9; the first is 10"),
        ({"y_train": np.arange(20) % 10 - 1}, r"2 train labels are outside 0..9; the first is -1"),
        ({"y_train": np.arange(20) % 9}, r"train part has no image of 1 of 10 classes: 9 \(9\)"),
    ],
)
def test_npz_of_another_content(tmp_path, change, message):
    arrays = {k: v for k, v in {**mnist_arrays(), **change}.items() if v is not None}
    with pytest.raises(ImageDataError, match=message):
        load_arrays(tmp_path, arrays)


def test_jpegs_whose_offsets_do_not_fit(tmp_path):
    arrays = cifar_arrays()
    with pytest.raises(ImageDataError, match=r"'offset_train' must rise from 0"):
        load_arrays(tmp_path, {**arrays, "offset_train": arrays["offset_train"] + 1}, "cifar10")
    with pytest.raises(ImageDataError, match=r"20 train images but 19 labels"):
        load_arrays(tmp_path, {**arrays, "y_train": np.arange(19) % 10}, "cifar10")


def test_npz_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.npz"
    config = ImageDataConfig(name="mnist", path=str(path))
    with pytest.raises(ImageDataError, match=r"there is no file .*a.npz"):
        load_images(config)
    np.savez(path, **mnist_arrays())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ImageDataError, match=r"a.npz cannot be read as .npz"):
        load_images(config)
    np.savez(path, **{**mnist_arrays(), "y_train": np.array([object()] * 20)})
    with pytest.raises(ImageDataError, match=r"cannot be read"):  # a pickle is never loaded
        load_images(config)


# -- torchvision -----------------------------------------------------------------------------------


def write_idx(path, array):
    """The format of MNIST's files: magic number, sizes (big-endian), bytes."""
    head = np.array([0x0800 + array.ndim, *array.shape], ">i4").tobytes()
    path.write_bytes(head + array.astype(np.uint8).tobytes())


def test_what_torchvision_downloaded(tmp_path):
    arrays = mnist_arrays()
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, stem in (("train", "train"), ("test", "t10k")):
        write_idx(raw / f"{stem}-images-idx3-ubyte", arrays[f"x_{part}"])
        write_idx(raw / f"{stem}-labels-idx1-ubyte", arrays[f"y_{part}"])
    data = load_images(ImageDataConfig(name="mnist", path=str(tmp_path)))
    assert (data.train.images[..., 0] == arrays["x_train"]).all()
    assert (data.test.labels == arrays["y_test"]).all()


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_nothing_downloaded(tmp_path, name):
    with pytest.raises(ImageDataError, match=rf"{name} is not in .*path=<file>.npz"):
        load_images(ImageDataConfig(name=name, path=str(tmp_path)))
    with pytest.raises(ImageDataError, match=r"there is no folder"):
        load_images(ImageDataConfig(name=name, path=str(tmp_path / "nowhere")))


# -- settings, parts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "imagenet"}, "dataset.name='imagenet' is not one of digits, mnist"),
        ({"name": "digits", "path": "a"}, "digits come with scikit-learn and have no path"),
        ({"name": "digits", "image_size": 28}, "image_size=28: digits are 8x8"),
        ({"name": "digits", "flip": True}, "flip=true makes no sense for digits"),
        ({"name": "mnist", "flip": True}, "flip=true makes no sense for mnist"),
        ({"name": "mnist", "mode": "RGB"}, "mode=RGB is for folders"),
        ({"name": "cifar10", "test_fraction": 0.5}, "test_fraction=0.5 is for folders"),
        ({"name": "mnist", "image_size": 2}, "image_size=2 must be at least 4"),
        ({"name": "folder"}, "folder needs path="),
        ({"name": "folder", "path": "a", "test_fraction": 0}, "test_fraction=0.* between 0 and 1"),
        ({"name": "folder", "path": "a", "mixed": "convert"}, "needs the size and the mode"),
        ({"name": "folder", "path": "a", "mixed": "stretch"}, "'stretch' is not one of refuse"),
        ({"name": "folder", "path": "a", "broken": "ignore"}, "'ignore' is not one of refuse"),
        ({"name": "mnist", "size": 3}, "unknown setting 'dataset.size'"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(ImageDataConfig, settings, where="dataset")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((3, 4, 4, 1)), np.zeros(3, int), "must be uint8"),
        (np.zeros((3, 4, 4, 2), np.uint8), np.zeros(3, int), "must be uint8 of shape"),
        (np.zeros((3, 4, 5, 1), np.uint8), np.zeros(3, int), "must be square, got 4x5"),
        (np.zeros((3, 4, 4, 1), np.uint8), np.zeros(2, int), "3 images need as many"),
    ],
)
def test_image_sets_are_checked(images, labels, message):
    with pytest.raises(ImageDataError, match=message):
        ImageSet(images, labels)


def test_the_hash_covers_pixels_and_labels():
    images, labels = RNG.integers(0, 256, (3, 4, 4, 1), np.uint8), np.arange(3)
    one = ImageSet(images, labels).sha256
    assert ImageSet(images.copy(), labels.copy()).sha256 == one
    assert ImageSet(images, labels[::-1].copy()).sha256 != one
    assert ImageSet(255 - images, labels).sha256 != one


def test_the_split_is_stratified_and_does_not_depend_on_other_classes():
    labels = np.array([0] * 10 + [1] * 30)
    train, test = stratified_test_rows(labels, 0.2)
    assert sorted([*train, *test]) == list(range(40))
    assert np.bincount(labels[test]).tolist() == [2, 6]
    _, fewer = stratified_test_rows(labels[:15], 0.2)
    assert [row for row in test if row < 10] == [row for row in fewer if row < 10]
