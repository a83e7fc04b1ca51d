"""Distributed training: launchers, process groups, ranks and their devices."""
