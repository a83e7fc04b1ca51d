"""Flags of other programs are answered with what to type here."""

import re
import shlex
from dataclasses import fields

import pytest

import main
from cifar10 import UsageError
from cifar10.config import habits
from cifar10.config.cli import Options, parse
from cifar10.config.recipe import Recipe
from cifar10.launch.command import split_launch_options

FLAGS = {"--" + field.name.replace("_", "-") for kind in (Recipe, Options) for field in fields(kind)}
VALUES = {
    "--lr-schedule": "linear",
    "--precision": "bf16",
    "--wandb": "off",
    "--augment": "Cutout(3)",
    "--recipe": "lenet",
    "--label-smoothing": "0.1",
    "--node-rank": "0",
}


def answer(*argv: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse(list(argv))
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize(
    ("argv", "typed"),
    [
        ("--batch-size 64", "--global-batch-size 64"),
        ("--batch_size=64", "--global-batch-size 64"),
        ("-b 64", "--global-batch-size 64"),
        ("--fp16", "--precision fp16"),
        ("--bf16 --epochs 3", "--precision bf16"),
        ("--amp", "--precision bf16"),
        ("--learning-rate 0.05", "--lr 0.05"),
        ("--learning_rate 0.05", "--lr 0.05"),
        ("--weight-decay 1e-3", "--set optimizer.params.weight_decay=1e-3"),
        ("--momentum 0.8", "--set optimizer.params.momentum=0.8"),
        ("--optimizer adamw", """--set 'optimizer={"type":"AdamW","params":{"lr":0.001}}'"""),
        ("--zero-stage 2", "--set zero_optimization.stage=2"),
        ("--zero 1", "--set zero_optimization.stage=1"),
        ("--gpus 2", "python main.py --num-gpus 2"),
        ("--num_gpus 2", "python main.py --num-gpus 2"),
        ("--nproc_per_node 2", "python main.py --num-gpus 2"),
        ("--deepspeed my.json", "--deepspeed-config my.json"),
        ("--deepspeed=my.json", "--deepspeed-config my.json"),
        ("--ds_config my.json", "--deepspeed-config my.json"),
        ("--resume-from runs/x", "--resume runs/x"),
        ("--resume_from_checkpoint runs/x", "--resume runs/x"),
        ("--workers 4", "leave it out"),
        ("-j 4", "leave it out"),
        ("--no-cuda", "--device cpu"),
        ("--data /data", "--data-dir /data"),
        ("--save-dir x", "--output-dir x"),
        ("--arch resnet18", "--model resnet18"),
        ("--pretrained", "--weights imagenet"),
        ("--gradient-accumulation-steps 4", "--set gradient_accumulation_steps=4"),
        ("--max_grad_norm 1.0", "--set gradient_clipping=1.0"),
        ("--cpu-offload", "--set zero_optimization.offload_optimizer.device=cpu"),
        ("--evaluate", "python -m cifar10 evaluate"),
    ],
)
def test_a_flag_of_another_program_is_answered_with_what_to_type(argv, typed):
    assert answer(*argv.split()).endswith(typed)


def test_all_unknown_flags_are_answered_in_one_line():
    line = answer("word", "--fp16", "--batch-size", "64", "--zzz", "--seed", "3")
    assert [line.count(words) for words in ("--precision fp16", "--global-batch-size 64", "--zzz", "word")] == [1, 1, 1, 1]
    assert "--seed 3" not in line


def test_main_answers_with_its_own_flags(capsys):
    assert main.main(["--gpus", "2", "--batch-size", "64"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "use --num-gpus 2" in line
    assert "use --global-batch-size 64" in line


@pytest.mark.parametrize("hint", sorted({hint for hint in habits.ALIASES.values() if hint.startswith("--")}))
def test_what_is_to_be_typed_is_accepted(hint):
    flag = hint.split()[0]
    typed = habits.instead(
        next("--" + name for name, one in habits.ALIASES.items() if one == hint), VALUES.get(flag, "1"), [flag]
    )
    _, rest = split_launch_options(shlex.split(typed.partition("; use ")[2]))
    parse(rest)


def test_no_flag_of_this_program_is_taken_for_one_of_another():
    assert not {"--" + name for name in habits.ALIASES} & FLAGS
    assert all(re.fullmatch("[a-z0-9-]+", name) for name in habits.ALIASES)
