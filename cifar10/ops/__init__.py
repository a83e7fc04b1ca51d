"""Operations of this program in C++, for CPUs, each beside the PyTorch operations that it replaces."""
