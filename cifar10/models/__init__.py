"""The networks. Every public function in these files builds one, and `--model` takes its name (see registry.py)."""
