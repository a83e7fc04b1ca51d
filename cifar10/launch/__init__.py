"""Starting the ranks of this machine: main.py's options, the deepspeed command line, supervision, seed sweeps."""
