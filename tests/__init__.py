"""Tests train hundreds of tiny runs, in processes that inherit this: none draws its report unless it is told to."""

import os

os.environ.setdefault("CIFAR10_REPORT", "0")
