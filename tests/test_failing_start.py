"""What fails before a run's first step is one line and exit code 2, and the folder then takes a corrected JSON."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_hostile import SMALL, Program

SGD = {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}}


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    program = Program()
    yield program
    program._process.communicate()


def of_type(name: str, **params: Any) -> dict[str, Any]:
    return {"type": name, "params": {"lr": 0.05, **params}}


FAILING = {  # what only PyTorch or DeepSpeed refuses -> what the line names
    "a range": ({"optimizer": of_type("AdamW", betas=[2.0, 0.9])}, "beta"),
    "two that do not go together": ({"optimizer": of_type("SGD", nesterov=True)}, "Nesterov"),
    "a scheduler's value": ({"scheduler": {"type": "OneCycleLR", "params": {"max_lr": 0.1}}}, "total_steps"),
    "the first step": ({"optimizer": of_type("AdamW", capturable=True, fused=False)}, "capturable"),
    "a kernel": ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, ""),
    "a schedule that ends": ({"scheduler": {"type": "OneCycleLR", "params": {"max_lr": 0.1, "total_steps": 3}}}, "OneCycleLR"),
}


@pytest.mark.parametrize("what", FAILING)
def test_what_fails_before_the_first_step_is_one_line_and_leaves_no_claim_on_the_folder(program, tmp_path: Path, what):
    sections, named = FAILING[what]
    given, flags = (
        tmp_path / "mine.json",
        [*SMALL, "--deepspeed_config", "mine.json", "--output-dir", "run", "--max-steps", "4"],
    )
    given.write_text(json.dumps({"train_batch_size": 50, "optimizer": SGD, "gradient_clipping": 1.0, **sections}))
    for more in ([], ["--dry-run"]) if what == "a range" else ([],):
        answer = program.start(tmp_path, *flags, *more)
        assert answer["code"] == 2, answer
        (line,) = answer["stderr"].splitlines()
        assert line.startswith("error: ")
        assert named in line
    given.write_text(json.dumps({"train_batch_size": 50, "optimizer": SGD, "gradient_clipping": 1.0}))
    if what == "a range":
        answer = program.start(tmp_path, *flags)
        assert answer["code"] == 0, answer
        assert json.loads((tmp_path / "run" / "ds_config.json").read_text())["optimizer"]["type"] == "SGD"
        given.write_text(json.dumps({"train_batch_size": 50, "optimizer": of_type("AdamW"), "gradient_clipping": 1.0}))
        assert "other settings" in program.start(tmp_path, *flags)["stderr"]
