"""What is resolved before anything starts: precision, SyncBatchNorm, learning rate scaling, the log interval."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from cifar10 import UsageError
from cifar10 import plan as plan_module
from cifar10.config import cli
from cifar10.config.recipe import Experiment, Recipe
from cifar10.distributed import device
from cifar10.plan import Plan, choose_precision, make_plan
from tests.launching import run

SGD = {"type": "SGD", "params": {"lr": 0.1}}


def plan(*argv: str, world_size: int = 1) -> Plan:
    return make_plan(["--dataset", "synthetic", *argv], world_size, "a test")


def precision_of(made: Plan) -> str:
    """What the JSON that DeepSpeed will see asks for."""
    autocast = made.ds_config.get("torch_autocast", {})
    assert not any(made.ds_config.get(section, {}).get("enabled") for section in ("fp16", "bf16"))
    return {"bfloat16": "bf16", "float16": "fp16"}[autocast["dtype"]] if autocast.get("enabled") else "fp32"


def about_precision(made: Plan) -> list[str]:
    return [note for note in made.notes if note.startswith("precision:")]


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU that computes in fp32 and bf16; `native.setattr(device, "native_precisions", ...)` makes it another one."""
    monkeypatch.setattr(device, "native_precisions", lambda: ("fp32", "bf16"))
    monkeypatch.setattr(device, "name", lambda: "GPU")
    return monkeypatch


@pytest.fixture
def json_file(tmp_path: Path) -> Path:
    """A DeepSpeed JSON that asks for bf16."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"train_batch_size": 32, "optimizer": SGD, "bf16": {"enabled": True}}))
    return path


# --- which precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "taken", "num_notes"),
    [
        ((), None, 0),
        (("fp32",), "fp32", 0),
        (("fp16",), "fp16", 0),  # one alone is taken as it is, native or not
        (("bf16", "fp16", "fp32"), "bf16", 1),
        (("fp16", "bf16"), "bf16", 1),
        (("fp16", "fp32", "bf16"), "fp32", 1),
    ],
)
def test_of_several_precisions_the_first_that_is_native_is_taken(native, wanted, taken, num_notes):
    precision, notes = choose_precision(wanted)
    assert (precision, len(notes)) == (taken, num_notes)
    assert all(", ".join(wanted) in note for note in notes)


def test_where_none_is_native_the_list_is_refused_with_what_to_add(native):
    native.setattr(device, "native_precisions", lambda: ("fp32",))
    with pytest.raises(UsageError, match=r"--precision.* bf16 fp16.*fp32"):
        plan("--precision", "bf16", "fp16")
    assert precision_of(plan("--precision", "bf16", "fp16", "fp32")) == "fp32"


@pytest.fixture
def intel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without GPUs, whose CPU claims native bf16 and fp16."""
    monkeypatch.setattr(device, "count_gpus", lambda: 0)
    monkeypatch.setattr(device, "_cpu_flags", lambda: {"avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16"})


@pytest.mark.parametrize(
    "recipe", ["mnist_synthetic", "slurm_zero2 --dataset synthetic", "vgg19 --weights none --dataset synthetic"]
)
def test_a_cpu_that_claims_native_fp16_trains_in_bf16(intel, recipe):
    made = make_plan(f"--recipe {recipe}".split(), 2, "main.py")
    assert precision_of(made) == "bf16"
    assert precision_of(plan("--precision", "fp16", "fp32")) == "fp32"


def test_fp16_on_a_cpu_is_taken_if_asked_for_by_name_with_a_note_on_its_cost(intel):
    asked = plan("--precision", "fp16")
    assert precision_of(asked) == "fp16"
    assert any("fp16 on a CPU" in note and "--precision bf16" in note for note in asked.notes)
    assert not any("fp16" in note for note in plan("--precision", "bf16").notes)


@pytest.mark.parametrize(
    ("argv", "due"),
    [
        ("", "fp32"),
        ("--precision fp16", "fp16"),
        ("--precision fp16 bf16 fp32", "bf16"),
        ("--no-amp", "fp32"),
        ("--precision bf16 --no-amp", "fp32"),
        ("--deepspeed_config JSON", "bf16"),
        ("--deepspeed_config JSON --no-amp", "fp32"),
        ("--deepspeed_config JSON --precision fp16", "fp16"),
    ],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_command_line_beats_the_json(native, json_file, argv, due, world_size):
    made = plan(*argv.replace("JSON", str(json_file)).split(), world_size=world_size)
    assert precision_of(made) == due
    assert len(about_precision(made)) == ("fp16 bf16 fp32" in argv)


@pytest.mark.parametrize(
    ("argv", "due", "num_notes"),
    [
        ("", "bf16", 1),
        ("--precision fp32", "fp32", 0),
        ("--no-amp", "fp32", 0),
        ("--deepspeed_config JSON", "bf16", 0),
        ("--deepspeed-config=FP32", "fp32", 0),  # the recipe's preference goes with the recipe's own JSON
        ("--deepspeed_config FP32 --precision fp16 bf16", "bf16", 1),
    ],
)
def test_a_recipes_preference_goes_with_its_own_json(native, json_file, tmp_path, argv, due, num_notes):
    (tmp_path / "fp32.json").write_text(json.dumps({"train_batch_size": 32, "optimizer": SGD}))
    small = Recipe(epochs=1, warmup_epochs=0, val_images=0)
    own = Experiment(small, {"train_batch_size": 32, "optimizer": SGD}, precision=("fp16", "bf16", "fp32"))
    for module in (cli, plan_module):
        native.setattr(module, "load", lambda name: own)
    made = plan(*argv.replace("JSON", str(json_file)).replace("FP32", str(tmp_path / "fp32.json")).split())
    assert precision_of(made) == due
    assert len(about_precision(made)) == num_notes


@pytest.mark.parametrize("argv", ["--precision fp64", "--precision bf16 fp8", "--precision="])
def test_an_unknown_precision_is_refused(argv):
    with pytest.raises(UsageError, match="--precision"):
        plan(*argv.split())


# --- what this machine computes in ----------------------------------------------------------------------------------------

CPUS = {
    "x86, plain": ("processor\t: 0\nflags\t\t: fpu sse2 avx2 avx512f avx512_vnni\n", ("fp32",)),
    "x86, bf16": ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16\nflags\t\t: fpu\n", ("fp32", "bf16")),
    "arm": ("processor\t: 0\nFeatures\t: fp asimd fphp asimdhp bf16\n", ("fp32", "bf16")),
    "no flags": ("processor\t: 0\nmodel name\t: bf16 asimdhp\n", ("fp32",)),
    "absent": (None, ("fp32",)),
}


@pytest.mark.parametrize("cpu", CPUS)
def test_a_cpus_precisions_are_read_from_its_flags(cpu, tmp_path, monkeypatch):
    text, due = CPUS[cpu]
    cpuinfo = tmp_path / "cpuinfo"
    if text is not None:
        cpuinfo.write_text(text)
    monkeypatch.setattr(device, "Path", lambda path: cpuinfo if path == "/proc/cpuinfo" else Path(path))
    monkeypatch.setattr(device, "count_gpus", lambda: 0)
    assert device.native_precisions() == due
    assert device.name() == "CPU"


@pytest.mark.parametrize(("capability", "due"), [((7, 5), ("fp32", "fp16")), ((8, 0), ("fp32", "fp16", "bf16"))])
def test_a_gpus_precisions_are_those_of_its_generation(capability, due, monkeypatch):
    monkeypatch.setattr(device, "count_gpus", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert device.native_precisions() == due
    assert device.name() == "GPU"


# --- BatchNorm over all ranks ---------------------------------------------------------------------------------------------


def test_sync_bn_on_a_cpu_is_refused_in_one_line(tmp_path):
    flags = ["--dataset", "synthetic", "--sync-bn", "--output-dir", str(tmp_path / "run")]
    process = run([sys.executable, "cifar10_deepspeed.py", *flags])
    assert (process.returncode, process.stdout) == (2, "")
    assert re.fullmatch("error: --sync-bn .*GPUs.*\n", process.stderr)
    assert not (tmp_path / "run").exists()


def test_sync_bn_on_gpus_is_allowed(monkeypatch):
    monkeypatch.setattr(device, "count_gpus", lambda: 2)
    assert plan("--sync-bn", world_size=2).recipe.sync_bn


# --- the learning rate and the batch --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reference", "images", "due"), [(0, 256, 1), (128, 128, 1), (128, 256, 2), (256, 32, 0.125)])
def test_the_linear_scaling_rule(reference, images, due):
    assert Recipe(epochs=1, warmup_epochs=0, val_images=0, lr_reference_batch=reference).lr_scale(images) == due


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_linear_scaling_rule_is_noted_where_it_is_used(world_size):
    """It follows the global batch, not the number of ranks; the JSON's own rate stays in the settings."""
    scaled = plan("--lr-reference-batch", "128", "--global-batch-size", "256", "--lr", "0.1", world_size=world_size)
    (note,) = (note for note in scaled.notes if note.startswith("learning rate"))
    assert "256 / 128" in note
    assert scaled.ds_config["optimizer"]["params"]["lr"] == 0.1
    assert not any(note.startswith("learning rate") for note in plan("--global-batch-size", "256").notes)


# --- the log interval ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps_per_print", "argv", "due"),
    [(None, "", 100), (7, "", 7), (7, "--log-every-steps 3", 3), (None, "--log-every-steps 3", 3)],
)
def test_steps_per_print_is_the_log_interval_unless_a_flag_sets_another(json_file, steps_per_print, argv, due):
    given = {} if steps_per_print is None else {"steps_per_print": steps_per_print}
    json_file.write_text(json.dumps({"train_batch_size": 32, "optimizer": SGD, **given}))
    assert plan("--deepspeed_config", str(json_file), *argv.split()).options.log_every_steps == due


@pytest.mark.parametrize(
    ("section", "precision"),
    [
        ({}, "fp32"),
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"torch_autocast": {"enabled": True}}, "bf16"),
        ({"torch_autocast": {"enabled": False, "dtype": "float16"}}, "fp32"),
        *[({"torch_autocast": {"enabled": True, "dtype": name}}, "bf16") for name in ("bfloat16", "bf16")],
        *[({"torch_autocast": {"enabled": True, "dtype": name}}, "fp16") for name in ("float16", "fp16", "half")],
    ],
)
def test_the_precision_of_a_json(json_file, section, precision):
    json_file.write_text(json.dumps({"train_batch_size": 32, "optimizer": SGD, **section}))
    assert plan(f"--deepspeed_config={json_file}").precision == precision
