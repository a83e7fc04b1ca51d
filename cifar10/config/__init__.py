"""What is asked for: recipes, the command line, DeepSpeed's JSON. Nothing here imports torch."""
