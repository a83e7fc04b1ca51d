"""docs/own_data.md, line by line, on generated photos: from a folder to a model that answers."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.launching import PROJECT, environment


def photograph(folder: Path, number: int, color: tuple[int, int, int], kind: str) -> None:
    """A noisy picture of one color, of its own size."""
    rng = np.random.default_rng(number)
    width, height = rng.integers(40, 90, 2)
    pixels = (np.array(color) + rng.integers(-40, 40, (height, width, 3))).clip(0, 255).astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / f"{number:03}.{kind}")


def typed(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`python WORDS` in a folder of the user's."""
    variables = environment(PYTHONPATH=str(PROJECT), CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_stranger_gets_from_a_folder_of_photos_to_a_model_that_answers(tmp_path: Path) -> None:
    for number in range(200):
        name, color = [("cat", (200, 60, 60)), ("dog", (60, 60, 200))][number % 2]
        photograph(tmp_path / "photos" / name, number, color, ("jpg", "png", "webp", "bmp")[number // 2 % 4])
    (tmp_path / "photos" / "cat" / "broken.jpg").write_bytes(b"no image")
    photograph(tmp_path, 1000, (60, 60, 200), "jpg")
    (tmp_path / "1000.jpg").rename(tmp_path / "new.jpg")
    text = (PROJECT / "docs" / "own_data.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()][:4]
    shorter = {"main.py": ["--global-batch-size", "20", "--threads", "2", "--epochs", "3"], "export": ["--formats", "onnx"]}
    for line in lines:
        words = shlex.split(line.removeprefix("uv run python "))
        program = str(PROJECT / words[0]) if words[0].endswith(".py") else words[0]
        more = next((flags for name, flags in shorter.items() if name in words), [])
        done = typed(tmp_path, program, *words[1:], *more)
        assert done.returncode == 0, done.stderr
        if "main.py" in words:
            assert "cat/broken.jpg" in done.stderr
            assert "1 of 201 files are left out" in done.stdout
        if "predict" in words:
            assert re.match(r"new\.jpg: dog \d", done.stdout)
    summary = json.loads((tmp_path / "runs" / "photos" / "summary.json").read_text())
    assert summary["test_images"] == 40
    assert summary["test_accuracy"] == 1
    assert json.loads((tmp_path / "runs/photos/export/export.json").read_text())["about"]["classes"] == ["cat", "dog"]
    photograph(tmp_path / "photos" / "dog", 999, (0, 0, 0), "png")
    again = typed(tmp_path, str(PROJECT / "main.py"), *shlex.split(lines[0])[4:], *shorter["main.py"])
    assert again.returncode == 2
    assert "1 added (dog/999.png)" in again.stderr
