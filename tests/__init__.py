"""Tests start hundreds of processes, which inherit this: none renders a report unless asked to, and none compiles torch and
DeepSpeed anew, which takes longer than to import them, where Python is told to write no bytecode beside the sources."""

import os
import sys
from pathlib import Path

os.environ.setdefault("CIFAR10_REPORT", "0")
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).resolve().parent.parent / ".pytest_cache" / "bytecode")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
