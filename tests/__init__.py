"""Tests train hundreds of tiny runs, in processes that inherit this: none renders a report unless asked to."""

import os

os.environ.setdefault("CIFAR10_REPORT", "0")
