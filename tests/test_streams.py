"""Output: no reader, terminal or encoding can end a run. Readers that leave, sleep or never were, from the shell."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import PROJECT, environment, run, summary

PRINTS = """
import os, sys
from pathlib import Path
from cifar10 import streams
streams.PATIENCE_SECONDS = 0.05
streams.prepare(lasting=True)
for number in range(200):
    print(number, "82.30 ± 0.36% – \\udcff", "x" * 2000)
    print("to stderr ±", file=sys.stderr)
with open(sys.argv[1], "w") as file:
    file.write(f"{file.fileno() > 2}")
"""
# what the shell does with the program's output -> the first line that a reader must have seen
PLACES = {
    "a pipe": ("{} 2>&1 | cat", "0 82.30 ± 0.36% – \\udcff x"),
    "a reader that leaves": ("{} | head -n 1", "0 82.30 ± 0.36%"),
    "a reader of both that leaves": ("{} 2>&1 | head -n 1", "0 82.30 ± 0.36%"),
    "a reader that reads nothing": ("{} 2>&1 | true", ""),
    "a reader that sleeps": ("{} 2>&1 | (read line; echo $line; while ! [ -e $DONE ]; do sleep 0.05; done)", "0 82.30 ± 0.36%"),
    "no stdout": ("{} >&-", ""),
    "no stderr": ("{} 2>&-", "0 82.30 ±"),
    "no stdin": ("{} <&-", "0 82.30 ±"),
    "nothing": ("{} <&- >&- 2>&-", ""),
    "a full disk": ("{} >/dev/full 2>&1", ""),
    "a file that is read-only": ("{} 1</dev/null", ""),
    "a terminal": ("script -qec '{}' /dev/null", "0 82.30 ± 0.36%"),
    "a background without a terminal": ("{} & wait $!", "0 82.30 ± 0.36%"),
    "nohup": ("nohup {} 2>/dev/null", "0 82.30 ± 0.36%"),
    "ASCII": ("PYTHONIOENCODING=ascii {}", "0 82.30 \\xb1 0.36% \\u2013 \\udcff x"),
    "Latin-1": ("PYTHONIOENCODING=latin-1 {} | iconv -f latin1", "0 82.30 ± 0.36% \\u2013 \\udcff x"),
    "a strict encoding": ("PYTHONIOENCODING=utf-8:strict {}", "0 82.30 ± 0.36% – \\udcff x"),
    "the C locale": ("LC_ALL=C {}", "0 82.30 "),
    "the C locale, strictly": ("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {}", "0 82.30 \\xb1 0.36% \\u2013 \\udcff x"),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_printed_never_ends_the_program(tmp_path: Path, place: str) -> None:
    """To its end, with exit code 0; no file that it opens has the number of a standard stream."""
    shell, seen = PLACES[place]
    (tmp_path / "prints.py").write_text(PRINTS, encoding="utf-8")
    program = f"{sys.executable} -S {tmp_path / 'prints.py'} {tmp_path / 'done'}"
    command = ["bash", "-o", "pipefail", "-c", shell.replace("{}", program)]
    variables = environment(PYTHONPATH=str(PROJECT), DONE=str(tmp_path / "done"))
    ended = subprocess.run(command, capture_output=True, env=variables, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert (tmp_path / "done").read_text() == "True"
    assert ended.stdout.decode().startswith(seen)


def test_what_a_sleeping_reader_does_not_take_is_lost_and_the_rest_is_not(tmp_path: Path) -> None:
    (tmp_path / "prints.py").write_text(PRINTS + "os.mkfifo(sys.argv[2]); open(sys.argv[2]).read(); print('awake')\n")
    command = [sys.executable, "-S", str(tmp_path / "prints.py"), str(tmp_path / "done"), str(tmp_path / "go")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environment(PYTHONPATH=str(PROJECT)), **pipes)
    while not (tmp_path / "go").exists():  # all is printed
        assert process.poll() is None
    taken = process.stdout.read(40_000)
    (tmp_path / "go").write_text("")
    lines = (taken + process.stdout.read()).decode().splitlines()
    assert (process.wait(), lines[-1]) == (0, "awake")
    assert "missing" in lines[-2]
    assert 1 < len(lines) < 200


PIPES = ["{} | head -n 1", "{} >&- 2>&-"]
OTHERS = ["{} 2>&1 | true", "PYTHONIOENCODING=ascii {} | cat", "{} >/dev/full", "COLUMNS=1 {}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "shell"), [*(("main.py", pipe) for pipe in PIPES), *(("cifar10_deepspeed.py", one) for one in PIPES + OTHERS)]
)
def test_a_real_run_finishes_whatever_happens_to_its_output(tmp_path: Path, program: str, shell: str) -> None:
    flags = "--dataset synthetic --max-steps 4 --log-every-steps 2 --test-images 100 --threads 1 --seed 5 --report"
    ranks = "--seeds 1 --num-gpus 1" if program == "main.py" else ""
    command = f"{sys.executable} {program} {flags} {ranks} --output-dir {tmp_path / 'run'}"
    ended = run(["bash", "-o", "pipefail", "-c", shell.replace("{}", command)])
    assert ended.returncode == 0, ended.stderr
    folder = tmp_path / "run" / ("seed_5" if ranks else "")
    assert summary(folder)["status"] == "finished"
    assert (folder / "report.html").exists()
    assert "Traceback" not in ended.stdout + ended.stderr
