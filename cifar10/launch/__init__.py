"""Starting ranks: the launcher's command line, and what main.py does until its last process has ended."""
