"""`python -m cifar10 export RUN`: a trained model in files that other programs read.

model.safetensors   the bare network's weights and buffers; its header says how to use them
state_dict.pt       the same as a plain state dict: torch.load reads it in its safe default
network.py          the network's source file, plain PyTorch, for the two above
model.pt2           torch.export's program: weights, network and normalization in one; takes images in 0..1
model.onnx          the same for ONNX runtimes; the batch may have any size
model_int8.onnx     the same with 8-bit weights and activations, calibrated on training images
export.json         the inputs and outputs of each, and what the checks measured

None of them needs this program or DeepSpeed. Each file is read back and run on the test images, and the command fails if its
answers differ from the model's.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
import tyro
from rich.console import Console
from torch import Tensor, nn

from cifar10 import UsageError
from cifar10.commands.common import Count, DataDir, Run, Sealed, Threads, WhichModel, number_table, quotients, settle
from cifar10.commands.evaluate import answers, first_images, split_images
from cifar10.data.dataset import Images
from cifar10.data.ledger import Look
from cifar10.data.loader import EvaluationLoader, at_once
from cifar10.distributed.world import World
from cifar10.models.registry import arguments_of, build_model, source_file
from cifar10.models.weights import METADATA_KEY, read_weights
from cifar10.run import folder as run_folder
from cifar10.run import trained
from cifar10.run.trained import SAFETENSORS_FILE, Trained

Format = Literal["safetensors", "state_dict", "torch_export", "onnx", "onnx_int8"]
FORMATS: tuple[Format, ...] = get_args(Format)
FILES: dict[str, str] = {
    "safetensors": SAFETENSORS_FILE,
    "state_dict": "state_dict.pt",
    "torch_export": "model.pt2",
    "onnx": "model.onnx",
    "onnx_int8": "model_int8.onnx",
}
NETWORK_FILE, FACTS_FILE, DRAFT = "network.py", "export.json", ".draft"
OURS = {*FILES.values(), NETWORK_FILE, FACTS_FILE, DRAFT}
TOLERANCE = 1e-4  # between the logits of a file in fp32 and of the model
CALIBRATION_IMAGES = 1_000
ROUNDS, BATCHES, BATCH_IMAGES = 9, 10, 100  # of the timing; images of 32x32 pixels, fewer if they are larger
ROUND_SECONDS = 0.2  # for one model; large networks take fewer batches, and at least one
BATCH_OF_ANY_SIZE = {"images": {0: torch.export.Dim("batch")}}

Classifier = Callable[[Tensor], Tensor]  # float32 [B, C, S, S] in 0..1 -> logits [B, classes]


class WithNormalization(nn.Module):
    """The network behind its normalization, in evaluation mode: takes images in 0..1."""

    def __init__(self, found: Trained) -> None:
        super().__init__()
        self.network = found.model
        for name, values in (("mean", found.recipe.mean), ("std", found.recipe.std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None])
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, C, S, S] in 0..1 -> logits [B, classes]."""
        return self.network((images - self.mean) / self.std)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence libraries' logs, warnings and prints; their errors are still raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# --- writing, and reading back ------------------------------------------------------------------------------------------


def how_to_feed(found: Trained) -> dict[str, str]:
    """The inputs and outputs of the files, for export.json, ONNX's metadata and the console."""
    channels, size, _ = found.image_shape
    resize, kind = found.recipe.resize, "RGB" if channels == 3 else "grayscale"
    fitted = f"resized to {resize}x{resize} (bilinear, antialiased)" if resize else ""
    cut = f"cut to its middle {size}x{size}" if size != (resize or found.dataset_size) else ""
    made = ", then ".join(word for word in (fitted, cut) if word) or "taken as it is"
    whole = f"{found.dataset_size}x{found.dataset_size}"
    chosen = arguments_of(found.recipe.model, len(found.classes), found.image_shape, **found.recipe.network_options)
    arguments = ", ".join(f"{name}={value!r}" for name, value in chosen.items())
    shape = f"float32 [N, {channels}, {size}, {size}], {kind}, 0..1"
    return {
        "images": f"{shape} (a byte divided by 255); an image of {whole} is {made}",
        "model.pt2, model.onnx, model_int8.onnx": "take such images: the normalization is inside",
        "model.safetensors, state_dict.pt": "are the bare network's: normalize first, (images - mean) / std for each channel",
        "network.py": f"builds that network: network.{found.recipe.model.partition(':')[0]}({arguments}).eval()",
        "logits": f"float32 [N, {len(found.classes)}], in the order of classes; softmax turns them into probabilities",
    }


@dataclass(frozen=True)
class Job:
    """One export in progress: the model, the folder its files are written to, and images to calibrate with."""

    found: Trained
    folder: Path
    calibration: Callable[[], list[np.ndarray]]  # batches of training images, float32 [B, C, S, S] in 0..1
    threads: int

    def path(self, name: str) -> Path:
        return self.folder / FILES[name]

    @property
    def weights(self) -> dict[str, Tensor]:
        """Each tensor in memory of its own, contiguous."""
        return {name: value.contiguous().clone() for name, value in self.found.model.state_dict().items()}


def write_safetensors(job: Job) -> None:
    from safetensors.torch import save  # its save_file makes files that only their owner can read

    job.path("safetensors").write_bytes(save(job.weights, {"format": "pt", METADATA_KEY: json.dumps(job.found.about)}))


def write_torch_export(job: Job) -> None:
    example = torch.rand(2, *job.found.image_shape)
    program = torch.export.export(WithNormalization(job.found), (example,), dynamic_shapes=BATCH_OF_ANY_SIZE)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths on this machine
    torch.export.save(program, job.path("torch_export"), extra_files={f"{METADATA_KEY}.json": json.dumps(job.found.about)})


def _describe_onnx(path: Path, job: Job) -> None:
    """Add the model's metadata, and remove the paths of this machine that the exporter wrote."""
    import onnx

    model = onnx.load(path)
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
    facts = {METADATA_KEY: json.dumps(job.found.about), "classes": json.dumps(job.found.classes)}
    onnx.helper.set_model_props(model, {**facts, **how_to_feed(job.found)})
    onnx.checker.check_model(model)
    onnx.save(model, path)


def write_onnx(job: Job) -> None:
    names = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": BATCH_OF_ANY_SIZE}
    model, how = WithNormalization(job.found), {"dynamo": True, "verbose": False, "external_data": False}
    torch.onnx.export(model, (torch.rand(2, *job.found.image_shape),), job.path("onnx"), **how, **names)
    _describe_onnx(job.path("onnx"), job)


def write_onnx_int8(job: Job) -> None:
    """Weights by channel and activations in 8 bits, their ranges calibrated on training images."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        feeds = iter([{"images": batch} for batch in job.calibration()])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    if not job.path("onnx").exists():
        write_onnx(job)
    prepared = job.folder / "prepared.onnx"
    # symbolic shapes are for transformers, and older versions cannot infer those of a dynamic batch
    quant_pre_process(str(job.path("onnx")), str(prepared), skip_symbolic_shape=True)
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    how = {"quant_format": QuantFormat.QDQ, "per_channel": True, "op_types_to_quantize": ["Conv", "Gemm", "MatMul", "MaxPool"]}
    quantize_static(str(prepared), str(job.path("onnx_int8")), Reader(), **how, **types)
    prepared.unlink()
    _describe_onnx(job.path("onnx_int8"), job)


def read_back(name: str, job: Job) -> Classifier:
    path = job.path(name)
    if name in ("safetensors", "state_dict"):
        recipe, classes = job.found.recipe, len(job.found.classes)
        model = build_model(recipe.model, recipe.seed, classes, job.found.image_shape, **recipe.network_options)
        model.load_state_dict(read_weights(path, str(path), "export again")[0])
        return WithNormalization(replace(job.found, model=model))
    if name == "torch_export":
        return torch.export.load(path).module()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.contiguous().numpy()})[0])


WRITERS: dict[str, Callable[[Job], None]] = {
    "safetensors": write_safetensors,
    "state_dict": lambda job: torch.save(job.weights, job.path("state_dict")),
    "torch_export": write_torch_export,
    "onnx": write_onnx,
    "onnx_int8": write_onnx_int8,
}


# --- checking -----------------------------------------------------------------------------------------------------------


def in_zero_to_one(images: Images, found: Trained, world: World) -> EvaluationLoader:
    """The images as an exported file takes them: float32 [B, C, S, S] in 0..1."""
    loader = EvaluationLoader.of(images.pixels, images.labels, found.recipe, world)
    return replace(loader, normalize=lambda images: images.to(torch.float32).div_(255))


@torch.no_grad()
def logits_of(classifier: Classifier, loader: EvaluationLoader) -> np.ndarray:
    """All of a split, float32 [N, classes]; the first batches have 1 and 3 images, since a batch may have any size."""
    parts = []
    for number, (images, _) in enumerate(loader):
        pieces = (images[:1], images[1:4], images[4:]) if number == 0 else (images,)
        parts += [classifier(piece) for piece in pieces if len(piece)]
    return torch.cat(parts).numpy()


def check(name: str, path: Path, logits: np.ndarray, labels: np.ndarray, wanted: np.ndarray) -> dict[str, Any]:
    """How a file's answers compare with the model's on the same test images; those of INT8, which rounds, are not judged."""
    same, largest = int((logits.argmax(1) == wanted.argmax(1)).sum()), float(np.abs(logits - wanted).max())
    return {
        "format": name,
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "accuracy": float((logits.argmax(1) == labels).mean()),
        "same_answers": same,
        "images": len(labels),
        "largest_difference": largest,
        "agrees": name == "onnx_int8" or (same == len(labels) and largest <= TOLERANCE),
    }


@torch.no_grad()
def speeds(models: dict[str, Classifier], batch: Tensor) -> dict[str, list[float]]:
    """Images per second of each in every round, in turns, so that other load on the machine affects all of them."""
    found: dict[str, list[float]] = {name: [] for name in models}
    batches = dict.fromkeys(models, 1)
    for number in range(ROUNDS + 1):
        for name, classifier in models.items():
            classifier(batch) if number == 0 else None  # with all that is done once
            started = time.perf_counter()
            for _ in range(batches[name]):
                classifier(batch)
            seconds = time.perf_counter() - started
            if number:
                found[name].append(batches[name] * len(batch) / seconds)
            else:
                batches[name] = max(1, min(BATCHES, int(ROUND_SECONDS / seconds)))
    return found


def times_as_fast(ours: list[float], base: list[float]) -> tuple[float, float, float]:
    """The median of the rounds' quotients, the smallest and the largest."""
    rounds = quotients(ours, base)
    return median(rounds), min(rounds), max(rounds)


def claim(output: Path) -> Path:
    """Make the folder and a draft in it. Raises UsageError for a folder with anything but an earlier export."""
    try:
        names = {path.name for path in output.iterdir()} if output.exists() else set()
        if names - {DRAFT} and FACTS_FILE not in names:
            raise UsageError(f"--output {output} is not empty and holds no export; choose another folder")
        shutil.rmtree(output / DRAFT, ignore_errors=True)
        (output / DRAFT).mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"--output {output} cannot be written to ({error.strerror}); choose another folder") from None
    return output / DRAFT


def publish(draft: Path, output: Path) -> None:
    """Replace an earlier export's files by the draft's, export.json last."""
    made = sorted(draft.iterdir(), key=lambda path: path.name == FACTS_FILE)
    for name in OURS - {path.name for path in made} - {DRAFT}:
        (output / name).unlink(missing_ok=True)
    for path in made:
        os.replace(path, output / path.name)
    draft.rmdir()


def write_all(job: Job, formats: tuple[Format, ...]) -> None:
    """Raises UsageError if a library is missing or the disk is full."""
    try:
        with _quietly():
            for name in FORMATS:  # int8 is made from onnx
                if name in formats:
                    WRITERS[name](job)
        if "onnx" not in formats:
            job.path("onnx").unlink(missing_ok=True)
        shutil.copyfile(source_file(job.found.recipe.model), job.folder / NETWORK_FILE)
    except ImportError as error:
        raise UsageError(f"{error.name} is not installed, and --formats {name} needs it; type uv sync") from None
    except OSError as error:
        raise UsageError(f"{job.folder.parent}: {error.strerror or error}; make room, or choose another --output") from None


def check_all(job: Job, formats: tuple[Format, ...], images: Images, world: World) -> tuple[list[Any], dict[str, Any]]:
    """A check of each file, and the accuracy and speed of the model itself."""
    found = job.found
    _, predictions = answers(found.model, images, found, world)
    wanted, loader = predictions.logits, in_zero_to_one(images, found, world)
    with _quietly():
        models = {name: read_back(name, job) for name in FORMATS if name in formats}
        checks = [check(name, job.path(name), logits_of(models[name], loader), images.labels, wanted) for name in models]
        some = replace(loader, batch_images=at_once(BATCH_IMAGES, found.image_shape[1]))
        batch, itself = next(iter(some))[0], WithNormalization(found)
        programs = {name: model for name, model in models.items() if name not in ("safetensors", "state_dict")}
        fast = speeds({"model": lambda x: itself(x.to(memory_format=torch.channels_last)), **programs}, batch)
    facts = {"accuracy": predictions.accuracy, "images_per_second": fast["model"], "batch_images": len(batch)}
    return [{**row, "images_per_second": fast.get(row["format"], [])} for row in checks], facts


def show(checks: list[dict[str, Any]], itself: dict[str, Any], job: Job, console: Console) -> None:
    answered = number_table("file", "KB", "test accuracy", "same answers", "difference")
    fast = number_table("file", "images/s, median", "x the model's", "min .. max")
    size, own = sum(value.nbytes for value in job.found.model.state_dict().values()), itself["images_per_second"]
    answered.add_row("the model itself", f"{size / 1e3:,.0f}", f"{itself['accuracy']:.2%}", "-", "-")
    fast.add_row("the model itself", f"{median(own):,.0f}", "1.00", "-")
    for row in checks:
        same = f"{row['same_answers']:,} of {row['images']:,}", f"{row['largest_difference']:.1e}"
        answered.add_row(row["file"], f"{row['bytes'] / 1e3:,.0f}", f"{row['accuracy']:.2%}", *same)
        if rounds := row["images_per_second"]:
            times, least, most = times_as_fast(rounds, own)
            fast.add_row(row["file"], f"{median(rounds):,.0f}", f"{times:.2f}", f"{least:.2f} .. {most:.2f}")
    console.print(answered, fast, sep="\n")
    threads = f"{job.threads} thread{'s' if job.threads > 1 else ''}"
    console.print("difference: the largest of any logit;  x the model's: the median of the rounds' quotients")
    console.print(f"(on the CPU, {threads}, batches of {itself['batch_images']}, {ROUNDS} rounds in turns: compare ratios)")


def run(
    where: Run,
    output: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None,
    formats: tuple[Format, ...] = FORMATS,
    which: WhichModel = "best_model",
    test_images: Count = None,
    data_dir: DataDir = None,
    threads: Threads = None,
    sealed: Sealed = False,
    device: Annotated[Literal["auto", "cpu"], tyro.conf.arg(help="Files are made and checked on the CPU.")] = "auto",
) -> int:
    """Write a trained model to files that need neither this program nor DeepSpeed, and check each of them.

    The exit code is 1 if a file's answers differ from the model's; INT8 rounds, so its differences are only counted.
    TorchScript is not offered: PyTorch has deprecated it in favor of torch.export.

    Args:
        output: Where the files go (default: export/ in the run's folder).
        formats: Which files to write.
        test_images: How many test images the files are checked on (default: all).
    """
    settle(device)
    world = replace(trained.alone(threads), device=torch.device("cpu"))
    found = trained.load(where, which, world)
    if output is None and found.run is None:
        raise UsageError(f"{where} is not in a run's folder, so --output is needed, for example --output exported")
    if not formats:
        raise UsageError(f"--formats is empty, expected one or more of {' '.join(FORMATS)}")
    look = Look([found.run] if found.run else [], test_images, sealed)
    images = first_images(split_images(found, "test", data_dir, look), test_images, "--test-images")

    def calibration() -> list[np.ndarray]:
        train = split_images(found, "train", data_dir)
        few = Images(train.pixels[:CALIBRATION_IMAGES], train.labels[:CALIBRATION_IMAGES])
        loader = replace(in_zero_to_one(few, found, world), batch_images=100)
        return [batch.contiguous().numpy() for batch, _ in loader]

    folder = output or found.run / "export"
    job = Job(found, claim(folder), calibration, torch.get_num_threads())
    try:
        write_all(job, formats)
        checks, itself = check_all(job, formats, images, world)
        look.learned(accuracy=itself["accuracy"])
        packages = {name: version(name) for name in ("torch", "safetensors", "onnx", "onnxruntime")}
        facts = {"about": found.about, "how_to_feed": how_to_feed(found), "made_with": packages, "from": found.which}
        measured = {"tolerance": TOLERANCE, "calibration_images": CALIBRATION_IMAGES, "threads": job.threads}
        run_folder.write_json(job.folder / FACTS_FILE, {**facts, **measured, "model": itself, "checks": checks})
        publish(job.folder, folder)
    finally:
        shutil.rmtree(job.folder, ignore_errors=True)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    show(checks, itself, job, console)
    console.print(*map(": ".join, how_to_feed(found).items()), sep="\n")
    console.print(f"written to {folder}, with {NETWORK_FILE} and {FACTS_FILE}")
    wrong = [row for row in checks if not row["agrees"]]
    for row in wrong:
        differs = f"{row['images'] - row['same_answers']} other answers, logits differ by up to {row['largest_difference']:.1e}"
        console.print(f"{row['file']} does not agree with the model: {differs}; do not use it")
    return 1 if wrong else 0
