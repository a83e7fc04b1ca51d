"""One file is one experiment: its docstring is the claim, EXPERIMENT holds the recipe and its DeepSpeed config."""
