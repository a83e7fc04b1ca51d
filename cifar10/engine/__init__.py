"""DeepSpeed's engine, and what it lacks."""
