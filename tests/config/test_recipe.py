"""The command line, the recipes, recipe.json; what is refused is refused in a line saying what to type."""

import dataclasses
import json
import re
import runpy
import shlex
from pathlib import Path
from typing import get_type_hints

import pytest

from cifar10 import UsageError
from cifar10.config import ds_config
from cifar10.config.cli import Options, parse, without_launcher_flags
from cifar10.config.recipe import FORMAT, PROJECT, Recipe, as_json, load, recipe_names

STABLE_FLAGS = """--recipe --dataset --data-dir --output-dir --epochs --max-steps --global-batch-size --lr --seed --val-images
    --test-images --resume --threads --log-every-steps --deepspeed-config""".split()


@pytest.fixture(autouse=True)
def _no_cifar10_dir(monkeypatch):
    monkeypatch.delenv("CIFAR10_DIR", raising=False)


def refusal(*argv: str) -> str:
    """The one line with which `argv` is refused."""
    with pytest.raises(UsageError) as caught:
        parse(list(argv))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# --- flags ------------------------------------------------------------------------------------------------------------


def test_without_flags_the_default_recipe_runs_with_its_own_json():
    recipe, options = parse([])
    assert recipe == load("bn_cnn").recipe
    assert options.recipe == "bn_cnn"
    assert options.deepspeed_config is None
    assert options.data_dir == Path("data")


def test_a_flag_beats_the_recipe_and_leaves_the_rest_of_it():
    recipe, options = parse(["--recipe", "bn_cnn_document", "--epochs", "2.5", "--deepspeed_config", "mine.json"])
    assert recipe == dataclasses.replace(load("bn_cnn_document").recipe, epochs=2.5)
    assert options.deepspeed_config == Path("mine.json")


@pytest.mark.parametrize("argv", ["--data_dir x_y", "--data-dir x_y", "--data_dir=x_y", "--data-dir=x_y"])
def test_both_spellings_of_a_flag(argv):
    assert parse(argv.split())[1].data_dir == Path("x_y")


@pytest.mark.parametrize(
    "argv", ["--deepspeed_config a.json", "--deepspeed-config=a.json", "--deepspeed --deepspeed_config a.json"]
)
def test_deepspeeds_own_flag(argv):
    assert parse(argv.split())[1].deepspeed_config == Path("a.json")


@pytest.mark.parametrize("added", ["--local_rank=0", "--local-rank=1", "--local_rank 0", "--local-rank 1", "--deepspeed"])
def test_what_launchers_add_is_passed_over(added):
    before_and_after = [*added.split(), "--seed", "7"], ["--seed", "7", *added.split()]
    assert [parse(argv)[0].seed for argv in before_and_after] == [7, 7]
    assert [without_launcher_flags(argv) for argv in before_and_after] == [["--seed", "7"]] * 2


def test_the_data_folder_comes_from_the_environment_unless_a_flag_names_it(monkeypatch):
    monkeypatch.setenv("CIFAR10_DIR", "/elsewhere")
    assert parse([])[1].data_dir == Path("/elsewhere")
    assert parse(["--data-dir", "mine"])[1].data_dir == Path("mine")
    monkeypatch.setenv("CIFAR10_DIR", "")
    assert parse([])[1].data_dir == Path("data")


def test_of_a_flag_given_twice_the_last_one_counts_for_recipes_as_well():
    assert parse(["--seed", "1", "--seed", "2"])[0].seed == 2
    recipe, options = parse(["--recipe", "bn_cnn_document", "--recipe=bn_cnn"])
    assert options.recipe == "bn_cnn"
    assert recipe == load("bn_cnn").recipe


def test_switches_and_triples():
    recipe, _ = parse(["--sync-bn", "--mean", "0.5", "0.4", "0.3"])
    assert recipe.sync_bn is True
    assert recipe.mean == (0.5, 0.4, 0.3)


def test_first_sizes_and_their_epochs():
    recipe, _ = parse("--first-sizes 24 28 --first-epochs 2 1".split())
    assert (recipe.first_sizes, recipe.first_epochs) == ((24, 28), (2, 1))


@pytest.mark.parametrize(
    "argv",
    ["--first-sizes 24", "--first-epochs 2", "--first-sizes 24 28 --first-epochs 2"]
    + [f"--first-sizes {size} --first-epochs {epochs}" for size, epochs in ((24, 0), (4, 1), (4000, 1))],
)
def test_first_sizes_without_their_epochs_or_out_of_range_are_refused(argv):
    assert "--first-" in refusal(*argv.split())


# --- invalid values --------------------------------------------------------------------------------------------------

WHOLE = "val_images patience swa_epochs lr_reference_batch split_seed test_images save_every_epochs save_frequency".split()
POSITIVE = "max_skipped_in_a_row max_steps threads log_every_steps keep_checkpoints micro_batch_size".split()
POSITIVE += ["global_batch_size", "pipeline_stages"]
INVALID = {  # flag -> values of the right type that are out of range
    **dict.fromkeys(WHOLE, "-1"),
    **dict.fromkeys(POSITIVE, "0 -1"),
    **dict.fromkeys("epochs lr plateau_lr_factor max_minutes stop_at timeout_minutes".split(), "0 -1 nan inf"),
    **dict.fromkeys(("resize", "image_size"), "-1 100000"),
    "warmup_epochs": "-1 nan inf",
    **dict.fromkeys("label_smoothing dropout drop_path ema".split(), "-0.1 1 nan"),
    **dict.fromkeys(("capacity_factor", "balance_loss"), "-0.1 nan inf"),
    **dict.fromkeys(("top_k", "expert_parallel"), "0 3"),
    "min_improvement": "0 -1e-5 nan",
    "plateau_patience": "0 -3",
    "tta_below": "0 -1 1.5 nan",
    "seed": "-1 99999999999",
}


TRIPLES = [("std", "0 1 1"), ("std", "nan 1 1"), ("mean", "nan 0 0"), ("mean", "0 inf 0")]


@pytest.mark.parametrize(
    ("name", "value"), [*((name, v) for name, values in INVALID.items() for v in values.split()), *TRIPLES]
)
def test_an_invalid_value_is_refused_with_a_valid_example(name, value):
    example = re.search(rf"{flag(name)}: .+ for example ({flag(name)} .+)$", refusal(flag(name), *value.split()))
    parse(shlex.split(example[1]))


def test_every_number_that_a_flag_takes_is_tried_above():
    hints = {**get_type_hints(Recipe), **get_type_hints(Options)}
    numbers = {name for name, hint in hints.items() if hint in (int, float, int | None, float | None)}
    assert numbers == INVALID.keys()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--epochs abc", ["--epochs", "abc"]),
        ("--epochs", ["--epochs"]),
        ("--seed 1.5", ["--seed", "1.5"]),
        ("--mean 0.5 0.5", ["--mean", "3"]),
        ("--recipe", ["--recipe"]),
        ("words", ["words"]),
        ("-x", ["-x"]),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_what_is_expected(argv, words):
    message = refusal(*argv.split())
    assert all(word in message for word in words), message


@pytest.mark.parametrize("argv", [["--recipe", ""], ["--recipe="], ["--output-dir", ""], ["--resume="]])
def test_an_empty_word_as_an_unset_shell_variable_leaves_it_is_refused(argv):
    assert argv[0].rstrip("=") in refusal(*argv)


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        ("--epoch 3", "--epochs"),
        ("--recip bn_cnn", "--recipe"),
        ("--deepspeed_confg x", "--deepspeed-config"),
        ("--global-batch 3", "--global-batch-size"),
        ("--recipe bn_cn", "bn_cnn"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest_right_one(argv, meant):
    assert refusal(*argv.split()).endswith(f"did you mean {meant}?")


def test_a_name_like_no_other_is_answered_with_all_there_are():
    assert refusal("--recipe", "zzz").endswith(f"there are: {', '.join(recipe_names())}")


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_a_misspelt_field_is_an_error_when_the_recipe_is_imported(tmp_path):
    right = (PROJECT / "recipes" / "bn_cnn_document.py").read_text(encoding="utf-8")
    (tmp_path / "right.py").write_text(right, encoding="utf-8")
    (tmp_path / "wrong.py").write_text(right.replace("warmup_epochs", "warmup_epoch"), encoding="utf-8")
    assert runpy.run_path(str(tmp_path / "right.py"))["EXPERIMENT"] == load("bn_cnn_document")
    with pytest.raises(TypeError, match="warmup_epoch"):
        runpy.run_path(str(tmp_path / "wrong.py"))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_named_and_its_json_is_sound(name):
    recipe, _ = parse(["--recipe", name])
    assert recipe == load(name).recipe
    ds_config.batch(ds_config.read(load(name).deepspeed), world_size=1)


def test_bn_cnn_document_holds_the_documents_numbers():
    experiment = load("bn_cnn_document")
    recipe, config = experiment.recipe, ds_config.read(experiment.deepspeed)
    assert (recipe.model, recipe.dataset) == ("bn_cnn", "cifar10")
    assert (recipe.epochs, recipe.warmup_epochs, recipe.lr_schedule) == (50, 5, "cosine(per_epoch=True)")
    assert (recipe.val_images, recipe.patience, recipe.min_improvement) == (0, 15, 1e-5)
    assert (recipe.mean, recipe.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert (recipe.augment, recipe.label_smoothing) == ("RandomCrop(4) RandomHorizontalFlip", 0)
    assert config["optimizer"] == {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}}
    assert [config[key] for key in ds_config.BATCH_KEYS] == [32, 32, 1]
    assert config["gradient_clipping"] == 1.0
    assert config["fp16"] == {"enabled": False}
    assert config.get("zero_optimization", {}).get("stage", 0) == 0


# --- recipe.json ------------------------------------------------------------------------------------------------------


def write_run(folder: Path, **changes: object) -> Path:
    """A run folder's two files of settings -> its recipe.json; `changes` overwrite settings."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = dataclasses.replace(load("bn_cnn_document").recipe, epochs=3, augment="none")
    content = json.loads(as_json(recipe, "bn_cnn_document", {}))
    content["settings"].update(changes)
    (folder / "recipe.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "ds_config.json").write_text((PROJECT / "ds_config.json").read_text(encoding="utf-8"), encoding="utf-8")
    return folder / "recipe.json"


def test_recipe_json_gives_the_equal_recipe_and_the_json_beside_it(tmp_path):
    written = write_run(tmp_path / "runs" / "x")
    recipe, options = parse(["--recipe", str(written)])
    assert recipe == dataclasses.replace(load("bn_cnn_document").recipe, epochs=3, augment="none")
    assert load(options.recipe).deepspeed == written.with_name("ds_config.json")
    assert parse(["--recipe", str(written), "--epochs", "4"])[0] == dataclasses.replace(recipe, epochs=4)


def test_a_relative_recipe_json_means_the_json_beside_it_in_any_working_folder(tmp_path, monkeypatch):
    written = write_run(tmp_path / "runs" / "x")
    monkeypatch.chdir(tmp_path)
    _, options = parse(["--recipe", "runs/x/recipe.json"])
    assert load(options.recipe).deepspeed.resolve() == written.with_name("ds_config.json").resolve()


@pytest.mark.parametrize(
    "text",
    ["", *"{ [] {} null 5 \xff".split(), "[" * 5_000]
    + [f'{{"format": "{FORMAT}", "settings": {settings}}}' for settings in ("5", "{}", '{"epocs": 1}')],
)
def test_a_file_that_is_no_recipe_json_is_refused(tmp_path, text):
    path = tmp_path / "recipe.json"
    path.write_text(text, encoding="latin1")
    assert str(path) in refusal("--recipe", str(path))


@pytest.mark.parametrize("formatted", [{}, {"format": 1}, {"format": "another/3"}])
def test_a_recipe_json_of_another_format_is_refused(tmp_path, formatted):
    path = write_run(tmp_path / "run")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**{key: value for key, value in content.items() if key != "format"}, **formatted}))
    assert f"expected '{FORMAT}'" in refusal("--recipe", str(path))


def test_a_recipe_json_that_is_not_there_or_is_a_folder_is_refused(tmp_path):
    (tmp_path / "folder.json").mkdir()
    for name in ("absent.json", "folder.json"):
        assert name in refusal("--recipe", str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("epochs", value) for value in ("fifty", -1, True, None)],
        *[("patience", 1.5), ("seed", "1"), ("sync_bn", "no"), ("lr_moves", "weekly"), ("dataset", 10), ("model", ["bn_cnn"])],
        *[("mean", [0.5, 0.5]), ("mean", "abc"), ("std", [1, 1, 1, 1])],
    ],
)
def test_a_recipe_json_with_a_value_that_cannot_be_meant_is_refused(tmp_path, name, value):
    assert name.replace("_", "-") in refusal("--recipe", str(write_run(tmp_path, **{name: value}))).replace("_", "-")


def test_code_is_never_loaded_from_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("evil.py", "evil.json", "evil/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"open({str(tmp_path / 'executed')!r}, 'w')", encoding="utf-8")
    names = "evil.py evil .evil ..evil ../evil __init__ recipes/bn_cnn.py recipes.bn_cnn bn_cnn.py".split()
    for name in (*names, str(tmp_path / "evil.py"), str(tmp_path / "evil.json")):
        refusal("--recipe", name)
    assert not (tmp_path / "executed").exists()


# --- help -------------------------------------------------------------------------------------------------------------


def test_help_exits_with_0_and_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--help"], description="What this program is for.")
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert "What this program is for." in printed
    explained: dict[str, str] = {}
    for line in (line.strip("│ \n") + " " for line in printed.splitlines() if "╭" not in line and "╰" not in line):
        if found := re.match(r"(--[a-z-]+)(?:, --no-[a-z-]+)?(?: (?:\{\S+\}(?:\|[A-Z]+)?|[A-Z]+))* ", line):
            name, line = found[1], line[found.end() :]
            explained[name] = ""
        if explained:
            explained[name] += line.split("(default:")[0]
    every = {flag(field.name) for cls in (Recipe, Options) for field in dataclasses.fields(cls)}
    assert every <= explained.keys()
    assert set(STABLE_FLAGS) <= every
    for name in every:
        assert len(explained[name].split()) >= 4, f"{name} is not explained: {explained[name]!r}"
