"""The commands of python -m cifar10, one file each."""
