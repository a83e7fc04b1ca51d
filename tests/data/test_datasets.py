"""Data sets are what they describe; generated images; MNIST."""

import gzip
import hashlib
import io
import json
import struct
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cifar10 import UsageError
from cifar10.data import cifar, fashion_mnist, mnist, registry, svhn, synthetic
from cifar10.data.dataset import Images, description_from
from cifar10.data.download import Archive
from cifar10.data.registry import DATASETS
from cifar10.plan import Plan, make_plan
from tests.launching import PROJECT

GENERATED = sorted(name for name, dataset in DATASETS.items() if isinstance(dataset, synthetic.Generated))


def plan(*argv: str) -> Plan:
    return make_plan(list(argv), 1, "test")


def refusal(*argv: str) -> str:
    with pytest.raises(UsageError) as caught:
        plan(*argv)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_an_unknown_data_set_is_refused_with_the_nearest_name_and_the_help_has_all_names(capsys):
    assert "did you mean cifar10?" in refusal("--dataset", "cifar1")
    with pytest.raises(SystemExit):
        plan("--help")
    printed = capsys.readouterr().out
    assert all(name in printed for name in DATASETS)


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "folder"])
def test_every_description_has_mean_and_std_of_each_channel_and_survives_json(name):
    found = DATASETS[name].describe(Path("nowhere"))
    assert len(found.mean) == len(found.std) == found.channels
    assert len(set(found.classes)) == len(found.classes)
    assert description_from(json.loads(json.dumps(asdict(found)))) == found


@pytest.mark.parametrize("change", [{"train_images": "many"}, {"size": 0}, {"classes": []}, {"classes": [1, 2]}, {"hue": 3}])
def test_an_invalid_description_is_refused(change):
    values = asdict(synthetic.SYNTHETIC.description) | change
    with pytest.raises((TypeError, ValueError)):
        description_from(values)


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize("split", ["train", "test"])
def test_generated_images_have_the_sizes_and_shapes_that_are_stated(name, split, tmp_path):
    images, facts = registry.find(name).load(split, tmp_path, seed=0), DATASETS[name].describe(tmp_path)
    assert images.pixels.shape == (facts.num_images(split), facts.size, facts.size, facts.channels)
    assert (images.pixels.dtype, images.labels.dtype) == (np.uint8, np.int64)
    assert images.pixels.flags["C_CONTIGUOUS"]
    assert set(images.labels.tolist()) == set(range(10))


@pytest.mark.parametrize(
    ("generate", "digest"),
    [(synthetic.synthetic, "824cbf15d87e"), (synthetic.synthetic_grey, "fef122470a38"), (synthetic.noise, "c55902a46f2a")],
)
def test_a_generated_image_is_a_function_of_seed_split_and_index_on_every_platform(generate, digest):
    """The digests are fixed: otherwise results of two machines could not be compared."""
    whole, part = generate("train", 1_100, 3), generate("train", 1_001, 3)
    assert np.array_equal(whole.pixels[:1_001], part.pixels)
    assert np.array_equal(whole.labels[:1_001], part.labels)
    for other in (generate("train", 1_100, 4), generate("test", 1_100, 3)):
        assert not (whole.pixels == other.pixels).all(axis=(1, 2, 3)).any()
    assert hashlib.sha256(generate("train", 100, 0).pixels.tobytes()).hexdigest()[:12] == digest
    assert generate("train", 0, 0).pixels.shape[0] == 0


def nearest_mean(train: Images, test: Images) -> float:
    """The accuracy of a classifier by the nearest class mean."""
    rows, questions = (images.pixels.reshape(len(images), -1).astype(np.float32) for images in (train, test))
    means = np.stack([rows[train.labels == label].mean(axis=0) for label in range(10)])
    distances = (means**2).sum(axis=1) - 2 * questions @ means.T  # [N, 10], up to a constant per row
    return float((distances.argmin(axis=1) == test.labels).mean())


def test_synthetic_classes_can_be_learned_though_not_trivially_and_noise_cannot():
    """Seeds share the classes."""
    generators = (synthetic.synthetic, synthetic.synthetic_grey, synthetic.noise)
    color, gray, noise = (nearest_mean(generate("train", 2_000, 0), generate("test", 1_000, 1)) for generate in generators)
    assert 0.2 < color < 0.6
    assert 0.2 < gray < 0.6
    assert noise == pytest.approx(0.1, abs=5 * (0.09 / 1_000) ** 0.5)


def test_noise_is_uniform_in_pixels_and_labels():
    images = synthetic.noise("train", 10_000, 0)
    for values, kinds in ((images.pixels, 256), (images.labels, 10)):
        counts, expected = np.bincount(values.ravel(), minlength=kinds), values.size / kinds
        square = ((counts - expected) ** 2 / expected).sum()
        assert abs(square - (kinds - 1)) < 5 * (2 * (kinds - 1)) ** 0.5


# --- on the command line ----------------------------------------------------------------------------------------------

REAL = ["--recipe", "mnist_synthetic", "--dataset", "mnist"]
GRAY = ["--mean", "0.1307", "--std", "0.3081"]


def test_a_normalization_for_other_channels_is_refused_with_what_to_use():
    message = refusal("--dataset", "synthetic_mnist", "--model", "mnist_cnn")
    assert "--dataset synthetic_mnist" in message
    assert "--mean 0.1307 --std 0.3081" in message
    assert "--mean 0.4914 0.4822 0.4465 --std 0.2023 0.1994 0.201" in refusal(*REAL, "--dataset", "synthetic")
    assert "--mean: 0.5, expected 3" in refusal("--dataset", "synthetic", "--mean", "0.5")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--val-images 10000", "expected 0 to 9999"),
        ("--test-images 2001", "expected 0 to 2000"),
        ("--global-batch-size 9001 --val-images 1000", "larger than the 9000 training images"),
        ("--image-size 29", "for example --image-size 28"),
        ("--augment=RandomCrop(28,reflect)", "RandomCrop(28, reflect): padding must be from 0 to 27"),
        ("--augment=RandomCrop(20,reflect) --first-sizes 16 --first-epochs 1", "from 0 to 15"),
    ],
)
def test_each_data_set_has_its_own_limits(argv, says):
    assert says in refusal("--dataset", "synthetic_mnist", *GRAY, "--val-images", "0", *argv.split())


def test_a_file_of_weights_names_the_data_sets_own_classes():
    assert plan("--dataset", "synthetic").about_the_model["classes"] == list(cifar.CIFAR10.description.classes)
    gray = plan("--dataset", "synthetic_mnist", *GRAY, "--val-images", "0").about_the_model
    assert gray["classes"] == [str(digit) for digit in range(10)]
    assert gray["normalization"] == {"mean": [0.1307], "std": [0.3081]}


def test_random_labels_are_announced():
    argv = [*GRAY, "--val-images", "0"]
    assert any("memorizing" in note for note in plan("--dataset", "random_mnist", *argv).notes)
    assert not any("memorizing" in note for note in plan("--dataset", "synthetic_mnist", *argv).notes)


@pytest.mark.parametrize(
    ("argv", "image_shape", "augments"),
    [
        ("", (3, 32, 32), True),
        ("--augment none --image-size 30", (3, 30, 30), False),
        ("--augment none --resize 40", (3, 40, 40), False),
        ("--augment RandomCrop(0) --resize 256 --image-size 224", (3, 224, 224), True),
        ("--augment Cutout(4)", (3, 32, 32), True),
        ("--augment none --first-sizes 24 --first-epochs 1", (3, 32, 32), True),
    ],
)
def test_the_networks_input_and_whether_it_is_augmented(argv, image_shape, augments):
    found = plan("--dataset", "synthetic", *argv.split())
    assert (found.image_shape, found.recipe.is_augmented) == (image_shape, augments)


# --- MNIST ------------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    """MNIST's file format."""
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    """Files in MNIST's format, of fewer images: noise with labels 0, 1, ... 9, 0, ..."""
    rng, files = np.random.default_rng(0), {}
    for prefix, count in (("train", 600), ("t10k", 100)):
        files[f"{prefix}-images-idx3-ubyte"] = idx(rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        files[f"{prefix}-labels-idx1-ubyte"] = idx((np.arange(count) % 10).astype(np.uint8))
    return files


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def archives(contents, monkeypatch) -> dict[str, bytes]:
    """The archives of these files, which are taken to be MNIST's."""
    archives = {f"{name}.gz": gzip.compress(content, 1) for name, content in contents.items()}
    known = {"archives": tuple(Archive(name, len(content), md5(content)) for name, content in archives.items())}
    known |= {"files": {name: md5(content) for name, content in contents.items()}, "sources": ()}
    small = replace(mnist.MNIST.description, train_images=600, test_images=100)
    monkeypatch.setitem(DATASETS, "mnist", replace(mnist.MNIST, description=small, **known))
    return archives


@pytest.fixture
def work(archives, tmp_path, monkeypatch) -> Path:
    """An empty working folder, and no source."""
    monkeypatch.delenv("CIFAR10_DIR", raising=False)
    monkeypatch.delenv("MNIST_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


RAW = "data/MNIST/raw"
REAL += ["--val-images", "0"]


def test_the_facts_of_mnist_are_torchvisions():
    from torchvision.datasets import MNIST

    assert [(archive.name, archive.md5) for archive in mnist.MNIST.archives] == MNIST.resources
    assert [f"{source}/" for source in mnist.MNIST.sources] == MNIST.mirrors


def test_the_real_mnist_is_torchvisions(real_data_dir):
    from torchvision.datasets import MNIST

    if not (real_data_dir / "MNIST").is_dir():
        pytest.skip("needs MNIST in MNIST/raw beside the real CIFAR-10")
    mnist.MNIST.ensure(real_data_dir, need_test=True)
    for split in ("train", "test"):
        images, theirs = mnist.MNIST.load(split, real_data_dir), MNIST(real_data_dir, train=split == "train")
        assert np.array_equal(images.pixels[..., 0], theirs.data.numpy())
        assert np.array_equal(images.labels, theirs.targets.numpy())


@pytest.mark.parametrize("given", ["data", "data/MNIST", "data/MNIST/raw"])
def test_mnist_is_read_and_nothing_is_written(work, contents, given):
    write(work / RAW, contents)
    before = sorted(path.name for path in work.rglob("*"))
    found = plan(*REAL, "--data-dir", given)
    for split, prefix, count in (("train", "train", 600), ("test", "t10k", 100)):
        images = found.images(split)
        assert images.pixels.shape == (count, 28, 28, 1)
        assert images.pixels.tobytes() == contents[f"{prefix}-images-idx3-ubyte"][16:]
        assert images.labels.tolist() == [n % 10 for n in range(count)]
    assert sorted(path.name for path in work.rglob("*")) == before


def test_mnist_is_checked_without_torch():
    source = "import sys, cifar10.data.registry; print(sorted({'torch', 'torchvision'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", source], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_no_mnist_and_no_network_is_refused_with_the_remedies(work, capfd):
    message = refusal(*REAL)
    assert all(words in message for words in ("no MNIST in data", "MNIST_URL", "--data-dir", "--dataset synthetic_mnist"))
    assert capfd.readouterr().out == ""
    assert not [path for path in (work / "data").rglob("*ubyte*")]


@pytest.mark.parametrize("there", [RAW, "data"])
def test_missing_files_are_unpacked_from_archives_that_lie_there(work, archives, contents, there):
    write(work / there, archives)
    assert len(plan(*REAL).images("test")) == 100
    assert all((work / RAW / name).read_bytes() == content for name, content in contents.items())


def test_mnist_is_fetched_archive_by_archive_from_the_folder_of_a_server(work, archives, contents, monkeypatch):
    monkeypatch.setenv("MNIST_URL", write(work / "server", archives).as_uri())
    assert len(plan(*REAL).images("test")) == 100
    written = {path.name: path.read_bytes() for path in (work / RAW).iterdir() if not path.name.startswith(".")}
    assert written == archives | contents


@pytest.mark.parametrize("name", ["t10k-images-idx3-ubyte", "train-labels-idx1-ubyte"])
@pytest.mark.parametrize("how", ["missing", "truncated", "longer", "altered"])
def test_a_damaged_file_of_mnist_is_named_with_the_remedies_or_restored(work, contents, archives, name, how):
    file = write(work / RAW, contents) / name
    content = contents[name]
    damages = {"truncated": content[:50], "longer": content + b"!", "altered": content[:-1] + b"!"}
    file.unlink() if how == "missing" else file.write_bytes(damages[how])
    assert f"damaged: {name} (" in refusal(*REAL)
    (work / RAW / f"{name}.gz").write_bytes(archives[f"{name}.gz"])
    plan(*REAL)
    assert file.read_bytes() == content


# --- Fashion-MNIST and SVHN -------------------------------------------------------------------------------------------


def test_the_facts_of_fashion_mnist_and_svhn_are_torchvisions():
    from torchvision.datasets import SVHN, FashionMNIST

    assert [(archive.name, archive.md5) for archive in fashion_mnist.FASHION_MNIST.archives] == FashionMNIST.resources
    assert [name.lower() for name in FashionMNIST.classes] == [
        name.lower() for name in fashion_mnist.FASHION_MNIST.description.classes
    ]
    for split in ("train", "test"):
        url, name, digest = SVHN.split_list[split]
        assert svhn.SVHN.split_files[split] == (name,)
        assert svhn.SVHN.files[name] == digest
        assert svhn.SVHN.urls(svhn.SVHN.archive_of(name)) == [url]


def on_a_server(monkeypatch, work: Path, name: str, dataset: Any, contents: dict[str, bytes], **sizes: int) -> None:
    """`contents` are taken to be the data set's files, and lie on a server."""
    known = {"archives": tuple(Archive(file, len(content), md5(content), b"") for file, content in contents.items())}
    known |= {"files": {file: md5(content) for file, content in contents.items()}, "sources": ()}
    description = replace(dataset.description, train_images=sizes["train"], test_images=sizes["test"])
    monkeypatch.setitem(DATASETS, name, replace(dataset, description=description, **known))
    monkeypatch.setenv(f"{name.upper()}_URL", write(work / "server", contents).as_uri())


def test_fashion_mnist_is_fetched_and_read_as_torchvision_reads_it(work, archives, contents, monkeypatch):
    on_a_server(monkeypatch, work, "fashion_mnist", fashion_mnist.FASHION_MNIST, archives, train=600, test=100)
    found = plan("--recipe", "mnist_synthetic", "--dataset", "fashion_mnist", "--val-images", "0", "--max-steps", "1")
    for split, prefix in (("train", "train"), ("test", "t10k")):
        assert found.images(split).pixels.tobytes() == contents[f"{prefix}-images-idx3-ubyte"][16:]
        assert found.images(split).labels.tolist() == [n % 10 for n in range(len(found.images(split)))]
    assert found.dataset.classes[9] == "ankle boot"


def test_svhn_is_fetched_and_read_as_torchvision_reads_it(work, monkeypatch):
    scipy_io = pytest.importorskip("scipy.io")
    from torchvision.datasets import SVHN

    contents = {}
    for split, count in (("train", 60), ("test", 20)):
        buffer, rng = io.BytesIO(), np.random.default_rng(count)
        pixels = rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        scipy_io.savemat(buffer, {"X": pixels, "y": (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]})
        contents[f"{split}_32x32.mat"] = buffer.getvalue()
    on_a_server(monkeypatch, work, "svhn", svhn.SVHN, contents, train=60, test=20)
    found = plan("--dataset", "svhn", "--val-images", "0", "--global-batch-size", "20", "--max-steps", "1")
    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)
    for split in ("train", "test"):
        theirs = SVHN("data", split=split)
        assert np.array_equal(found.images(split).pixels.transpose(0, 3, 1, 2), theirs.data)
        assert np.array_equal(found.images(split).labels, theirs.labels)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert "--extra svhn" in refusal("--dataset", "svhn", "--val-images", "0", "--global-batch-size", "20")
