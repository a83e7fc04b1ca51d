"""One file = one experiment: EXPERIMENT holds a frozen Recipe and the name of its DeepSpeed JSON."""
