"""--weights: training starts from exactly these, or the run is refused in one line."""

import hashlib
import http.server
import socket
import threading
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from cifar10 import UsageError
from cifar10.models import weights
from cifar10.models.registry import build_model
from cifar10.plan import make_plan
from cifar10.run import checkpoint


def ensure_and_load(built: nn.Module, model: str, file: Path | str) -> list[str]:
    weights.ensure(str(file), model)
    return weights.load(built, model, str(file))


def refusal(model: str, file: Path | str) -> str:
    """The message with which weights are refused; the model is unchanged."""
    built = build_model(model, 0, 10)
    before = {name: value.clone() for name, value in built.state_dict().items()}
    with pytest.raises(UsageError) as caught:
        ensure_and_load(built, model, file)
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith("--weights ")
    return message


def other(model: str = "bn_cnn") -> dict[str, Tensor]:
    """Weights that differ from the model's initial ones."""
    generator = torch.Generator().manual_seed(9)
    state = build_model(model, 7, 10).state_dict()
    return {n: torch.randn(v.shape, generator=generator) if v.is_floating_point() else v + 5 for n, v in state.items()}


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def loaded(model: str, file: Path | str) -> tuple[nn.Module, list[str]]:
    built = build_model(model, 0, 10)
    return built, ensure_and_load(built, model, file)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_file_is_taken_whole_plain_or_portable(tmp_path, wrapped):
    state, file = other(), tmp_path / checkpoint.PORTABLE_FILE
    if wrapped:
        checkpoint.save_portable(tmp_path, state, {"step": 3, "recipe": {"epochs": 1}, "classes": ["a", "b"]})
    else:
        save(file, state)
    model, notes = loaded("bn_cnn", file)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert notes == [f"initial weights: {file}"]


def test_a_head_for_other_classes_keeps_its_initial_weights_and_that_is_reported(tmp_path):
    state = other()
    file = save(tmp_path / "imagenet.pt", {**state, "fc2.weight": torch.randn(1000, 128), "fc2.bias": torch.randn(1000)})
    model, notes = loaded("bn_cnn", file)
    fresh = build_model("bn_cnn", 0, 10).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh[name] if name.startswith("fc2.") else state[name]), name
    assert notes == [f"initial weights: {file}, but for its head of 1000 classes: fc2.weight is new, with 10"]


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in other().items() if key != name}


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (without("bn1.running_var"), "it has no bn1.running_var"),
        (without("fc2.bias"), "it has no fc2.bias"),
        ({**other(), "fc3.bias": torch.zeros(10)}, "it holds fc3.bias, which the model does not have"),
        ({**other(), "fc2.weight": torch.zeros(1000, 64)}, "fc2.weight is [1000, 64] there, [10, 128] here"),
        ({**other(), "fc2.weight": torch.zeros(1000, 128)}, "fc2.weight is [1000, 128] there"),  # with a bias for 10
        ({**other(), "fc1.bias": torch.full((128,), float("nan"))}, "fc1.bias holds values that are not finite"),
        (other("bn_cnn_wide"), "conv1.weight is [32, 3, 3, 3] there, [16, 3, 3, 3] here"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_first_difference(tmp_path, state, says):
    message = refusal("bn_cnn", save(tmp_path / "weights.pt", state))
    assert says in message


@pytest.mark.parametrize(
    "content", [[1, 2], {}, {"module": {}}, {"module": 5}, {"epoch": 3, "accuracy": 0.5}, torch.zeros(3), {"state": other()}]
)
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    assert "holds no state dict" in refusal("bn_cnn", save(tmp_path / "weights.pt", content))


class Trap:
    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_in_a_file_is_executed(tmp_path):
    Trap.path = tmp_path / "executed"
    assert "cannot be read as weights" in refusal("bn_cnn", save(tmp_path / "weights.pt", Trap()))
    assert not Trap.path.exists()


@pytest.mark.parametrize("name", ["absent.pt", "imagnet", "."])
def test_a_file_that_is_not_there_is_refused_before_anything_starts(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"^--weights {name} is not a file; choose "):
        make_plan(["--dataset", "synthetic", "--weights", name, "--output-dir", "run"], 1, "test")
    assert list(tmp_path.iterdir()) == []


# --- ImageNet ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty torch.hub cache -> the folder of downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "hub" / "checkpoints"


def pretend(monkeypatch, url: str) -> None:
    """Let `url` be that of torchvision's weights for every model."""
    monkeypatch.setattr(weights, "_imagenet_url", lambda model_name: url)


@pytest.fixture
def server(tmp_path):
    """A server of one file -> (address, content, requested paths)."""
    save(tmp_path / "served.pt", {**other(), "fc2.weight": torch.randn(1000, 128), "fc2.bias": torch.randn(1000)})
    content, asked = (tmp_path / "served.pt").read_bytes(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", content, asked
        running.shutdown()


def test_imagenet_is_downloaded_once_verified_and_read_from_the_cache(cache, monkeypatch, server, capfd):
    address, content, asked = server
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    pretend(monkeypatch, f"{address}/{name}")
    model, notes = loaded("bn_cnn", "imagenet")
    assert (cache / name).read_bytes() == content
    assert notes == ["initial weights: imagenet, but for its head of 1000 classes: fc2.weight is new, with 10"]
    assert torch.equal(model.conv1.weight, other()["conv1.weight"])
    assert asked == [f"/{name}"]
    printed = capfd.readouterr()
    assert printed.out == ""
    assert f"fetching ImageNet weights from {address}/{name}" in printed.err
    loaded("bn_cnn", "imagenet")
    assert asked == [f"/{name}"]
    (cache / name).write_bytes(content[:-1])  # damaged in the cache: downloaded again
    loaded("bn_cnn", "imagenet")
    assert asked == [f"/{name}"] * 2
    assert (cache / name).read_bytes() == content


def test_a_download_with_another_hash_is_refused_and_leaves_nothing(cache, monkeypatch, server):
    address, _, _ = server
    pretend(monkeypatch, f"{address}/net-0123abcd.pth")
    assert "hash" in refusal("bn_cnn", "imagenet")
    assert [path.name for path in cache.iterdir()] == [".net-0123abcd.pth.lock"]


def test_an_address_that_cannot_be_reached_is_refused_before_anything_starts(cache, monkeypatch, tmp_path):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        pretend(monkeypatch, f"http://127.0.0.1:{bound.getsockname()[1]}/vgg19-dcbb9e9d.pth")
        with pytest.raises(UsageError) as caught:
            make_plan(["--recipe", "vgg19", "--dataset", "synthetic", "--output-dir", str(tmp_path / "run")], 1, "test")
    message = str(caught.value)
    for words in ("--weights imagenet", "Connection refused", str(cache / "vgg19-dcbb9e9d.pth"), "choose --weights none"):
        assert words in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_imagenet_is_torchvisions_url_or_refused():
    assert weights._imagenet_url("vgg19") == torchvision.models.VGG19_Weights.IMAGENET1K_V1.url
    assert "torchvision has none for --model lenet" in refusal("lenet", "imagenet")


def test_torchvisions_vgg19_becomes_ours_but_for_the_head(tmp_path):
    with torch.device("meta"):
        shapes = torchvision.models.vgg19(num_classes=1000).state_dict()
    state = {name: torch.full(tensor.shape, 0.5 + number) for number, (name, tensor) in enumerate(shapes.items())}
    file = save(tmp_path / "vgg19-random.pth", state)
    del state
    with torch.device("meta"):
        empty = build_model("vgg19", 0, 10)
    model = empty.to_empty(device="cpu")
    nn.init.constant_(model.classifier[6].weight, -1.0)
    nn.init.constant_(model.classifier[6].bias, -2.0)
    notes = weights.load(model, "vgg19", str(file))
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        value = {"classifier.6.weight": -1.0, "classifier.6.bias": -2.0}.get(name, 0.5 + number)
        assert tensor.eq(value).all(), name
    assert notes == [f"initial weights: {file}, but for its head of 1000 classes: classifier.6.weight is new, with 10"]
    file.unlink()  # 575 MB


# --- the network and the images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "shape", "says"),
    [
        ("bn_cnn", (1, 28, 28), "grayscale images of 28x28 pixels"),
        ("mnist_cnn", (3, 32, 32), "color images of 32x32 pixels"),
        ("lenet", (3, 4, 4), "color images of 4x4 pixels"),
    ],
)
def test_a_network_for_other_images_is_refused(model, shape, says):
    with pytest.raises(UsageError, match=f"^--model {model} does not accept {says} .*choose another --model"):
        weights.check_shapes(build_model(model, 0, 10), model, shape, 10)


def test_a_network_for_other_classes_is_refused():
    with pytest.raises(UsageError, match="has 10 classes, expected 100"):
        weights.check_shapes(build_model("lenet", 0, 10), "lenet", (3, 32, 32), 100)


def test_checking_a_network_does_not_change_it():
    model, fresh = build_model("bn_cnn", 0, 10), build_model("bn_cnn", 0, 10).state_dict()
    weights.check_shapes(model, "bn_cnn", (3, 32, 32), 10)
    assert model.training
    assert all(torch.equal(value, fresh[name]) for name, value in model.state_dict().items())
