"""--set overrides keys of DeepSpeed's JSON, and "auto" in a JSON is replaced by what is known."""

import json
from pathlib import Path
from typing import Any

import pytest

from cifar10 import UsageError
from cifar10.config.ds_check import look_up
from cifar10.plan import Plan, make_plan
from cifar10.run import folder as run_folder

SGD = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}


def plan(*argv: str, world_size: int = 1) -> Plan:
    return make_plan(["--dataset", "synthetic", *argv], world_size, "a test")


def refusal(*argv: str) -> str:
    with pytest.raises(UsageError) as caught:
        plan(*argv)
    (line,) = str(caught.value).splitlines()
    return line


# --- --set --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "due"),
    [
        (["--set", "optimizer.params.weight_decay=1e-3"], {"optimizer.params.weight_decay": 1e-3}),
        (["--set", "gradient_clipping=0", "zero_optimization.stage=2"], {"gradient_clipping": 0, "zero_optimization.stage": 2}),
        (["--set", "gradient_clipping=2", "--seed", "1", "--set=gradient_clipping=3"], {"gradient_clipping": 3}),
        (
            ["--set", 'optimizer={"type": "AdamW", "params": {"lr": 0.01}}'],
            {"optimizer.type": "AdamW", "optimizer.params.lr": 0.01},
        ),
        (["--set", "optimizer.params.nesterov=true"], {"optimizer.params.nesterov": True}),
        (["--set", "scheduler.type=StepLR", "scheduler.params.step_size=9"], {"scheduler.type": "StepLR"}),
        (["--set", "train_batch_size=128"], {"train_batch_size": 128, "train_micro_batch_size_per_gpu": 128}),
        (["--set", "optimizer.params.lr=auto"], {"optimizer.params.lr": 0.1}),
    ],
)
def test_keys_are_set(argv, due):
    made = plan(*argv)
    assert {path: look_up(made.ds_config, path) for path in due} == due
    told = [note for note in made.notes if note.startswith("--set ")]
    assert all(any(path in note for note in told) for path in (word.split("=")[0] for word in argv if "." in word))


def test_a_precision_that_is_set_beats_the_recipes_preference():
    for recipe in ("slurm_zero2", "bn_cnn"):
        assert plan("--recipe", recipe, "--dataset", "synthetic", "--set", "bf16.enabled=true").precision == "bf16"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["optimizer.params.weight_deca=1"], ["weight_deca", "'weight_decay'"]),
        (["optimizr.params.lr=1"], ["optimizr", "'optimizer'"]),
        (["optimizer.params.lr=fast"], ["optimizer.params.lr", "fast", "a number"]),
        (["optimizer.params.lr=NaN"], ["optimizer.params.lr"]),
        (["optimizer.params.lr=1e999"], ["optimizer.params.lr"]),
        (["optimizer.params.lr"], ["KEY=VALUE"]),
        (["=3"], ["KEY=VALUE"]),
        (["optimizer..lr=3"], ["KEY=VALUE"]),
        (["optimizer.type.name=3"], ["type", "name"]),
        (["zero_optimization.stage=5"], ["zero_optimization.stage", "5"]),
        (["zero_optimization.overlap_comm=yes"], ["overlap_comm", "true or false"]),
        (["amp.enabled=true"], ["amp", "Apex"]),
        (["wall_clock_breakdown={}"], ["wall_clock_breakdown"]),
        (['fp16={"enabled": true, "enabled": false}'], ["twice"]),
        (["optimizer.params.lr=0.2", "--lr", "0.3"], ["--lr", "optimizer.params.lr"]),
        (["train_batch_size=64", "--global-batch-size", "64"], ["--global-batch-size"]),
        (["bf16.enabled=true", "--precision", "fp32"], ["--precision"]),
    ],
)
def test_what_is_set_is_checked_like_the_file(argv, named):
    message = refusal("--set", *argv)
    assert all(words in message for words in named), message


def test_what_is_set_belongs_to_the_settings_of_a_run_and_to_the_command_that_continues_it(tmp_path):
    flags = ["--output-dir", str(tmp_path), "--set", "optimizer.params.weight_decay=1e-3", "zero_optimization.stage=1"]
    made = plan(*flags)
    run_folder.write_json(tmp_path / "ds_config.json", made.ds_config)
    run_folder.write_json(tmp_path / "recipe.json", {"format": "cifar10-deepspeed/2", "settings": made.settings["recipe"]})
    (tmp_path / "checkpoints" / "step_1").mkdir(parents=True)
    plan(*flags)
    assert "optimizer.params.weight_decay 0.001 there, 0.0005 here" in refusal(*flags[:2])
    words = run_folder.command_to_continue("python x.py", flags, tmp_path).split()
    assert words[words.index("--set") + 1 :][:2] == flags[3:]


# --- "auto" -------------------------------------------------------------------------------------------------------------

PRECISIONS = {"fp16": {"enabled": "auto", "loss_scale": 0}, "bf16": {"enabled": "auto"}}
ADAMW = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
WARMUP = {"type": "WarmupDecayLR", "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")}
WARMUP["params"]["total_num_steps"] = "auto"
BUCKETS = dict.fromkeys(("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), "auto")
SIZES = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
OF_TRAINER = {**PRECISIONS, **SIZES, "optimizer": ADAMW, "scheduler": WARMUP, "gradient_clipping": "auto"}
OF_TRAINER["zero_optimization"] = {"stage": 3, **BUCKETS}


def autos(value: Any) -> bool:
    return any(map(autos, value.values())) if isinstance(value, dict) else value == "auto"


@pytest.fixture
def trainers(tmp_path: Path) -> Path:
    """A JSON as Hugging Face's Trainer takes it."""
    path = tmp_path / "trainers.json"
    path.write_text(json.dumps(OF_TRAINER))
    return path


@pytest.mark.parametrize(
    ("argv", "due"),
    [
        ("", {"optimizer.params.lr": 0.001, "scheduler.params.warmup_max_lr": 0.001, "train_batch_size": 64}),
        ("--lr 0.02", {"optimizer.params.lr": 0.02, "scheduler.params.warmup_max_lr": 0.02}),
        (
            "--global-batch-size 100 --val-images 5000 --epochs 2",
            {"train_batch_size": 100, "scheduler.params.total_num_steps": 900},
        ),
        ("--epochs 3 --warmup-epochs 0.1 --val-images 0", {"scheduler.params.warmup_num_steps": 78}),
        ("--micro-batch-size 16", {"train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 4}),
        ("--precision bf16", {"torch_autocast.dtype": "bfloat16"}),
        ("--recipe slurm_zero2 --dataset synthetic", {"train_batch_size": 128}),
        ('--set optimizer.type=SGD optimizer.params={"lr":"auto","weight_decay":"auto"}', {"optimizer.params.lr": 0.1}),
    ],
)
def test_auto_is_replaced_by_what_is_known(trainers, argv, due):
    made = plan("--deepspeed_config", str(trainers), *argv.split())
    assert not autos(made.ds_config)
    assert {path: look_up(made.ds_config, path) for path in due} == due
    notes = "\n".join(note for note in made.notes if note.startswith('"auto": '))
    assert "gradient_clipping" in notes
    assert "scheduler.params.total_num_steps" in notes


def test_auto_as_precision_is_the_recipes(trainers):
    assert plan("--deepspeed_config", str(trainers), "--recipe", "bn_cnn").precision == "fp32"
    assert "of fp16, bf16, fp32" in "".join(
        plan("--deepspeed_config", str(trainers), "--recipe", "slurm_zero2", "--dataset", "synthetic").notes
    )


def test_a_value_that_must_be_given_cannot_be_auto(trainers):
    cycle = {"type": "OneCycle", "params": {"cycle_min_lr": "auto", "cycle_max_lr": 0.1}}
    trainers.write_text(json.dumps({**OF_TRAINER, "scheduler": cycle}))
    assert "'cycle_min_lr'" in refusal("--deepspeed_config", str(trainers))


@pytest.mark.parametrize(("micro", "due"), [(1000, 64), (64, 64), (48, 32), (3, 2)])
def test_a_micro_batch_that_does_not_fit_is_made_smaller_and_told(micro, due):
    made = plan("--micro-batch-size", str(micro))
    assert made.batch.micro_images == due
    assert any(f"train_micro_batch_size_per_gpu {micro} does not fit" in note for note in made.notes) == (micro != due)
