"""`plain_load.py RUN` loads a run's best_model and final without DeepSpeed and prints facts about them as JSON."""

import json
import sys
from pathlib import Path

import torch

from cifar10.data import synthetic
from cifar10_deepspeed import CIFAR10CNNEnhanced


def main() -> None:
    images = synthetic.synthetic("test", 200, seed=0)
    seen = {}
    for name in ("best_model", "final"):
        content = torch.load(Path(sys.argv[1]) / "checkpoints" / name / "mp_rank_00_model_states.pt")
        model = CIFAR10CNNEnhanced()
        model.load_state_dict(content["module"])
        mean, std = (torch.tensor(content["normalization"][key])[:, None, None] for key in ("mean", "std"))
        pixels = torch.from_numpy(images.pixels).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            predicted = model.eval()((pixels - mean) / std).argmax(dim=1)
        seen[name] = {
            "correct": int((predicted == torch.from_numpy(images.labels)).sum()),
            "dtypes": sorted({str(value.dtype) for key, value in content["module"].items() if "num_batches" not in key}),
            "facts": {key: value for key, value in content.items() if key != "module"},
        }
    print(json.dumps({**seen, "deepspeed was imported": any(name.split(".")[0] == "deepspeed" for name in sys.modules)}))


if __name__ == "__main__":
    main()
