"""The documentation matches the program: its code is run or tied to the test that runs it; links, files and flags exist.

A new line of shell or a new block fails until it is in RUN (run on a small run), PRINTED (copied from a log) or TIED.
"""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from cifar10.__main__ import COMMANDS, main
from cifar10.config.cli import parse
from cifar10.data import cifar
from tests.launching import PROJECT, run
from tests.test_house import FLOORS

PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("**/*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}

RUN = (
    "uv run python -m cifar10 report runs/mine",
    "uv run python -m cifar10 report runs/mine runs/three/seed_*",
    "uv run python -m cifar10 leaderboard runs",
)
PRINTED, LOG = "epoch 1/50 ", "records/2026-11-21_bn_cnn_cpu/seed_2/console.log"  # a block's start, the file with its lines
CI = ("uv run pytest", "uv run pytest -m slow", "uv run ruff check .", "uv run ruff format --check .")  # run by .ci/run
MAIN = "python main.py --num-gpus 4 --num-nodes 2 --node-rank 0 --master-addr 10.0.0.1 --output-dir SHARED/run"
DEEPSPEED = "deepspeed --hostfile hosts --no_ssh --node_rank=R --master_addr=10.0.0.1 cifar10_deepspeed.py"
TORCHRUN = "torchrun --nnodes=2 --node-rank=R --nproc_per_node=4 --master-addr=10.0.0.1 cifar10_deepspeed.py"
TIED = {  # a line of shell, or the first line of another block -> the test in tests/launch that runs it
    "pip install uv && uv run python main.py": "test_launchers.py test_a_launcher_runs_to_a_finished_summary",
    "runs/bn_cnn-20261121-101500/": "test_launchers.py test_the_run_folder_says_what_was_run",
    "uv run python main.py --seeds 3 --output-dir runs/three": "test_seeds.py test_real_runs_of_two_seeds",
    'uv run python -m cifar10 compare bn_cnn "bn_cnn --lr 0.2" --epochs 10 --output-dir runs/lr': (
        "../commands/test_compare.py test_real_runs_are_compared_without_a_test_image"
    ),
    "uv run python main.py --num-gpus 2 --recipe vgg_pipeline --pipeline-stages 2": (
        "../engine/test_pipeline.py test_the_documented_command_trains_a_pipeline_on_two_cpu_ranks"
    ),
    "uv run python main.py --num-gpus 2 --recipe moe --top-k 2": (
        "../engine/test_experts.py test_a_run_of_experts_says_where_its_tokens_went_and_resumes_exactly"
    ),
    "uv run python -m cifar10 xray --recipe bn_cnn --ranks 2 --output-dir runs/xray": (
        "../commands/test_xray.py test_tables_a_picture_and_a_json"
    ),
    MAIN: "test_two_hosts.py test_main_on_each_host",
    DEEPSPEED: "test_two_hosts.py test_deepspeed_without_ssh",
    "deepspeed --hostfile hosts cifar10_deepspeed.py": "test_two_hosts.py test_deepspeed_over_ssh_from_the_first_host",
    TORCHRUN: "test_two_hosts.py test_torchrun",
    "sbatch run_deepspeed.sh --epochs 10": "test_slurm.py test_sbatch_as_the_document_types_it_trains_on_both_gpus",
    "sbatch --nodes=2 --gres=gpu:4 run_deepspeed.sh": "test_slurm.py test_sbatch_on_two_nodes",
    **dict.fromkeys(
        (
            "photos/cat/holiday.jpg",
            "uv run python main.py --dataset folder --data-dir photos --val-images 60 --epochs 30 --output-dir runs/photos",
            "uv run python -m cifar10 evaluate runs/photos --data-dir photos",
            "uv run python -m cifar10 predict runs/photos new.jpg",
            "uv run python -m cifar10 export runs/photos --data-dir photos",
        ),
        "test_own_data.py test_a_stranger_gets_from_a_folder_of_photos_to_a_model_that_answers",
    ),
}
OTHERS = "--nnodes --nproc_per_node --no_ssh --hostfile --nodes --gres --logdir --check"  # flags of other programs
OTHERS += " --deepspeed --no-amp --num-workers --extra --gpus --torch-backend"  # read before our own flags are

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
BLOCKS = [block for text in TEXTS.values() for block in FENCED.findall(text)]
PYTHON = [code for kind, code in BLOCKS if kind == "python"]


def tied_lines(kind: str, code: str) -> list[str]:
    """The lines of a block that must be accounted for: all of shell, none of Python (which is run), else the first."""
    lines = [" ".join(line.split(" #")[0].split()) for line in code.splitlines()]
    return lines if kind == "bash" else [] if kind == "python" else lines[:1]


def test_every_line_of_code_is_run_or_tied_to_a_test_and_nothing_else_is():
    lines = {line for kind, code in BLOCKS for line in tied_lines(kind, code)}
    assert {line for line in lines if not line.startswith(PRINTED)} == {*RUN, *CI, *TIED}
    assert {*CI} <= {*(PROJECT / ".ci" / "run").read_text(encoding="utf-8").splitlines()}
    for file, test in map(str.split, TIED.values()):
        assert f"def {test}(" in (PROJECT / "tests" / "launch" / file).read_text(encoding="utf-8")


def test_all_code_stands_between_fences():
    for page, text in TEXTS.items():
        assert not re.search(r"^( {4}|\t|~~~|```)", FENCED.sub("", text), re.M), page


def test_output_was_printed():
    [code] = [code for _, code in BLOCKS if code.startswith(PRINTED)]
    assert {*code.splitlines()} <= {"...", *(PROJECT / LOG).read_text(encoding="utf-8").splitlines()}


# --- names ------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What `page#...` may name, as GitHub makes it from headings."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, PROJECT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_and_file_names_resolve(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
        target, _, anchor = "".join(link).partition("#")
        if not target.startswith("http"):
            file = page.parent / target if target else page
            assert file.exists(), link
            assert not anchor or anchor in anchors(file), link
    names = re.findall(r"(?<![\w/.-])((?:cifar10|tests|recipes|records|docs|\.ci)/[\w./-]*\w)", text)
    assert [name for name in names if not (PROJECT / name).exists()] == []


def test_flags_exist(capsys):
    for ask in (*([command, "--help"] for command in COMMANDS), None):
        with pytest.raises(SystemExit):
            main(ask) if ask else parse(["--help"])
    helped = capsys.readouterr().out + run([sys.executable, "main.py", "--help"]).stdout
    find = re.compile(r"(?<![\w-])--[a-z][\w-]*")
    known = {flag.replace("_", "-") for flag in find.findall(f"{helped} {OTHERS}")}
    named = {flag for text in TEXTS.values() for flag in find.findall(text)}
    assert [flag for flag in named if flag.replace("_", "-") not in known] == []


def test_the_code_map_has_the_layers_of_the_packages():
    rows = re.findall(r"^\| (\d+) \| ([^|]*) \|", TEXTS[PROJECT / "docs" / "code_map.md"], re.M)
    assert {int(floor): set(re.findall(r"\[`(\w+)`\]", cell)) for floor, cell in rows} == dict(enumerate(FLOORS, 1))


def test_the_readme_is_short():
    assert (PROJECT / "README.md").stat().st_size <= 9_000


def test_one_version():
    version = re.search(r'^version = "(.*)"', (PROJECT / "pyproject.toml").read_text(), re.M)[1]
    assert yaml.safe_load((PROJECT / "CITATION.cff").read_text())["version"] == version
    assert re.search(r"^## ([\d.]+)$", (PROJECT / "CHANGELOG.md").read_text(), re.M)[1] == version


# --- code that is run ---------------------------------------------------------------------------------------------------


@pytest.fixture
def documented_runs(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with the runs that the pages name, small and real."""
    for folder in ("runs/mine", "runs/three/seed_0"):
        shutil.copytree(trained / "color", tmp_path / folder)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("documented_runs")
@pytest.mark.parametrize("line", RUN)
def test_a_line_of_shell_does_what_it_says(line, monkeypatch, capsys):
    words = shlex.split(line.removeprefix("uv run python -m "))
    arguments = [name for word in words[1:] for name in (map(str, Path().glob(word)) if "*" in word else [word])]
    assert main(arguments) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    reports = [Path(path) for path in re.findall(r"^report: (.*)$", printed, re.M)]
    assert all(path.stat().st_size > 10_000 for path in reports)
    assert reports or "| [bn_cnn" in printed


@pytest.mark.usefixtures("documented_runs")
@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[0])
def test_python_runs(code):
    names: dict = {}
    exec(code, names)  # our own page
    if "saved" in names:
        assert set(names["saved"]["module"]) == set(names["model"].state_dict())
        assert names["saved"]["classes"] == list(cifar.CIFAR10.description.classes)
    else:
        assert names["tiny_cnn"](num_classes=7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
