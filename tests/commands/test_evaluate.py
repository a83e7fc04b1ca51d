"""python -m cifar10 evaluate: the run's own numbers again, on any split, with and without test-time augmentation."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cifar10.commands import evaluate
from cifar10.data import synthetic
from cifar10.run.evaluation import Augmented
from cifar10.run.predictions import TEST_FILE, Predictions, read
from cifar10.run.trained import alone, load
from tests.small_trained import command


@pytest.fixture
def copied(trained: Path, tmp_path: Path):
    """A run's folder that may be written to, by its name in small_trained.RUNS."""
    return lambda name: shutil.copytree(trained / name, tmp_path / "run")


def result(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    assert command("evaluate", *words, "--threads", 1, "--json") == 0
    return json.loads(capsys.readouterr().out)


# --- the run's own numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["color", "gray", "resized"])
def test_the_test_split_gives_what_the_run_has_written(copied, capsys, name):
    run = copied(name)
    summary = json.loads((run / "summary.json").read_text())
    own = (run / TEST_FILE).read_bytes()
    (run / TEST_FILE).unlink()
    found = result(capsys, run)
    assert found["accuracy"] == summary["test_accuracy"]
    assert (found["images"], found["written"]) == (200, str(run / TEST_FILE))
    assert (run / TEST_FILE).read_bytes() == own
    assert len(np.unique(read(run / TEST_FILE).predicted)) > 3  # a constant answer would prove nothing


def test_it_needs_no_deepspeed(copied, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # importing it fails
    assert result(capsys, copied("color"))["images"] == 200


def test_val_is_what_validation_saw_and_train_is_the_rest(copied, capsys):
    run = copied("color")
    assert result(capsys, run, "--split", "val")["accuracy"] == json.loads((run / "summary.json").read_text())["val_accuracy"]
    assert result(capsys, run, "--split", "train")["images"] == 500
    labels = [read(run / f"{split}_predictions.npz").labels for split in ("train", "val")]
    assert np.array_equal(np.sort(np.concatenate(labels)), np.sort(synthetic.synthetic("train", 600, 0).labels))


def test_a_run_that_held_nothing_out_has_no_val_split(trained, capsys):
    assert command("evaluate", trained / "all trained on", "--split", "val") == 2
    assert "--split: val" in capsys.readouterr().err


def test_the_table_says_what_the_json_says(copied, capsys):
    run = copied("color")
    found = result(capsys, run)
    assert command("evaluate", run, "--threads", 1) == 0
    printed = capsys.readouterr().out
    assert f"test accuracy {found['accuracy']:.2%}  loss {found['loss']:.4f}" in printed
    assert f"the run's own test gave the same {found['accuracy']:.2%}" in printed
    for row in found["per_class"]:
        assert f"{row['class']} " in printed
    for pair in found["confusions"]:
        assert f"{pair['class']} classified as {pair['answer']}: {pair['images']}" in printed


def test_a_part_of_a_split_and_other_models_leave_the_runs_file_alone(copied, capsys):
    run = copied("color")
    own = (run / TEST_FILE).read_bytes()
    assert result(capsys, run, "--images", 50)["written"] is None
    assert result(capsys, run, "--which", "final")["written"].endswith("test_predictions_final.npz")
    assert result(capsys, run / "checkpoints" / "best_model")["written"] == str(run / TEST_FILE)
    assert (run / TEST_FILE).read_bytes() == own
    shutil.copytree(run / "checkpoints" / "best_model", run.parent / "alone")
    assert result(capsys, run.parent / "alone")["written"] is None


def test_another_accuracy_than_the_summarys_is_reported(copied, capsys):
    run = copied("color")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "test_accuracy": 0.99}))
    assert command("evaluate", run, "--threads", 1) == 0
    assert "the run's own test gave 99.00%:" in capsys.readouterr().out


@pytest.mark.parametrize(("flag", "value"), [("--images", "0"), ("--images", "201"), ("--threads", "0")])
def test_invalid_values_are_refused(trained, capsys, flag, value):
    assert command("evaluate", trained / "color", flag, value) == 2
    message = capsys.readouterr().err
    assert flag in message
    assert value in message


def test_a_folder_that_cannot_be_written_to_is_reported_beside_the_numbers(copied, capsys, monkeypatch):
    run = copied("color")
    monkeypatch.setattr(evaluate, "predictions_file", lambda *_: "no such folder/x.npz")
    assert command("evaluate", run, "--threads", 1, "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["written"] is None
    assert "no such folder/x.npz" in printed.err


# --- test-time augmentation -------------------------------------------------------------------------------------------


def test_views_are_airbenchs(trained):
    """Beside its own code: infer_mirror and infer_mirror_translate of airbench94.py."""
    model = load(trained / "color").model

    def infer_mirror(inputs, net):
        return 0.5 * net(inputs) + 0.5 * net(inputs.flip(-1))

    def infer_mirror_translate(inputs, net):
        logits = infer_mirror(inputs, net)
        pad = 1
        padded_inputs = F.pad(inputs, (pad,) * 4, "reflect")
        inputs_translate_list = [padded_inputs[:, :, 0:32, 0:32], padded_inputs[:, :, 2:34, 2:34]]
        logits_translate_list = [infer_mirror(inputs_translate, net) for inputs_translate in inputs_translate_list]
        logits_translate = torch.stack(logits_translate_list).mean(0)
        return 0.5 * logits + 0.5 * logits_translate

    images = torch.randn(5, 3, 32, 32)
    for tta, theirs in (("mirror", infer_mirror), ("mirror+translate", infer_mirror_translate)):
        assert torch.allclose(Augmented(model, tta)(images), theirs(images, model), atol=1e-5)
        assert not torch.allclose(Augmented(model, tta)(images), model(images), atol=1e-3)


def test_with_tta_both_results_are_given_and_the_logits_are_those_with_tta(copied, capsys):
    run = copied("color")
    plain, own = result(capsys, run), (run / TEST_FILE).read_bytes()
    found = result(capsys, run, "--tta", "mirror")
    assert (found["accuracy"], found["loss"]) == (plain["accuracy"], plain["loss"])
    assert found["with_tta"]["loss"] != plain["loss"]
    assert read(Path(found["written"])).accuracy == found["with_tta"]["accuracy"]
    assert (run / TEST_FILE).read_bytes() == own


def test_the_recipes_own_tta_is_that_of_the_runs_own_test(copied, capsys):
    run = copied("color")
    file = run / "checkpoints" / "best_model" / "mp_rank_00_model_states.pt"
    content = torch.load(file)
    content["recipe"] |= {"tta": "mirror", "tta_below": 0.7}
    torch.save(content, file)
    found, images = load(run), synthetic.synthetic("test", 200, 0)
    expected, _ = evaluate.answers(Augmented(found.model, "mirror", 0.7), images, found, alone(1))
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "test_accuracy_tta": expected.accuracy}))
    own, all_again = (result(capsys, run, "--tta", kind)["with_tta"] for kind in ("mirror", "mirror+translate"))
    assert own == {"loss": expected.loss, "accuracy": expected.accuracy}
    every, _ = evaluate.answers(Augmented(found.model, "mirror+translate"), images, found, alone(1))
    assert all_again["loss"] == every.loss != expected.loss
    assert command("evaluate", run, "--tta", "mirror", "--threads", 1) == 0
    printed = capsys.readouterr().out
    assert f"test accuracy {expected.accuracy:.2%}  loss {expected.loss:.4f}  with --tta mirror" in printed
    assert f"the run's own test with mirror gave the same {expected.accuracy:.2%}" in printed


# --- the measures -----------------------------------------------------------------------------------------------------


def test_recall_and_precision_of_a_class_without_images_or_without_answers():
    logits, classes = np.full((3, 10), -1.0, np.float32), "abcdefghij"
    logits[:, 2] = 1
    found = Predictions(logits, np.array([2, 2, 5]))
    rows = evaluate.per_class(found, classes)
    assert [rows[2][key] for key in ("images", "accuracy", "precision")] == [2, 1.0, 2 / 3]
    assert [rows[5][key] for key in ("images", "accuracy", "precision")] == [1, 0.0, None]
    assert [rows[0][key] for key in ("images", "accuracy", "precision")] == [0, None, None]
    assert evaluate.confusions(found, classes) == [{"class": "f", "answer": "c", "images": 1}]


# --- ensembles --------------------------------------------------------------------------------------------------------


def test_an_ensemble_is_the_mean_of_its_members_probabilities(trained, copied, capsys):
    ours, other = copied("color"), trained / "color"
    weights = ours / "checkpoints" / "best_model" / "mp_rank_00_model_states.pt"
    content = torch.load(weights, weights_only=True)
    content["module"] = {name: value * 0.9 for name, value in content["module"].items()}
    torch.save(content, weights)
    found = result(capsys, ours, other)
    probabilities = [F.softmax(torch.from_numpy(predictions_of(capsys, run)), dim=1) for run in (ours, other)]
    mean = torch.stack(probabilities).mean(0)
    labels = torch.from_numpy(read(other / TEST_FILE).labels)
    assert found["accuracy"] == pytest.approx((mean.argmax(1) == labels).double().mean().item())
    assert found["loss"] == pytest.approx(F.nll_loss(mean.log(), labels).item(), rel=1e-5)
    assert [Path(member["file"]).parents[2] for member in found["members"]] == [ours, other]
    assert found["written"] is None


def predictions_of(capsys: pytest.CaptureFixture[str], run: Path) -> np.ndarray:
    result(capsys, run)
    return read(run / TEST_FILE).logits


def test_members_must_know_the_same_classes(trained, capsys):
    assert command("evaluate", trained / "color", trained / "gray") == 2
    assert "other images or classes" in capsys.readouterr().err
