"""Ranks and what they run on: launchers, process groups, devices."""
