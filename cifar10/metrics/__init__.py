"""What a run measures and prints, and where it goes: the console, CSV files, TensorBoard, W&B, MLflow."""
