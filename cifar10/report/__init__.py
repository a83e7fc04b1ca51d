"""Reports: statistics, plots and HTML."""
