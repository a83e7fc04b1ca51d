"""Every block of code in README.md and docs/ is run here, or accounted for by the test that runs what it says.

A new block, or a changed line, fails until it has its entry below: in RUN if it can be carried out in a moment on a small run,
else in COVERED with the test (or the file, and words in it) that does. An entry whose line is gone fails, too.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from cifar10.__main__ import main
from cifar10.data import cifar
from tests.helpers import WORKERS, cut_down, launch
from tests.launching import PROJECT

PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("**/*.md"))]
SHELL = ("bash", "sh", "shell", "console", "")  # what a fence may say, or leave unsaid

RUN = [  # lines of shell, carried out in this process: `python -m cifar10` is called as a function
    "uv run python -m cifar10 report runs/mine # make it again, or of a run that has not finished",
    "uv run python -m cifar10 report runs/mine runs/three/seed_* # side by side, in compare.html",
    "uv run python -m cifar10 leaderboard runs # a table of all finished runs in a folder",
]
PYTHON = ["import torch"]  # blocks of Python by their first line, carried out
PRINTED = {  # blocks that show what a program prints, by their first line, and the file that holds all of it
    "recipe bn_cnn: bn_cnn, 268,746 parameters; run folder runs/bn_2": "records/2026-11-21_bn_cnn_cpu/seed_2/console.log",
}
TWO_HOSTS, SLURM = "tests/launch/test_two_hosts.py", "tests/launch/test_slurm.py"
COVERED = {  # a line of shell, or the first line of another block -> the test that runs what it says
    "pip install uv && uv run python main.py # trains the default recipe on what this machine has": (
        "tests/launch/test_launchers.py",
        "def test_a_launcher_runs_to_a_finished_summary(",
    ),
    "uv run pytest # the tests": (".ci/run", "uv run pytest\n"),
    "python main.py --num-gpus 4 --num-nodes 2 --node-rank 0 --master-addr 10.0.0.1 --output-dir SHARED/run": (
        TWO_HOSTS,
        "def test_main_on_each_host(",
    ),
    "deepspeed --hostfile hosts --no_ssh --node_rank=R --master_addr=10.0.0.1 cifar10_deepspeed.py on each machine R": (
        TWO_HOSTS,
        "def test_deepspeed_without_ssh(",
    ),
    "deepspeed --hostfile hosts cifar10_deepspeed.py on one, through pdsh and ssh": (
        TWO_HOSTS,
        "def test_deepspeed_over_ssh_from_the_first_host(",
    ),
    "torchrun --nnodes=2 --node-rank=R --nproc_per_node=4 --master-addr=10.0.0.1 cifar10_deepspeed.py on each machine R": (
        TWO_HOSTS,
        "def test_torchrun(",
    ),
    "sbatch run_deepspeed.sh --epochs 10 the program's flags come last": (
        SLURM,
        "def test_sbatch_as_the_document_types_it_trains_on_both_gpus(",
    ),
    "sbatch --nodes=2 --gres=gpu:4 run_deepspeed.sh sbatch's own flags come first": (SLURM, "def test_sbatch_on_two_nodes("),
    "uv run python main.py --seeds 3 --output-dir runs/three # seeds 0, 1, 2, one after another": (
        "tests/launch/test_seeds.py",
        "def test_real_runs_of_two_seeds(",
    ),
    "runs/bn_cnn-20261121-101500/": ("tests/launch/test_launchers.py", "def test_the_run_folder_says_what_was_run("),
}


@dataclass(frozen=True)
class Block:
    """A fenced or an indented block of a page."""

    page: str
    kind: str  # what the fence says
    lines: tuple[str, ...]

    @property
    def first(self) -> str:
        return plain(self.lines[0])

    @property
    def is_shell(self) -> bool:
        return self.kind in SHELL and self.first not in PRINTED and not self.first.endswith("/")  # that is a folder's tree


def plain(line: str) -> str:
    """A line without the blanks that align it."""
    return " ".join(line.removeprefix("$ ").split())


def blocks(text: str, page: str) -> list[Block]:
    """All blocks of a page in Markdown; lines that end in a backslash are joined."""
    found, lines, before = [], iter(text.splitlines()), ""
    for line in lines:
        if fence := re.match(r" {0,3}(`{3,}|~{3,})\s*(\w*)", line):
            inside = []
            for inner in lines:
                if inner.strip().startswith(fence[1]):
                    break
                inside.append(inner)
            found.append((fence[2], inside))
        elif re.match(r"( {4}|\t)\s*\S", line) and (not before.strip() or before.startswith(("    ", "\t"))):
            if before.startswith(("    ", "\t")) and found and found[-1][0] == "":
                found[-1][1].append(line)
            else:
                found.append(("", [line]))
        before = line
    joined = ((kind, re.sub(r"\\\n\s*", "", "\n".join(inside)).splitlines()) for kind, inside in found)
    return [Block(page, kind, tuple(line for line in inside if line.strip())) for kind, inside in joined if inside]


BLOCKS = [block for page in PAGES for block in blocks(page.read_text(encoding="utf-8"), page.name)]


def unaccounted(block: Block) -> list[str]:
    """The lines of a block (or its first, where it is not shell) that neither are run nor have a test that covers them."""
    lines = [plain(line) for line in block.lines if not line.lstrip().startswith("#")] if block.is_shell else [block.first]
    return [line for line in lines if line not in (*RUN, *PYTHON, *PRINTED, *COVERED)]


def test_the_finder_finds_fenced_indented_and_joined_lines():
    fenced = "```bash\nfour   # x\n```\n\n~~~\n$ five\n~~~\n```python\nsix\n```\n"
    page = f"text\n\n    one \\\n      two\n    three\n\n- list\n  more\n\n{fenced}"
    found = [(block.kind, [plain(line) for line in block.lines]) for block in blocks(page, "x")]
    assert found == [("", ["one two", "three"]), ("bash", ["four # x"]), ("", ["five"]), ("python", ["six"])]
    assert [line for block in blocks(page, "x") for line in unaccounted(block)] == [
        "one two",
        "three",
        "four # x",
        "five",
        "six",
    ]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}: {block.first[:40]}")
def test_every_block_is_accounted_for(block):
    assert unaccounted(block) == [], f"a new line in {block.page}: say in tests/test_docs.py which test runs it"


def test_no_entry_is_left_of_a_line_that_is_gone():
    there = {plain(line) for block in BLOCKS for line in block.lines}
    assert [line for line in (*RUN, *PYTHON, *PRINTED, *COVERED) if line not in there] == []


@pytest.mark.parametrize(("file", "words"), sorted(set(COVERED.values())))
def test_the_tests_that_cover_a_line_are_there(file, words):
    assert words in (PROJECT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.first in PRINTED], ids=lambda block: block.first[:40])
def test_what_is_shown_was_printed(block):
    printed = (PROJECT / PRINTED[block.first]).read_text(encoding="utf-8").splitlines()
    assert [line for line in block.lines if line != "..." and line not in printed] == []


# --- links --------------------------------------------------------------------------------------------------------------


def test_the_readme_leads_to_every_file_of_the_program_and_its_links_lead_somewhere():
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    links = set(re.findall(r"\]\(([^)\s]+)\)", text))
    files = {f"cifar10/{path.name}" for path in (PROJECT / "cifar10").glob("*.py")} - {"cifar10/__init__.py"}
    assert files - links == set()
    headings = re.findall(r"^#+ (.*)", text, re.M)
    titles = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    places = {link for link in links if not link.startswith("http")}
    assert [link for link in places if not (link[1:] in titles if link[0] == "#" else (PROJECT / link).exists())] == []


# --- those that are run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of the documents, runs/mine and runs/three/seed_0, small and real."""
    base = tmp_path_factory.mktemp("docs")
    flags = "--dataset synthetic --val-images 100 --epochs 1 --threads 1 --global-batch-size 32"
    starts = []
    for seed, folder in enumerate(("runs/mine", "runs/three/seed_0")):
        words = [*flags.split(), f"--seed={seed}", "--output-dir", str(base / folder)]
        (base / folder).parent.mkdir(parents=True, exist_ok=True)
        starts.append({"ranks": 1, "flags": words, "keep_summary": str(base / f"{seed}.json")})
    (base / "starts.json").write_text(json.dumps(starts))
    launch(1, WORKERS / "small_runs.py", str(base / "starts.json"))
    return base


@pytest.fixture
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In that folder, with the few images that its runs were made of."""
    monkeypatch.chdir(place)
    cut_down(monkeypatch)
    return place


@pytest.mark.parametrize("line", RUN)
def test_a_line_of_shell_does_what_it_says(line, there, monkeypatch, capsys):
    words = shlex.split(line.removeprefix("uv run "), comments=True)
    assert words[:3] == ["python", "-m", "cifar10"], "only these are run here"
    arguments = [name for word in words[3:] for name in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    monkeypatch.setattr(sys, "argv", ["cifar10", *arguments])
    assert main() == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    made = [Path(path) for path in re.findall(r"^report: (.*)$", said, re.M)]
    assert all(path.stat().st_size > 10_000 for path in made)
    assert made or "| [bn_cnn](mine/" in said or "| [bn_cnn](" in said


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.kind == "python"], ids=lambda block: block.first[:40])
def test_a_block_of_python_runs(block, there):
    names: dict = {}
    exec("\n".join(block.lines), names)  # our own page
    if "model" in names:
        assert set(names["saved"]["module"]) == set(names["model"].state_dict())
        assert names["saved"]["classes"] == list(cifar.CIFAR10.description.classes)
