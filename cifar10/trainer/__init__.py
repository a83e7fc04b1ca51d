"""A run in progress: what the functions of the script work with."""
