"""What a run says and measures, and where that goes: console, CSV, TensorBoard, W&B."""
