"""Every network trains, resumes bit for bit and is exported at every ZeRO stage; options, checkpointing, freezing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar10 import UsageError
from cifar10.engine.engine import Engine, checkpoint_blocks
from cifar10.models import weights
from cifar10.models.registry import arguments_of, build_model, model_names, source_file
from cifar10.plan import make_plan
from tests.helpers import batch, make_engine, one_rank, one_step, same_bits
from tests.small_trained import command, train_all

SHAPES = {"mnist_cnn": (1, 28, 28)}
NEW = ["densenet121", "resnet9", "resnet18", "vit_tiny"]  # small enough for a test on two cores
OTHERS = ["torchvision:mobilenet_v3_small", "torchvision:regnet_x_400mf"]
IMAGES = 4  # a micro-batch
THREE = pytest.param(3, marks=pytest.mark.slow)  # DeepSpeed's stage 3 takes seconds to set up


class Small(nn.Module):
    """Blocks with BatchNorm, without, and with dropout, in one small network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4)
        self.layers = nn.Sequential(self.block(nn.BatchNorm2d(8)), self.block(nn.Dropout(0.3)), self.block(nn.GroupNorm(2, 8)))
        self.fc = nn.Linear(8, 10)

    @staticmethod
    def block(middle: nn.Module) -> nn.Module:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.middle = nn.Conv2d(8, 8, 3, padding=1), middle

            def forward(self, x: Tensor) -> Tensor:
                return x + F.relu(self.middle(self.conv(x)))

        return Block()

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.layers(self.stem(images)).mean(dim=(2, 3)))


def small(train_only: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = Small()
    weights.freeze(model, train_only)
    return model


def engine_of(model: nn.Module, stage: int = 0, accumulation: int = 1) -> Engine:
    engine = make_engine(
        one_rank(), model, global_images=IMAGES * accumulation, accumulation=accumulation, zero_optimization={"stage": stage}
    )
    engine.train()
    return engine


def steps(engine: Engine, *seeds: int) -> None:
    for seed in seeds:
        one_step(engine, [batch(IMAGES, seed)], multiplier=0.1)


# --- every network ----------------------------------------------------------------------------------------------------


def resumed_alike(build: Callable[[int], nn.Module], stage: int) -> None:
    """Three steps are the same steps when the last begins in another engine, from the first one's state."""
    first, second = (engine_of(build(seed), stage) for seed in (0, 1))
    steps(first, 1, 2)
    state = first.full_state()
    steps(first, 3)
    second.restore(state)
    steps(second, 3)
    ours, theirs = first.portable_state(), second.portable_state()
    assert same_bits(ours, theirs)
    assert not same_bits(ours, build(0).state_dict())
    assert all(value.isfinite().all() for value in ours.values())


@pytest.mark.parametrize("stage", [0, THREE])
def test_a_network_with_random_layers_resumes_bit_for_bit(stage: int) -> None:
    resumed_alike(lambda seed: small(), stage)


LARGE = {"densenet121", "resnet34", "resnet50", "wrn28_10", *OTHERS}
NETWORKS = [*(name for name in model_names() if name not in SHAPES and name != "vgg19"), *OTHERS]
CELLS = [(name, stage) for name in NETWORKS for stage in ((0, 3) if name in LARGE else (0, 1, 2, 3))]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), CELLS)
def test_every_network_resumes_bit_for_bit(name: str, stage: int) -> None:
    """At each ZeRO stage; the large ones where nothing is divided, and where everything is."""
    options = {"resnet9": {"dropout": 0.2}, "vit_tiny": {"dropout": 0.2, "drop_path": 0.2}}.get(name, {})
    resumed_alike(lambda seed: build_model(name, seed, 10, **options), stage)


def test_dropout_and_drop_path_draw_by_step() -> None:
    for options in ({"dropout": 0.5}, {"drop_path": 0.5}):
        engine = engine_of(build_model("vit_tiny", 0, 10, **options))
        images = batch(4)[0]
        torch.manual_seed(5)
        first = engine.forward(images)
        torch.manual_seed(6)
        assert torch.equal(engine.forward(images), first), "of the step, whatever random state there was"
        engine.deepspeed.global_steps += 1
        assert not torch.equal(engine.forward(images), first)


# --- options, libraries, refusals -------------------------------------------------------------------------------------


def refusal(*flags: str) -> str:
    with pytest.raises(UsageError) as caught:
        make_plan([*flags, "--dataset", "synthetic"], 1, "x")
    return str(caught.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model bn_cnn --dropout 0.1", ["--dropout", "bn_cnn", "resnet9", "vit_tiny"]),
        ("--model resnet18 --drop-path 0.1", ["--drop-path", "resnet18", "vit_tiny"]),
        ("--model resnet9 --dropout 1", ["--dropout", "1"]),
        ("--model torchvision:resnet19", ["torchvision:resnet19", "resnet18"]),
        ("--model torchvision", ["torchvision:NAME"]),
        ("--model resnet18:x", ["resnet18:x"]),
        ("--model nowhere:x", ["nowhere:x"]),
        ("--model vit_tiny --gradient-checkpointing --engine-level compile", ["--engine-level eager"]),
    ],
)
def test_what_a_network_does_not_have_is_refused_with_what_does(flags: str, words: list[str], monkeypatch) -> None:
    monkeypatch.setattr("cifar10.distributed.device.missing_for_compiling", lambda: "")
    message = refusal(*flags.split())
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("torchvision:squeezenet1_1", (3, 64, 64), {}),
        ("torchvision:convnext_tiny", (3, 32, 32), {"drop_path": 0.2}),
        ("torchvision:googlenet", (3, 64, 64), {"dropout": 0.1}),
        ("torchvision:densenet121", (3, 64, 64), {"dropout": 0.1}),
        ("resnet34", (1, 28, 28), {}),
        ("resnet50", (3, 64, 64), {}),
        ("wrn28_10", (1, 28, 28), {"dropout": 0.3}),
        ("vit_tiny", (3, 48, 48), {"drop_path": 0.1}),
    ],
)
def test_a_network_is_built_for_the_images_with_a_new_head(name, shape, options) -> None:
    with torch.device("meta"):
        model = build_model(name, 0, 7, shape, **options)
        assert model.eval()(torch.zeros(2, *shape)).shape == (2, 7)
    assert {*options} <= {*arguments_of(name, 7, shape, **options)}
    assert source_file(name).is_file()


@pytest.mark.parametrize(
    ("name", "shape", "options", "word"),
    [
        ("torchvision:resnet18", (3, 32, 32), {"dropout": 0.1}, "dropout"),
        ("torchvision:resnet18", (1, 28, 28), {}, "grayscale"),
        ("torchvision:inception_v3", (3, 32, 32), {}, "32x32"),
        ("torchvision:vit_b_16", (3, 32, 32), {}, "32x32"),
        ("vit_tiny", (3, 30, 30), {}, "30x30"),
        ("vit_tiny", (1, 28, 28), {}, "grayscale"),
    ],
)
def test_images_and_options_that_do_not_fit_are_one_line(name, shape, options, word) -> None:
    with pytest.raises(UsageError, match=word), torch.device("meta"):
        weights.check_shapes(build_model(name, 0, 10, shape, **options), name, shape, 10)


def test_timms_networks_are_built_where_timm_is_there() -> None:
    pytest.importorskip("timm")
    for name, shape, options in (("resnet10t", (1, 28, 28), {}), ("vit_tiny_patch16_224", (3, 32, 32), {"drop_path": 0.1})):
        model = build_model(f"timm:{name}", 0, 7, shape, **options)
        assert model.eval()(torch.zeros(2, *shape)).shape == (2, 7)
    assert "resnet10t" in refusal("--model", "timm:resnet10x")


def test_without_timm_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    assert "--extra timm" in refusal("--model", "timm:resnet10t")


# --- gradient checkpointing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, THREE])
def test_checkpointing_changes_no_bit_and_counts_statistics_once(stage: int) -> None:
    """Weights, BatchNorm's statistics and dropout's draws after two steps of two micro-batches."""
    plain, saving = small(), small()
    checkpoint_blocks(saving, "small")
    engines = [engine_of(model, stage, accumulation=2) for model in (plain, saving)]
    for engine in engines:
        for seed in (1, 3):
            one_step(engine, [batch(IMAGES, seed), batch(IMAGES, seed + 1)])
    states = [engine.portable_state() for engine in engines]
    assert same_bits(*states)
    assert states[1]["layers.0.middle.num_batches_tracked"] == 4


def kept_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once: autograd's, and the inputs of blocks."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for block in model.layers:
        block.register_forward_pre_hook(lambda _, inputs: (keep(inputs[0]), None)[1])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(images).sum()
    return sum(kept.values())


def test_deepspeeds_key_keeps_the_inputs_of_blocks_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else: what a block saves itself is computed again."""
    packed: list[Tensor] = []

    def keeping() -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (packed.append(tensor), tensor)[1], lambda tensor: tensor
        )

    monkeypatch.setattr("cifar10.engine.engine.save_on_cpu", keeping)
    model, inputs = small(), []
    checkpoint_blocks(model, "small", {"cpu_checkpointing": True})
    for block in model.layers:
        block.register_forward_pre_hook(lambda _, given: inputs.append(given[0].data_ptr()))
    model.train()(batch(8)[0]).sum().backward()
    assert [tensor.data_ptr() for tensor in packed if tensor.numel()] == inputs  # PyTorch 2.11 keeps an empty one beside each


def test_checkpointing_keeps_less_memory() -> None:
    plain, saving, images = small(), small(), batch(64)[0]
    checkpoint_blocks(saving, "small")
    assert kept_bytes(saving, images) < 0.7 * kept_bytes(plain, images)


@pytest.mark.parametrize(
    ("name", "blocks"), [("resnet18", 8), ("resnet9", 3), ("vit_tiny", 12), ("wrn28_10", 12), ("densenet121", 4)]
)
def test_the_blocks_of_each_network_are_found(name: str, blocks: int) -> None:
    with torch.device("meta"):
        model = build_model(name, 0, 10)
    checkpoint_blocks(model, name)
    assert sum("forward" in vars(module) for module in model.modules()) == blocks


def test_a_network_without_blocks_is_refused() -> None:
    for section, key in ((None, "--gradient-checkpointing"), ({}, "activation_checkpointing")):
        with pytest.raises(UsageError, match=rf"{key}.*bn_cnn.*no blocks"):
            checkpoint_blocks(build_model("bn_cnn", 0, 10), "bn_cnn", section)


# --- training only some parameters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2, THREE])
@pytest.mark.parametrize("train_only", ["head", "layers.1.* head"])
def test_frozen_parameters_and_statistics_stay_and_checkpoints_are_complete(stage: int, train_only: str) -> None:
    engine, start = engine_of(small(train_only), stage), small().state_dict()
    trained = {name for name, parameter in small(train_only).named_parameters() if parameter.requires_grad}
    steps(engine, 1, 2)
    state = engine.full_state()
    after = engine.portable_state()
    assert after.keys() == start.keys() == {**state["parameters"], **state["buffers"][0]}.keys()
    assert {name for name in start if not torch.equal(after[name], start[name])} == trained
    assert all(values.keys() == trained for values in state["optimizer"].values())
    assert state["optimizer"]
    other = engine_of(small(train_only), stage)
    other.restore(state)
    for one in (engine, other):
        steps(one, 3)
    assert same_bits(engine.portable_state(), other.portable_state())


def test_what_is_trained_is_counted_and_an_unknown_name_is_refused() -> None:
    model = build_model("resnet18", 0, 10)
    assert "5,130 of 11,173,962 parameters are trained" in weights.freeze(model, "head")[0]
    with pytest.raises(UsageError, match=r"--train-only laier4\.\*: .*head.*layer4"):
        weights.freeze(model, "laier4.*")
    assert weights.freeze(model, None) == []


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds a run of each network, of two steps."""
    flags = (
        "--recipe bn_cnn --dataset synthetic --val-images 20 --test-images 20 --threads 1 --max-steps 2 --global-batch-size 8"
    )
    base = tmp_path_factory.mktemp("networks")
    train_all(base, {name.replace(":", " "): f"{flags} --global-batch-size 8 --model {name}" for name in [*NEW, *OTHERS]})
    return base


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NEW, *OTHERS])
def test_a_network_is_trained_evaluated_predicted_and_exported(name: str, trained: Path) -> None:
    run = trained / name.replace(":", " ")
    assert command("evaluate", run, "--threads", 1, "--images", 20) == 0
    assert command("export", run, "--formats", "safetensors", "onnx", "--test-images", 20, "--threads", 1) == 0
