"""Uses an export without DeepSpeed and this program, and prints as JSON how its predictions compare.

    uv venv plain && uv pip install --python plain torch numpy safetensors onnxruntime
    plain/bin/python tests/workers/plain_environment.py RUN/export IMAGES RUN/test_predictions.npz

IMAGES is CIFAR-10's own test_batch, or a .npz with uint8 `images` [N, C, S, S]. test_predictions.npz, from `python -m cifar10
evaluate RUN`, holds the expected logits. Exit code 1 unless all fp32 files give the same predictions, with logits within 1e-4.
"""

import hashlib
import importlib.util
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from safetensors.torch import load_file

TEST_BATCH_MD5 = "40351d587109b95175f43aff81a1287e"
TOLERANCE = 1e-4


def read_images(path: Path) -> np.ndarray:
    if path.suffix == ".npz":
        return np.load(path)["images"]
    content = path.read_bytes()
    assert hashlib.md5(content, usedforsecurity=False).hexdigest() == TEST_BATCH_MD5  # a pickle can run code
    return pickle.loads(content, encoding="latin1")["data"].reshape(-1, 3, 32, 32)


def imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def readers(folder: Path) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """File -> a function from float32 images in 0..1 to logits, for each file that exists."""
    network, about = imported(folder / "network.py"), json.loads((folder / "export.json").read_text())["about"]
    mean, std = (torch.tensor(about["normalization"][key])[:, None, None] for key in ("mean", "std"))

    def with_weights(weights: dict[str, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        model = getattr(network, about["model"])(num_classes=len(about["classes"])).eval()
        model.load_state_dict(weights)
        return lambda images: model((images - mean) / std)

    def onnx(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        session = onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    ways = {
        "model.safetensors": lambda name: with_weights(load_file(folder / name)),
        "state_dict.pt": lambda name: with_weights(torch.load(folder / name)),
        "model.pt2": lambda name: torch.export.load(folder / name).module(),
        **dict.fromkeys(("model.onnx", "model_int8.onnx"), onnx),
    }
    return {name: way(name) for name, way in ways.items() if (folder / name).exists()}


@torch.no_grad()
def main(folder: Path, images_file: Path, predictions_file: Path) -> int:
    images = torch.from_numpy(read_images(images_file).copy()).float() / 255
    with np.load(predictions_file) as file:
        wanted, labels = file["logits"], file["labels"]
    assert len(images) == len(wanted)
    rows = {}
    for name, answer in readers(folder).items():
        logits = torch.cat([answer(batch) for batch in images.split(1000)]).numpy()
        rows[name] = {
            "images": len(logits),
            "same answers": int((logits.argmax(1) == wanted.argmax(1)).sum()),
            "largest difference": float(np.abs(logits - wanted).max()),
            "accuracy": float((logits.argmax(1) == labels).mean()),
        }
    imports = [name for name in ("deepspeed", "cifar10", "cifar10_deepspeed") if sys.modules.get(name) is not None]
    print(json.dumps({"python": sys.executable, "imported": imports, "files": rows}, indent=2))
    exact = [row for name, row in rows.items() if "int8" not in name]
    agree = all(row["same answers"] == row["images"] and row["largest difference"] <= TOLERANCE for row in exact)
    return 0 if exact and agree and not imports else 1


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
