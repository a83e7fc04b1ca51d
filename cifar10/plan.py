"""The plan of a run: a validated command line, before any process group starts and without importing torch."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cifar10 import UsageError
from cifar10.config import ds_check, ds_config, schedule, values
from cifar10.config.cli import Options, parse, take_old_schedule
from cifar10.config.recipe import Precisions, Recipe, invalid, load
from cifar10.data import augment, registry
from cifar10.data.dataset import Description, Images, Split, about_model, placeholder
from cifar10.data.ledger import Look
from cifar10.distributed import device
from cifar10.engine import kernels, levels
from cifar10.models import weights
from cifar10.models.registry import can_fuse, has_experts, is_sequence, model_names, refuse_unknown_model
from cifar10.run import folder as run_folder
from cifar10.run.summary import read_summary


@dataclass(frozen=True)
class Plan:
    """What to train, how to run it, and DeepSpeed's config for this world size."""

    recipe: Recipe
    options: Options
    given_config: dict[str, Any]  # DeepSpeed's config from the recipe or a file, and the command line
    ds_config: dict[str, Any]  # the same, resolved for this world size
    batch: ds_config.Batch
    notes: list[str]  # what was changed in the config, and what to know about the data set, a line each
    dataset: Description

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The model's input for one image: [C, S, S]."""
        size = self.recipe.network_size(self.dataset.size)
        return self.dataset.channels, size, size

    @property
    def precision(self) -> str:
        """The precision of matrix products: fp32, bf16 or fp16."""
        return precision_of(self.ds_config)

    def images(self, split: Split, look: Look | None = None) -> Images:
        """All images of a split in their fixed order: uint8 [N, S, S, C], and labels. For --dry-run, random ones. A `look` is
        what the ledger says of an opening of the test split."""
        if self.options.dry_run:
            return placeholder(self.dataset, split)
        return registry.images(self.recipe, split, self.options.data_dir, look)

    @property
    def settings(self) -> dict[str, Any]:
        """What makes two runs the same experiment, as read back from JSON."""
        data = {"data": {"manifest": self.dataset.manifest}} if self.dataset.manifest else {}
        return json.loads(json.dumps({"recipe": dataclasses.asdict(self.recipe), "deepspeed": self.ds_config, **data}))

    @property
    def about_the_model(self) -> dict[str, Any]:
        """Facts for a file of weights: the model's input and classes."""
        return about_model(self.recipe, self.dataset.classes, self.dataset.channels, self.dataset.size)


def precision_of(config: dict[str, Any]) -> str:
    """The precision that a resolved DeepSpeed config asks for: fp32, bf16 or fp16."""
    autocast = config.get("torch_autocast", {})
    name = str(autocast.get("dtype", "bfloat16")).lower() if autocast.get("enabled") else "float32"  # or bf16, half, ...
    return "bf16" if "b" in name else "fp32" if "32" in name else "fp16"


def choose_precision(wanted: Precisions) -> tuple[str | None, list[str]]:
    """The first of several precisions that this machine supports natively, and a note; None leaves it to the config."""
    if len(wanted) < 2:
        return (wanted[0] if wanted else None), []
    native = device.native_precisions()
    taken = next((name for name in wanted if name in native), None)
    if taken is None:
        names = " ".join(wanted)
        raise invalid("--precision", names, f"one that this {device.name()} supports natively", f"{names} fp32")
    missed = ", ".join(wanted[: wanted.index(taken)])
    reason = f"this {device.name()} does not support {missed} natively" if missed else "the first choice"
    return taken, [f"precision: {taken} of {', '.join(wanted)} ({reason})"]


_OF_FLAGS = {  # paths of DeepSpeed's config, which --set must not set as well
    "lr": ["optimizer.params.lr"],
    "global_batch_size": ["train_batch_size"],
    "micro_batch_size": ["train_micro_batch_size_per_gpu"],
    "pipeline_stages": ["pipeline.stages"],
    "precision": [f"{section}.enabled" for section in ds_check.LOW_PRECISIONS],
}


def _given_config(options: Options) -> tuple[dict[str, Any], list[str]]:
    """DeepSpeed's config from the recipe or a file, with --set and the flags that override it, and with the batch sizes of
    the recipe where it says "auto"; and notes."""
    own = ds_config.read(load(options.recipe).deepspeed)
    given = ds_config.read(options.deepspeed_config) if options.deepspeed_config else own
    given, notes = ds_config.with_values(given, options.set)
    for flag, path in ((flag, path) for flag, paths in _OF_FLAGS.items() for path in paths if getattr(options, flag)):
        if any(word.startswith(f"{path}=") for word in options.set):
            raise UsageError(f"--{flag.replace('_', '-')} and --set {path} are the same setting; leave out one of them")
    sizes = {"global_batch_size": options.global_batch_size, "micro_batch_size": options.micro_batch_size}
    given = ds_config.override(given, lr=options.lr, **sizes, stages=options.pipeline_stages)
    known = {"train_batch_size": own.get("train_batch_size")}
    sizes, auto = ds_config.without_auto({key: given.pop(key) for key in ds_check.BATCH_KEYS if key in given}, known)
    return {**given, **sizes}, [*notes, *auto]


def _without_auto(
    given: dict[str, Any], recipe: Recipe, options: Options, dataset: Description, world_size: int
) -> tuple[dict[str, Any], list[str]]:
    """The config with "auto", as in Hugging Face's JSONs, replaced by what the recipe and the data set say; and a note.

    The recipe's learning rate and weight decay are for its own optimizer; another one has PyTorch's default.
    """
    own, theirs = ds_config.read(load(options.recipe).deepspeed)["optimizer"], given["optimizer"]
    params = own["params"] if own["type"].lower() == theirs["type"].lower() else {}
    takes = ds_check.parameters_of(theirs["type"], theirs.get("params", {})) or {}
    lr = theirs["params"]["lr"] if theirs["params"]["lr"] != "auto" else params.get("lr", takes["lr"].default or 1e-3)
    per_epoch = max(1, (dataset.train_images - recipe.val_images) // ds_config.batch(given, world_size).global_images)
    steps, warmup = (max(1, round(n * per_epoch)) for n in (recipe.epochs, min(recipe.warmup_epochs, recipe.epochs / 10)))
    known = {"warmup_min_lr": 0, "warmup_max_lr": lr, "max_lr": lr, "warmup_num_steps": warmup}
    known |= dict.fromkeys(("total_num_steps", "total_steps", "total_iters", "T_max"), steps)
    optimizer = {"optimizer.params.lr": lr, "optimizer.params.weight_decay": params.get("weight_decay")}
    filled, notes = ds_config.without_auto(given, {**optimizer, **{f"scheduler.params.{k}": n for k, n in known.items()}})
    ds_check.check(filled)
    return filled, notes


def make_plan(
    argv: list[str],
    world_size: int | Callable[[int | None], int],
    program: str,
    description: str | None = None,
    extra: type | None = None,
) -> Plan:
    """Parse and check a command line for `world_size` ranks; writes nothing except a missing data set. Raises UsageError.

    `world_size` may be a function of the global batch, in images; it is given None if the batch grows with the ranks.
    """
    argv, *old_schedule = take_old_schedule(argv)
    recipe, options = parse(argv, program, _with_names(description), extra)
    notes = [note] if (note := device.choose(options.device)) else []
    refuse_unknown_model(recipe.model, **recipe.network_options)
    dataset = registry.of(recipe).describe(options.data_dir)
    recipe = _resolve_recipe(recipe, dataset, old_schedule)
    given, config_notes = _given_config(options)
    ranks = world_size if isinstance(world_size, int) else world_size(given.get("train_batch_size"))
    given, config, batch, changes = _resolve_config(given, recipe, options, dataset, ranks)
    options, level_notes = _resolve_options(options, recipe, given, config, ranks)
    notes += [*config_notes, *changes, *level_notes]
    if recipe.lr_reference_batch:
        notes.append(f"learning rate: the config's x global batch {batch.global_images} / {recipe.lr_reference_batch}")
    notes += [dataset.note] if dataset.note else []
    plan = Plan(recipe, options, given, config, batch, notes, dataset)
    _check_pipeline(plan)
    _check_experts(plan, ranks)
    _check_schedule(plan)
    _check_sizes(plan)
    _check_images(plan)
    if recipe.sync_bn and not device.count_gpus():
        raise UsageError("--sync-bn is not supported without GPUs; leave it out")
    _check_folders(plan)
    return _with_files(plan)


def _with_names(description: str | None) -> str:
    """A program's description, if it has one, with what its flags can name."""
    known = {"models": model_names(), "data sets": registry.DATASETS, "augmentations": values.classes(augment.Operation)}
    return "\n\n".join([*filter(None, [description]), *(f"{kind}: {', '.join(names)}" for kind, names in known.items())])


def _resolve_recipe(recipe: Recipe, dataset: Description, old_schedule: list[Any]) -> Recipe:
    """The recipe with its schedule and its augmentation in their canonical spelling, the normalization that of the user's own
    images unless one is given."""
    if dataset.manifest and all(getattr(recipe, name) == getattr(Recipe, name) for name in ("mean", "std")):
        recipe = dataclasses.replace(recipe, mean=dataset.mean, std=dataset.std)
    operations = augment.parse(recipe.augment)
    augment.check(operations, min((recipe.resize or dataset.size, *recipe.first_sizes)))
    lr_schedule = schedule.with_old_settings(recipe.lr_schedule, *old_schedule)
    return dataclasses.replace(recipe, lr_schedule=lr_schedule, augment=augment.as_text(operations))


def _resolve_config(
    given: dict[str, Any], recipe: Recipe, options: Options, dataset: Description, ranks: int
) -> tuple[dict[str, Any], dict[str, Any], ds_config.Batch, list[str]]:
    """The given config without "auto", the same resolved for the ranks in a precision of this machine, and notes."""
    enabled = [ds_check.look_up(given, f"{section}.enabled") for section in ds_check.LOW_PRECISIONS]
    wanted = options.precision or (load(options.recipe).precision if "auto" in enabled else ())
    given, auto_notes = _without_auto(given, recipe, options, dataset, ranks)
    precision, precision_notes = choose_precision(wanted)
    chosen = ds_config.with_precision(given, precision) if precision else given
    config, batch, changes = ds_config.resolve(chosen, ranks)
    notes = [*auto_notes, *precision_notes, *changes]
    if precision_of(config) == "fp16" and not device.count_gpus():
        notes.append("fp16 on a CPU can take 400 times as long as fp32; --precision bf16 or --precision fp32 avoids that")
    kernels.refuse_missing_kernel(config)
    return given, config, batch, notes


def _resolve_options(
    options: Options, recipe: Recipe, given: dict[str, Any], config: dict[str, Any], ranks: int
) -> tuple[Options, list[str]]:
    """The options with what "auto" stands for, and notes."""
    saving = options.gradient_checkpointing or "activation_checkpointing" in given
    asked = "eager" if saving else _asked_level(options, recipe)
    level = levels.resolve_level(options.engine_level, config, ranks, sync_bn=recipe.sync_bn, asked=asked)
    if saving and level != "eager":
        raise UsageError(f"--gradient-checkpointing is not supported with --engine-level {level}; use --engine-level eager")
    if options.sealed and options.test_images:
        raise UsageError("--test-images opens the test split, which --sealed refuses; leave out one of them")
    resolved = dataclasses.replace(
        options,
        log_every_steps=options.log_every_steps or config.get("steps_per_print") or 100,
        engine_level=level,
        gradient_checkpointing=saving,
        test_images=0 if options.sealed else options.test_images,
    )
    notes = []
    if options.engine_level == "auto" and level != "eager":
        notes = [f"engine level: {level}, as the recipe asks"]
    elif options.engine_level == "auto" and asked == "fused" and not device.count_gpus():
        why_not = levels.why_not("fused", config, ranks, recipe.sync_bn) or ""
        notes = [f"engine level: eager; fused {why_not.partition('; ')[0]}"]
    return resolved, notes


def _asked_level(options: Options, recipe: Recipe) -> levels.Level:
    """What --engine-level auto takes where it is supported: what a run to resume had on a CPU, else what the recipe asks."""
    had = run_folder.engine_level_of(options.output_dir) if options.output_dir else None
    asked = had if had in ("eager", "fused") else load(options.recipe).engine_level
    if "fused" in (asked, options.engine_level) and not can_fuse(recipe.model):
        if options.engine_level == "fused":
            raise UsageError(f"--engine-level fused has nothing to fuse in --model {recipe.model}; use --engine-level eager")
        return "eager"
    return asked


def _check_folders(plan: Plan) -> None:
    """Refuse to resume another experiment's run, and a folder of one."""
    options, manifest = plan.options, plan.dataset.manifest
    if options.resume not in ("auto", "never"):
        run_folder.refuse_other_position(run_folder.find_checkpoint(options.resume)[0].parent, plan.settings)
    if options.output_dir is None:
        return
    run_folder.refuse_unwritable(options.output_dir)
    run_folder.refuse_if_never(options.output_dir, options.resume)
    then = run_folder.manifest_of(options.output_dir)
    if then and manifest and then != manifest:
        changes = registry.of(plan.recipe).changes(options.data_dir, then)
        raise UsageError(
            f"the images in {options.data_dir} are not those that the run in {options.output_dir} began with: {changes};"
            " restore them, or choose another --output-dir"
        )
    run_folder.refuse_other_settings(options.output_dir, plan.settings)
    read_summary(options.output_dir)  # raises UsageError if it is corrupt


def _with_files(plan: Plan) -> Plan:
    """The plan when its images and weights are there; a dry run does without."""
    recipe, options, dataset = plan.recipe, plan.options, registry.of(plan.recipe)
    if options.dry_run:
        without = dataclasses.replace(recipe, weights="none" if recipe.weights == "imagenet" else recipe.weights)
        notes = [*plan.notes, f"data: {dataset.whereabouts(options.data_dir)}"]
        return dataclasses.replace(plan, recipe=without, notes=notes)
    dataset.ensure(options.data_dir, need_test=options.test_images != 0)
    weights.ensure(recipe.weights, recipe.model)
    return plan


def _check_pipeline(plan: Plan) -> None:
    """Refuse what the stages of a pipeline cannot do; whether the network has enough layers is known when it is built."""
    recipe, config, stages = plan.recipe, plan.ds_config, plan.batch.stages
    stage, optimizer = ds_check.look_up(config, "zero_optimization.stage", 0), config["optimizer"]["type"]
    timer = next((key for key in levels.TIMERS if levels.is_timed(config, key)), None)
    model = recipe.model
    refused = {
        f"--model {model}, only with functions that return an nn.Sequential; use --model vgg11": not is_sequence(model),
        f"ZeRO stage {stage}, which DeepSpeed's pipelines refuse; set zero_optimization.stage to 0 or 1": stage > 1,
        f"{optimizer}, which treats the last layer apart; use SGD or AdamW": optimizer in ds_check.OUR_OPTIMIZERS,
        "fp16, whose loss scale is one for all stages; use --precision bf16": plan.precision == "fp16",
        "--sync-bn, whose statistics are of all ranks; leave it out": recipe.sync_bn,
        f"DeepSpeed's {timer}; remove it from the JSON": timer is not None,
    }
    for reason in (reason for reason, holds in refused.items() if holds and stages > 1):
        raise UsageError(f"--pipeline-stages {stages} is not supported with {reason}")


def _check_experts(plan: Plan, ranks: int) -> None:
    """Refuse what DeepSpeed's layers of experts cannot do, and their flag for networks without any."""
    size, model, level = plan.options.expert_parallel, plan.recipe.model, plan.options.engine_level
    if not has_experts(model):
        if size:
            raise UsageError(f"--expert-parallel is not supported by --model {model}, which has no experts; see --recipe moe")
        return
    if size and ranks % size:
        raise UsageError(f"--expert-parallel {size} does not divide the number of ranks, {ranks}; use --expert-parallel 1")
    zero = {"stage": 0, **plan.ds_config.get("zero_optimization", {})}
    off = next((key for key in ("reduce_scatter", "contiguous_gradients") if zero["stage"] and zero.get(key) is False), None)
    divided_fp16 = plan.precision == "fp16" and not zero["stage"] and ranks > 1 and size != 1
    refused = {
        "ZeRO stage 3, which DeepSpeed's MoE refuses: it partitions each weight over all ranks, but not all have the same"
        " experts; set zero_optimization.stage to 0, 1 or 2": zero["stage"] == 3,
        f"zero_optimization.{off} false, which DeepSpeed's MoE refuses; leave it out": off is not None,
        "fp16 at ZeRO stage 0 and experts divided over ranks, each of which would skip steps by its own; use --precision bf16"
        " or fp32, --expert-parallel 1, or ZeRO stage 1 or 2": divided_fp16,
        f"--engine-level {level}, as DeepSpeed's MoE reads the experts' capacity on the host; use --engine-level eager": (
            level != "eager"
        ),
    }
    for reason in (reason for reason, holds in refused.items() if holds):
        raise UsageError(f"--model {model} is not supported with {reason}")


def _check_schedule(plan: Plan) -> None:
    """Refuse what a scheduler in the config would silently ignore; it may replace the recipe's own schedule."""
    if not (scheduler := plan.ds_config.get("scheduler")):
        return
    unused = {
        "lr_reference_batch": Recipe.lr_reference_batch,
        "plateau_lr_factor": Recipe.plateau_lr_factor,
        "lr_schedule": load(plan.options.recipe).recipe.lr_schedule,
    }
    for name in (name for name, value in unused.items() if getattr(plan.recipe, name) != value):
        flag, theirs = "--" + name.replace("_", "-"), scheduler.get("type")
        raise UsageError(f"{flag} is not supported with the config's scheduler, {theirs}; leave out one of them")


def _check_sizes(plan: Plan) -> None:
    """Refuse a split or a batch that the data set is too small for."""
    recipe, options, batch, dataset = plan.recipe, plan.options, plan.batch, plan.dataset
    if recipe.val_images >= dataset.train_images:
        raise invalid(
            "--val-images", recipe.val_images, f"0 to {dataset.train_images - 1}", min(5000, dataset.train_images // 10)
        )
    train_images = dataset.train_images - recipe.val_images
    if batch.global_images > train_images:
        raise UsageError(
            f"global batch {batch.global_images} is larger than the {train_images} training images;"
            f" try --global-batch-size {min(128, train_images) // batch.data_ranks * batch.data_ranks}"
        )
    if options.test_images is not None and options.test_images > dataset.test_images:
        raise invalid("--test-images", options.test_images, f"0 to {dataset.test_images}", dataset.test_images)


def _check_images(plan: Plan) -> None:
    """Refuse a normalization for another number of channels than the data set's, and crops larger than the images."""
    recipe, dataset = plan.recipe, plan.dataset
    for flag, numbers in (("--mean", recipe.mean), ("--std", recipe.std)):
        if len(numbers) != dataset.channels:
            expected = f"{dataset.channels}, one per channel of --dataset {recipe.dataset}"
            given, mean, std = (" ".join(f"{n:g}" for n in ns) for ns in (numbers, dataset.mean, dataset.std))
            raise invalid(flag, given, expected, f"--mean {mean} --std {std}")
    whole = recipe.resize or dataset.size
    if recipe.image_size > whole:
        raise invalid(
            "--image-size", recipe.image_size, f"at most {whole}, the images' size, unless --resize enlarges them", whole
        )
