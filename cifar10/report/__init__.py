"""Runs as numbers, plots and pages."""
