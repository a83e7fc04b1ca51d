"""Reports: their numbers are those of the run's files, their plots can be opened, and no name in them is code."""

import base64
import dataclasses
import doctest
import html
import io
import json
import re
import shlex
import sys
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
import torch
from PIL import Image

import cifar10_deepspeed as script
from cifar10 import UsageError
from cifar10.__main__ import main
from cifar10.config.cli import parse
from cifar10.config.recipe import as_json, load
from cifar10.data import pixels as pixels_of
from cifar10.data import synthetic
from cifar10.data.registry import find
from cifar10.data.registry import images as images_of
from cifar10.distributed.world import World
from cifar10.metrics.report_sink import ReportSink
from cifar10.metrics.sink import Metrics
from cifar10.plan import make_plan
from cifar10.report import html as html_page
from cifar10.report import samples, stats
from cifar10.run import record
from cifar10.run.predictions import Predictions, save_predictions
from tests.helpers import cut_down
from tests.launching import SHORT, run

RNG = np.random.default_rng(0)
HOSTILE = "<script>alert(1)</script>$x^{"


def answers(count: int = 200, classes: int = 10) -> Predictions:
    """Of a model that is right more often than not."""
    labels = np.arange(count) % classes
    logits = RNG.normal(size=(count, classes)).astype(np.float32)
    logits[np.arange(count), labels] += RNG.choice([0, 3], size=count).astype(np.float32)
    return Predictions(logits, labels)


# --- measures ---------------------------------------------------------------------------------------------------------


def test_the_quantiles_are_those_of_the_tables():
    assert doctest.testmod(stats).failed == 0
    for df, value in {5: 2.5706, 7: 2.3646, 29: 2.0452, 120: 1.9799}.items():
        assert stats.t_95(df) == pytest.approx(value, abs=5e-5)


def test_one_run_has_no_interval_and_none_has_nothing():
    assert stats.spread([0.5]) == stats.Spread(1, 0.5, None, None)
    assert stats.spread([]) is None


def test_wilsons_interval():
    low, high = stats.wilson(np.array([81, 0, 10, 0]), np.array([100, 10, 10, 0]))
    assert low == pytest.approx([0.72221, 0, 0.72246, 0], abs=1e-5)  # the first: Brown, Cai, DasGupta 2001, formula (4)
    assert high == pytest.approx([0.87485, 0.27754, 1, 1], abs=1e-5)


def test_rows_of_the_confusion_matrix_sum_to_the_images_of_a_class():
    found = answers(203)
    counts = stats.confusion(found)
    assert counts.sum(axis=1).tolist() == np.bincount(found.labels, minlength=10).tolist()
    assert np.diag(counts).sum() / 203 == found.accuracy
    assert counts[3, 5] == ((found.labels == 3) & (found.predicted == 5)).sum()


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy():
    logits = np.log(np.array([[0.8, 0.2]] * 10 + [[0.55, 0.45]] * 10, np.float32))
    labels = np.array([0] * 6 + [1] * 4 + [0] * 10)  # 60% right where it says 80%, all right where it says 55%
    found = stats.calibration(Predictions(logits, labels))
    assert found.counts.sum() == 20
    assert found.error == pytest.approx((0.2 + 0.45) / 2, abs=1e-6)
    certain = stats.calibration(Predictions(np.float32([[1000, 0]]), np.array([0])))
    assert (certain.counts[-1], certain.error) == (1, 0)


def test_the_worst_mistakes_are_the_most_confident_wrong_answers():
    found = answers()
    worst = stats.worst_mistakes(found, 7)
    confidence, wrong = found.probabilities.max(axis=1), found.predicted != found.labels
    assert wrong[worst].all()
    assert confidence[worst].tolist() == sorted(confidence[wrong], reverse=True)[:7]
    assert len(stats.worst_mistakes(Predictions(np.eye(3, dtype=np.float32), np.arange(3)), 7)) == 0


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data sets that are drawn, with 200 images in each split."""
    cut_down(monkeypatch, 200)


RECIPES = [
    "--dataset synthetic",
    "--recipe mnist_synthetic",
    "--dataset synthetic --resize 40 --image-size 32",
    "--dataset synthetic --resize 24 --augment 'RandomCrop(1) AlternatingFlip'",
    "--dataset synthetic --first-sizes 16 --first-epochs 1 --augment 'RandomCrop(3) RandomHorizontalFlip Cutout(10)'",
    "--dataset synthetic --augment 'RandomCrop(3, reflect) BrightnessContrast(0.2, 0.3) Cutout(5)'",
    "--dataset synthetic --first-sizes 16 24 --first-epochs 1 1 --augment 'RandomCrop(2) AlternatingFlip'",
    "--dataset synthetic --augment 'RandomCrop(4) ColorJitter(0.2, 0.2) RandAugment RandomErasing CutMix'",
    "--dataset synthetic --first-sizes 16 --first-epochs 1 --augment 'TrivialAugmentWide MixUp'",
]


@pytest.mark.parametrize("flags", RECIPES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_augmented_images_are_those_that_training_sees(flags, ranks, small):
    plan = make_plan([*shlex.split(flags), "--val-images=50", "--global-batch-size=32", "--seed=4"], ranks, "test")
    seen = []
    for rank in range(ranks):
        train, _ = script.get_cifar10_dataloaders(plan, World(rank, rank, ranks, ranks, torch.device("cpu"), "test"))
        seen += next(train.epoch(0))
    images, labels = torch.cat([images for images, _ in seen])[:24], torch.cat([labels for _, labels in seen])[:24]
    pixels, its_labels = samples.first_augmented(plan.recipe, plan.images("train"), 32)
    shown = torch.from_numpy(pixels).permute(0, 3, 1, 2)[:, : images.shape[1]]
    normalize = pixels_of.Normalize(plan.recipe.mean, plan.recipe.std, torch.device("cpu"))
    assert its_labels.tolist() == labels.tolist()
    if any(name in plan.recipe.augment for name in ("Brightness", "Erasing", "Mix")):
        assert torch.equal(shown, normalize.to_pixels(images))
    else:
        assert torch.equal(normalize(shown), images)


def test_a_sheet_takes_the_memory_of_the_images_that_it_shows(small, monkeypatch):
    packed = []
    pack = pixels_of.pack
    monkeypatch.setattr(
        pixels_of, "pack", lambda images, *how, **more: packed.append(len(images)) or pack(images, *how, **more)
    )
    recipe = dataclasses.replace(load("bn_cnn").recipe, dataset="synthetic", val_images=50)
    samples.first_augmented(recipe, images_of(recipe, "train", Path("nowhere")))
    assert packed == [samples.SHOWN]


def test_the_sheet_shows_the_worst_mistakes_with_their_images():
    found, images = answers(), synthetic.synthetic("test", 200, seed=0)
    found = Predictions(found.logits, images.labels)
    shown = samples.mistakes(found, images, list("abcdefghij"), count=5)
    assert [one.index for one in shown] == stats.worst_mistakes(found, 5).tolist()
    for one in shown:
        assert np.array_equal(one.pixels, images.pixels[one.index])
        assert one.true == "abcdefghij"[images.labels[one.index]] != one.predicted
        assert one.probability == found.probabilities[one.index].max() > one.probability_of_true


def test_answers_to_other_images_are_not_shown_beside_these():
    found, images = answers(), synthetic.synthetic("test", 200, seed=0)
    assert samples.mistakes(Predictions(found.logits, (images.labels + 1) % 10), images, list("abcdefghij")) == []
    assert samples.mistakes(found, synthetic.synthetic("test", 100, seed=0), list("abcdefghij")) == []


# --- a run's page -----------------------------------------------------------------------------------------------------


def make_run(
    folder: Path, *, seed: int = 0, name: str = "bn_cnn", test: float | None = 0.5, status: str = "finished", **fields
):
    """A run's folder as a run of two epochs leaves it."""
    recipe = dataclasses.replace(load("bn_cnn").recipe, dataset="synthetic", epochs=2, seed=seed, **fields)
    facts = dataclasses.asdict(find(recipe.dataset).describe(folder))
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(as_json(recipe, name, facts))
    (folder / "ds_config.json").write_text(json.dumps({"train_batch_size": 64, "gradient_clipping": 1.0}))
    start = {"command": f"cifar10_deepspeed.py --seed {seed}", "threads": 1, "world_size": 1, "device": "cpu"}
    start["commit"] = "c0ffee"
    (folder / "environment.json").write_text(json.dumps({"starts": [start]}))
    content = {"status": status, "recipe": name, "seed": seed, "world_size": 1, "epochs": 2.0, "steps": 4, "best_step": 4}
    content |= {"train_accuracy": 0.41, "val_accuracy": 0.62, "test_accuracy": test, "test_images": 200, "train_seconds": 90.0}
    (folder / "summary.json").write_text(json.dumps(content | {"images_per_second": 1234.0, "ended_by": "epochs"}))
    rows = ["epoch,phase,loss,accuracy,throughput", "1,train,2.1,0.3,9", "1,val,2.0,0.4,9", "2,train,1.9,0.41,9"]
    rows += ["2,val,1.8,0.62,9"] if test is None else ["2,val,1.8,0.62,9", f"2,test,1.7,{test},9"]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    steps = "step,epoch,loss,accuracy,grad_norm,lr,skipped\n2,1,2,0.3,3.5,0.1,0\n4,2,1.9,0.4,inf,0.05,1\n"
    (folder / "steps.csv").write_text(steps)
    return folder


def with_answers(folder: Path) -> Predictions:
    found = Predictions(answers().logits, synthetic.synthetic("test", 200, seed=0).labels)
    save_predictions(folder / "test_predictions.npz", [found.logits], found.labels)
    return found


def words(page: Path) -> str:
    """What a page says, without its tags and images."""
    text = re.sub(r"<style.*?</style>", "", page.read_text(encoding="utf-8"), flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Predictions]:
    """One report of a whole run, made once: its folder, and what its model answered."""
    folder = make_run(tmp_path_factory.mktemp("whole") / "run")
    found = with_answers(folder)
    with pytest.MonkeyPatch.context() as patch:
        cut_down(patch, 5_200)
        html_page.make_report(folder, Path("nowhere"))
    return folder, found


def test_the_pages_numbers_are_those_of_the_files(whole):
    folder, found = whole
    said = words(folder / "report.html")
    for number in ("test accuracy 50.00%", "val accuracy 62.00%", "train accuracy 41.00%", "1.5 min"):
        assert number in said
    wrong = int((found.predicted != found.labels).sum())
    assert f"{wrong} of 200 test images" in said
    assert f"accuracy is {found.accuracy:.1%}" in said
    assert f"calibration error is {stats.calibration(found).error:.2%}" in said
    for index in stats.worst_mistakes(found, 24):
        true, answer = (synthetic.SYNTHETIC.description.classes[of[index]] for of in (found.labels, found.predicted))
        chances = found.probabilities[index]
        shown = f"{true} {chances[found.labels[index]]:.1%} {answer} {chances[found.predicted[index]]:.1%} #{index}"
        assert shown in said
    assert "python main.py --recipe" in said
    assert "cifar10_deepspeed.py --seed 0" in said
    assert "c0ffee" in said
    assert "Left out" not in said


def test_a_page_is_self_contained_and_all_its_images_can_be_opened(whole):
    folder, _ = whole
    text = (folder / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == 5 + 24 + 24
    assert "<script" not in text
    assert "url(" not in text
    for source in sources:
        head, _, encoded = source.partition(",")
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
            image.load()
            assert min(image.size) >= 32
    names = {path.stem for path in (folder / "report").glob("*.png")}
    assert names == {"curves", "optimization", "confusion", "classes", "calibration", "mistakes", "augmented"}
    for name in names:
        with Image.open(folder / "report" / f"{name}.png") as image:
            assert all(500 <= pixels <= 2_000 for pixels in image.size)
            assert len(image.convert("L").getcolors(256)) > 10  # something is drawn


def test_a_run_under_way_is_reported_with_what_there_is(tmp_path):
    folder = make_run(tmp_path / "run", status="running", test=None)
    for name in ("steps.csv", "environment.json"):
        (folder / name).unlink()
    rows = (folder / "metrics.csv").read_text().splitlines()
    (folder / "metrics.csv").write_text("\n".join([*rows, "3,train,1."]))  # a row that is being written
    html_page.make_report(folder, tmp_path / "nowhere")
    said = words(folder / "report.html")
    assert "running" in said
    assert "test accuracy" not in said
    assert "no test_predictions.npz" in said
    assert not (folder / "report" / "optimization.png").exists()
    for name in ("metrics.csv", "summary.json", "ds_config.json"):
        (folder / name).unlink()
    html_page.make_report(folder, tmp_path / "nowhere")
    assert "not started" in words(folder / "report.html")


def test_accuracy_with_several_views_stands_beside_the_plain_one(tmp_path):
    folder = make_run(tmp_path / "run", tta="mirror+translate")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"test_accuracy_tta": 0.5321}))
    html_page.make_report(folder, tmp_path)
    said = words(folder / "report.html")
    assert "test accuracy 50.00%" in said
    assert "test accuracy with TTA 53.21% the same images, test-time augmentation (mirror+translate)" in said


def test_where_nothing_is_held_out_no_validation_has_chosen_the_model(tmp_path):
    folder = make_run(tmp_path / "run", val_images=0)
    html_page.make_report(folder, tmp_path)
    said = words(folder / "report.html")
    assert "last model, 200 images" in said
    assert "best validation" not in said


def test_without_the_data_set_the_sheets_are_left_out_and_it_is_said(tmp_path):
    folder = make_run(tmp_path / "run")
    with_answers(folder)
    content = json.loads((folder / "recipe.json").read_text())
    content["settings"]["dataset"] = "cifar10"
    (folder / "recipe.json").write_text(json.dumps(content))
    html_page.make_report(folder, tmp_path / "nowhere")
    said = words(folder / "report.html")
    assert "Left out" in said
    assert "data_batch_1 is missing" in said or "test_batch is missing" in said
    assert "Most confident mistakes" not in said
    assert "Confusions" in said


def test_names_are_text_whatever_they_are(tmp_path, monkeypatch):
    classes = tuple(f"{HOSTILE}{number}" for number in range(10))
    cut_down(monkeypatch, 5_200, classes=classes)
    folder = make_run(tmp_path / f"<b>{HOSTILE.replace('/', '')}", name=HOSTILE)
    with_answers(folder)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"status": "<i>", "reason": HOSTILE}))
    html_page.make_report(folder, tmp_path / "nowhere")
    compared = html_page.make_comparison(html_page.labeled_groups([folder]), tmp_path / "compare.html")
    for page in (folder / "report.html", compared):
        text = page.read_text(encoding="utf-8")
        assert not {"<script", "<i>", "<b><"} & set(re.findall(r"<script|<i>|<b><", text))
        assert "&lt;script&gt;alert(1)" in text


DAMAGE = {
    "recipe.json": ["", "[1]", '{"settings": 3}'],
    "summary.json": ["{", '{"test_accuracy": "high"}', '{"steps": true}', '{"epochs": NaN}'],
    "environment.json": ['{"starts": 3}', '{"starts": [3]}'],
    "metrics.csv": ["epoch\n1\n", "epoch,phase,loss,accuracy,throughput\n1,train,x,0.1,1\n1,val,1,1,1\n", "\0"],
    "steps.csv": ["step,lr,grad_norm,skipped\n1,2,,0\n2,1,1,0\n"],
    "test_predictions.npz": ["PK"],
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name, all_of in DAMAGE.items() for content in all_of])
def test_a_damaged_file_is_named_in_one_line(name, content, tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / name).write_text(content)
    with pytest.raises(UsageError) as caught:
        html_page.make_report(folder, tmp_path)
    assert name in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(("logits", "label"), [((2, 3), 0), ((2, 10), 10), ((2, 10), -1)])
def test_answers_of_other_classes_are_damage(tmp_path, logits, label):
    folder = make_run(tmp_path / "run")
    save_predictions(folder / "test_predictions.npz", [np.ones(logits, np.float32)], np.array([0, label]))
    with pytest.raises(UsageError, match="not of 10 classes"):
        html_page.make_report(folder, tmp_path)


def test_answers_that_are_not_finite_have_no_calibration(tmp_path):
    folder = make_run(tmp_path / "run")
    logits = answers().logits
    logits[3] = np.nan
    save_predictions(folder / "test_predictions.npz", [logits], np.zeros(200, int))
    html_page.make_report(folder, tmp_path)
    assert "not all logits are finite" in words(folder / "report.html")


# --- several runs -----------------------------------------------------------------------------------------------------


def test_runs_that_differ_in_their_seed_are_one_row_with_an_interval(tmp_path):
    accuracies = [0.8191, 0.8239, 0.8260]
    runs = [make_run(tmp_path / f"a/seed_{seed}", seed=seed, test=one) for seed, one in enumerate(accuracies)]
    runs += [make_run(tmp_path / "b", test=0.6, augment="none"), make_run(tmp_path / "c", test=0.1, seed=9, status="stopped")]
    said = words(html_page.make_comparison(html_page.labeled_groups(runs), tmp_path / "out" / "compare.html"))
    half = 4.30265 * stdev(accuracies) / 3**0.5
    interval = f"{100 * (mean(accuracies) - half):.2f} to {100 * (mean(accuracies) + half):.2f}%"
    assert f"bn_cnn, augment RandomCrop(3) Random… 3 82.30 ± 0.35% {interval} 62.00 ± 0.00%" in said
    assert "bn_cnn, augment none 1 60.00% – 62.00%" in said
    assert "not finished, so not included: c" in said
    assert "a/seed_1 bn_cnn, augment RandomCrop(3) Random… 1 finished 2 82.39%" in said
    assert "5 runs, 2 experiments" in said
    assert "same seed" not in said


def test_experiments_with_the_same_seeds_are_paired(tmp_path):
    def of(name: str, seed: int, val: float, **fields: object) -> Path:
        folder = make_run(tmp_path / name / f"seed_{seed}", seed=seed, **fields)
        content = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps(content | {"val_accuracy": val}))
        return folder

    runs = [of("a", seed, 0.6 + seed / 1000) for seed in range(6)]
    runs += [of("b", seed, 0.65 + seed / 990, augment="none") for seed in range(6)]
    said = words(html_page.make_comparison(html_page.labeled_groups(runs), tmp_path / "compare.html"))
    assert "bn_cnn, augment none is better than bn_cnn, augment RandomCrop(3) Random…, decided after 5 pairs" in said
    others = [of("c", seed, 0.7, split_seed=1) for seed in range(6)]  # on other validation images
    assert "decided" not in words(
        html_page.make_comparison(html_page.labeled_groups([*runs[:6], *others]), tmp_path / "c.html")
    )


def test_runs_of_one_seed_are_not_taken_for_independent_ones(tmp_path):
    runs = [make_run(tmp_path / name) for name in "ab"]
    said = words(html_page.make_comparison(html_page.labeled_groups(runs), tmp_path / "compare.html"))
    assert "some runs have the same seed" in said
    assert "bn_cnn 2 50.00 ± 0.00% – 62.00" in said


def test_a_run_cut_short_or_tested_on_fewer_images_is_another_experiment(tmp_path):
    runs = [make_run(tmp_path / str(number), seed=number) for number in range(4)]
    others = ({"ended_by": "max_steps"}, {"test_images": 100}, {"test_images": 10_000})
    for run_folder, other in zip(runs[1:], others, strict=True):
        content = json.loads((run_folder / "summary.json").read_text())
        (run_folder / "summary.json").write_text(json.dumps(content | other))
    groups = record.by_experiment([record.open_record(folder) for folder in runs])
    assert sorted(len(group) for group in groups) == [1, 1, 1, 1]


# --- the command, and a run's end -------------------------------------------------------------------------------------


def test_a_run_makes_its_report_at_its_end_and_the_command_makes_it_again(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    started = [sys.executable, "cifar10_deepspeed.py", *SHORT, "--output-dir", str(folder)]
    process = run([*started, "--report"], OMP_NUM_THREADS="1")
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == f"report: {folder / 'report.html'}"
    assert process.stderr == ""
    assert f"test accuracy {json.loads((folder / 'summary.json').read_text())['test_accuracy']:.2%}" in words(
        folder / "report.html"
    )
    first = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    monkeypatch.setattr(sys, "argv", ["cifar10", "report", str(folder)])
    assert main() == 0
    assert (folder / "report.html").read_bytes() == first


@pytest.mark.parametrize(("arguments", "says"), [([], "no RUN is given"), (["nowhere"], "nowhere is not a run's folder")])
def test_the_command_refuses_in_one_line(arguments, says, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cifar10", "report", *arguments])
    assert main() == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert says in said[0]


def test_a_report_that_fails_does_not_end_the_run(tmp_path, capsys):
    metrics = Metrics([ReportSink(tmp_path, tmp_path)])
    metrics.finished({})
    assert "ReportSink failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variable", "flags", "wanted"),
    [(None, [], True), ("0", [], False), ("1", [], True), (None, ["--no-report"], False), ("0", ["--report"], True)],
)
def test_reports_are_made_unless_the_flag_or_the_variable_says_no(variable, flags, wanted, monkeypatch):
    monkeypatch.delenv("CIFAR10_REPORT", raising=False)
    if variable is not None:
        monkeypatch.setenv("CIFAR10_REPORT", variable)
    assert parse(flags)[1].report is wanted
