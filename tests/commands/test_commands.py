"""python -m cifar10: which commands there are, and that one does not import what only another needs."""

import json
import subprocess
import sys

import pytest

from cifar10.__main__ import COMMANDS, main
from tests.launching import PROJECT, environment


def test_without_a_command_all_are_listed(capsys):
    assert main(["--help"]) == main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in COMMANDS)


def test_an_unknown_command_is_refused(capsys):
    assert main(["evalute"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown command evalute")


LOOK = """
import json, sys
from cifar10.__main__ import main
try:
    main([{command!r}, "--help"])
except SystemExit:
    pass
libraries = "torch deepspeed torchvision onnx onnxruntime onnxscript safetensors PIL matplotlib wandb".split()
print(json.dumps([name for name in libraries if name in sys.modules]))
"""


@pytest.mark.parametrize(
    ("command", "loaded"),
    [("doctor", []), ("predict", ["torch", "PIL"]), ("evaluate", ["torch"]), ("export", ["torch"]), ("recipes", [])],
)
def test_a_command_imports_what_it_needs(command, loaded):
    words = [sys.executable, "-c", LOOK.format(command=command)]
    done = subprocess.run(words, cwd=PROJECT, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert json.loads(done.stdout.splitlines()[-1]) == loaded, done.stderr
