"""Train a CNN on CIFAR-10 with DeepSpeed, on a CPU or on GPUs, and measure what it has learned on images it never saw.

    deepspeed --num_gpus=2 cifar10_deepspeed.py            the deepspeed launcher
    torchrun --nproc_per_node=2 cifar10_deepspeed.py       torch's
    python cifar10_deepspeed.py                            one process
    python main.py                                         finds the GPUs and supervises the launcher

Read it from top to bottom: the network and its images, the learning rate, one step, one epoch, the whole run.
"""

import math
import shlex
import sys
import time
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from cifar10 import RunFailed, UsageError, streams
from cifar10.config.cli import without_launcher_flags
from cifar10.config.recipe import Recipe, as_json
from cifar10.config.schedule import get_lr_schedule
from cifar10.config.schedule import parse as lr_schedule
from cifar10.data.dataset import Images, stratified_split
from cifar10.data.ledger import Look
from cifar10.data.loader import EvaluationLoader, MicroBatch, TrainLoader
from cifar10.distributed import launchers
from cifar10.distributed import world as distributed
from cifar10.distributed.world import World
from cifar10.engine import experts, pipeline
from cifar10.engine import schedule as json_scheduler
from cifar10.engine.cuda_graphs import accelerate
from cifar10.engine.engine import Engine, checkpoint_blocks, leave, own_optimizer, prepare, synchronize_batch_norm
from cifar10.engine.full_state import weights_sha256
from cifar10.engine.loss import count_correct, cross_entropy
from cifar10.metrics import text
from cifar10.metrics.open import open_sinks
from cifar10.metrics.sink import EpochRow, Metrics, StepRow
from cifar10.models.bn_cnn import CIFAR10CNNEnhanced
from cifar10.models.lenet import Net
from cifar10.models.mnist_cnn import CNNModelEnhanced
from cifar10.models.registry import build_model
from cifar10.models.weights import check_initial_weights, check_shapes, freeze, load
from cifar10.plan import Plan, make_plan
from cifar10.run import checkpoint, patience
from cifar10.run import folder as run_folder
from cifar10.run.chain import Chain
from cifar10.run.evaluation import Augmented, calculate_accuracy, evaluate
from cifar10.run.metric_buffer import MetricBuffer, count_steps
from cifar10.run.predictions import TEST_FILE, save_predictions
from cifar10.run.state import RunState, Sums
from cifar10.run.stop import StopRequest, handlers_given_back
from cifar10.run.summary import EndedBy, SplitResult, has_finished, test_fields
from cifar10.trainer import dry_run
from cifar10.trainer.run import Run

# The names that the reference documents import from this file.
__all__ = ["CIFAR10CNNEnhanced", "CNNModelEnhanced", "Net", "calculate_accuracy", "get_lr_schedule", "run"]

# --- the network and its images ------------------------------------------------------------------------------------------


def initial_model(plan: Plan) -> tuple[nn.Module, list[str]]:
    """The recipe's network with the weights that training starts from, and what to know of them. Raises UsageError."""
    recipe = plan.recipe
    classes, options = len(plan.dataset.classes), recipe.network_options
    model = build_model(recipe.model, recipe.seed, classes, plan.image_shape, **options)
    notes = [*load(model, recipe.model, recipe.weights), *freeze(model, recipe.train_only)]
    check_initial_weights(model, recipe.model)
    for shape in (plan.image_shape, *((plan.dataset.channels, size, size) for size in recipe.first_sizes)):
        check_shapes(model, recipe.model, shape, classes)
    if plan.options.gradient_checkpointing:
        checkpoint_blocks(model, recipe.model, plan.given_config.get("activation_checkpointing"))
    pipeline.check_layers(model, recipe.model, plan.ds_config)
    return model, notes


def get_cifar10_dataloaders(plan: Plan, world: World, images: Images | None = None) -> tuple[TrainLoader, EvaluationLoader]:
    """The training images, augmented as the recipe says, and the held-out validation images as they are."""
    images = images or plan.images("train")
    train, val = stratified_split(images.labels, plan.recipe.val_images, plan.recipe.split_seed)
    bf16 = plan.precision == "bf16"
    classes, pixels, labels = len(plan.dataset.classes), images.pixels[train], images.labels[train]
    train_loader = TrainLoader.of(pixels, labels, plan.recipe, plan.batch, world, bf16=bf16, classes=classes)
    return train_loader, EvaluationLoader.of(images.pixels[val], images.labels[val], plan.recipe, world)


# --- the learning rate ------------------------------------------------------------------------------------------------


def total_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Steps of the whole schedule: --epochs in steps, rounded, and at least one."""
    return max(1, round(recipe.epochs * steps_per_epoch))


def lr_multiplier(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """What the base learning rate is multiplied by at `step`, a pure function of it: a linear warmup, then --lr-schedule.

    A step counts as its middle, (step + 1/2) / steps_per_epoch epochs, so that the first and the last step both learn. With
    `per_epoch`, an epoch counts from its start, and in the warmup from its end, as in `get_lr_schedule`.
    """
    schedule = lr_schedule(recipe.lr_schedule)
    epochs = total_steps(recipe, steps_per_epoch) / steps_per_epoch  # those of whole steps, so that no step lies past the end
    warmup = schedule.warmup(recipe.warmup_epochs, epochs)
    epoch = step // steps_per_epoch if schedule.per_epoch else (step + 0.5) / steps_per_epoch
    if epoch < warmup:
        return min(1.0, (epoch + schedule.per_epoch) / warmup)
    return schedule.factor(epoch, warmup, epochs)


# --- one step, one epoch ------------------------------------------------------------------------------------------------


def train_step(engine: Engine, micro_batches: list[MicroBatch], smoothing: float) -> tuple[Tensor, Tensor]:
    """One update of the weights: the mean loss of this rank's images, and how many of them were classified correctly.

    Labels are classes, int64 [B], or their probabilities, float32 [B, classes], of which the dominant one counts.
    """
    losses, corrects = [], []
    for images, labels in micro_batches:
        logits = engine.forward(images).float()
        loss = cross_entropy(logits, labels, smoothing)
        engine.backward(loss)
        engine.step()  # updates the weights after the last micro-batch
        losses.append(loss.detach())
        corrects.append(count_correct(logits, labels))
    return (losses[0], corrects[0]) if len(losses) == 1 else (torch.stack(losses).mean(), torch.stack(corrects).sum())


def log_steps(run: Run, state: RunState) -> None:
    """Add up the metrics of the last steps; at a log point, a row for steps.csv and the console."""
    limit, images = run.plan.recipe.max_skipped_in_a_row, run.plan.batch.global_images
    count_steps(run.buffer.read(run.world), state, global_images=images, max_skipped_in_a_row=limit)
    sums = state.interval_sums
    at_log_point = state.epoch_step % run.plan.options.log_every_steps == 0 or state.epoch_step == run.train.steps_per_epoch
    if at_log_point and sums.steps + sums.skipped:
        means = sums.mean_loss, sums.accuracy, sums.mean_grad_norm
        run.metrics.step(StepRow(state.step, state.epoch + 1, *means, run.engine.lr, sums.skipped))
        state.interval_sums = Sums()


def train_one_epoch(run: Run, state: RunState) -> bool:
    """Train to the end of the epoch under way, or to the run's last step. True if the run was asked to stop on the way."""
    recipe, every, stopping = run.plan.recipe, run.plan.options.log_every_steps, False
    started = time.perf_counter() - run.engine.capture_seconds  # capturing CUDA graphs is not training
    lr_scale = recipe.lr_scale(run.plan.batch.global_images) * state.lr_factor
    run.engine.train()
    for micro_batches in run.train.epoch(state.epoch, first_step=state.epoch_step):
        if state.step == run.last_step or stopping:
            break
        run.engine.set_lr(lr_scale * lr_multiplier(recipe, state.step, run.train.steps_per_epoch))
        loss, correct = run.step(run.engine, micro_batches, recipe.label_smoothing)
        run.buffer.write(loss, correct, run.engine.grad_norm, run.engine.skipped, run.engine.routed)
        state.step += 1
        state.epoch_step += 1
        if run.buffer.is_full or state.epoch_step % every == 0:
            log_steps(run, state)
        stopping = run.stop.agreed()
    log_steps(run, state)
    state.train_seconds += time.perf_counter() - run.engine.capture_seconds - started
    return stopping and state.step < run.last_step


# --- the whole run ------------------------------------------------------------------------------------------------------


def validate(run: Run, state: RunState) -> list[SplitResult]:
    """Measure the weights, and their average if there is one; keep the best yet as best_model. [] if nothing is held out."""
    results: list[SplitResult] = []
    for averaged in ([False, True] if run.engine.has_average else [False]) if len(run.val) else []:
        weights = run.engine.portable_state(averaged=averaged)
        run.model.load_state_dict(weights)
        result = evaluate(run.model, run.val, run.world)
        facts = {"step": state.step, "val_accuracy": result.accuracy}
        if result.accuracy > state.best_accuracy and run.save_portable("best_model", weights, facts):
            state.best_accuracy, state.best_step, state.best_is_averaged = result.accuracy, state.step, averaged
        results.append(result)
    return results


def finish_epoch(run: Run, state: RunState) -> None:
    """Validate, report and count the epoch. A run may end inside one: that is validated too, but not judged by --patience."""
    epoch, sums, lines = state.epoch + 1, state.epoch_sums, []
    train = SplitResult(sums.mean_loss, sums.accuracy, sums.images, state.train_seconds - state.seconds_before_epoch)
    recipe, epochs = run.plan.recipe, math.ceil(run.total_steps / run.train.steps_per_epoch)
    if epoch > epochs - recipe.swa_epochs:
        run.engine.average.add()
    results = validate(run, state)
    val = results[0] if results else None
    state.remember_epoch(sums, val.accuracy if val else None)
    if state.epoch_step == run.train.steps_per_epoch:
        state.epoch, state.epoch_step = state.epoch + 1, 0
        state.epoch_sums, state.seconds_before_epoch = Sums(), state.train_seconds
        which, losses = ("validation", results) if val else ("training", [train])
        lines = patience.watch(recipe, state, min(result.loss for result in losses), which)
    best = state.best_loss, state.best_accuracy if val else state.best_train_accuracy, state.epochs_without_improvement
    run.metrics.epoch(EpochRow.of(epoch, sums, run.engine.lr, train, val, *best, *results[1:]))
    run.metrics.say(lines)


def train(run: Run, state: RunState) -> EndedBy | Literal["stopped"]:
    """Train until the schedule's end, --max-steps, early stopping or a stop request; returns which it was."""
    options = run.plan.options
    while state.step < run.last_step and not patience.is_over(run.plan.recipe, state):
        stopped = train_one_epoch(run, state)
        run.stop.check_folder()
        if stopped:
            return "stopped"
        finish_epoch(run, state)
        at_end = state.step == run.last_step or patience.is_over(run.plan.recipe, state)
        run.save(state, "running", at_end or state.ends_epoch_of(options.save_every_epochs, options.save_frequency))
    if patience.is_over(run.plan.recipe, state):
        return "early_stopping"
    return "epochs" if state.step == run.total_steps else "max_steps"


def measure_best_model(run: Run, state: RunState) -> dict[str, SplitResult]:
    """Open the test split, once, for the model that validation chose, and with test-time augmentation if the recipe has it."""
    if (count := run.plan.options.test_images) == 0:
        return {}
    folder = run.folder / "checkpoints" / "best_model"
    run.model.load_state_dict(run.world.from_main(lambda: checkpoint.portable_weights(folder, run.model)))
    look = Look([run.folder], count, recorded=run.world.is_main)
    images = run.plan.images("test", look)
    loader = EvaluationLoader.of(images.pixels[:count], images.labels[:count], run.plan.recipe, run.world)
    logits = [torch.empty(0, len(run.plan.dataset.classes))]
    result = evaluate(run.model, loader, run.world, keep=logits)
    all_logits = run.world.gather(torch.cat(logits).numpy())
    if run.world.is_main:
        save_predictions(run.folder / TEST_FILE, all_logits, images.labels[:count])
    look.learned(accuracy=result.accuracy)
    run.metrics.test(math.ceil(state.step / run.train.steps_per_epoch), result)
    if run.plan.recipe.tta == "none":
        return {"test": result}
    augmented = Augmented(run.model, run.plan.recipe.tta, run.plan.recipe.tta_below)
    return {"test": result, "test_tta": evaluate(augmented, loader, run.world)}


def finish(run: Run, state: RunState, ended_by: EndedBy) -> None:
    """Keep the last weights, test the best ones, and write the summary."""
    if len(run.val) and state.best_step < 0:  # resumed at its last step, before any validation
        validate(run, state)
    weights = run.engine.portable_state()
    written = run.save_portable("final", weights, {"step": state.step})
    if not len(run.val):
        state.best_step, state.best_is_averaged = state.step, run.engine.has_average
        best = run.engine.portable_state(averaged=True) if state.best_is_averaged else weights
        written = run.save_portable("best_model", best, {"step": state.step, "val_accuracy": None}) and written
    if not written or state.best_step < 0:
        raise RunFailed("the trained weights could not be written; make room on the disk and run the same command again")
    tested = test_fields(measure_best_model(run, state), run.plan.dataset)
    run.stop.check_folder()
    known = {**run.world.peak_memory, "weights_sha256": weights_sha256(weights), "ended_by": ended_by}
    summary = run.write_summary(state, "finished", **tested, **known)
    run.metrics.say([*text.closing_lines(summary, len(run.val), run.plan), f"written to {run.folder}"])
    run.metrics.finished(asdict(summary))


def start_run(plan: Plan, world: World, folder: Path, model: nn.Module) -> tuple[Run, RunState]:
    """Build everything a run works with, and restore its state from the newest checkpoint, if there is one."""
    deepspeed = prepare()
    recipe, options, config = plan.recipe, plan.options, plan.ds_config
    train, val = get_cifar10_dataloaders(plan, world, images := plan.images("train"))
    model = model.to(world.device)
    if recipe.weights == "none" and hasattr(model, "start_from_images"):
        model.start_from_images(train.first_images(min(model.patch_images, len(train.labels))))
    plain, make_engine, step = deepcopy(model), Engine, train_step
    if plan.batch.stages > 1:
        model, make_engine, step = pipeline.this_stage(model, config), pipeline.PipelineEngine, pipeline.train_step
    experts.divide(model, world, options.expert_parallel)
    if recipe.sync_bn:
        synchronize_batch_norm(model)
    own = own_optimizer(model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    deepspeed_engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, optimizer=own, config=config)
    engine = make_engine(deepspeed_engine, world, recipe.seed, ema=recipe.ema, swa=recipe.swa_epochs > 0)
    distributed.limit_waiting(options.timeout_minutes)
    start_from = None if options.resume in ("auto", "never") else run_folder.find_checkpoint(options.resume)
    place = folder / "checkpoints", start_from, engine, world, plan.settings
    state = RunState() if options.dry_run else checkpoint.resume(*place)
    num_steps = total_steps(recipe, train.steps_per_epoch)
    last_step = min(num_steps, options.max_steps or num_steps)
    if deepspeed_engine.lr_scheduler is not None:
        rates = json_scheduler.learning_rates(deepspeed_engine, last_step)
        note = json_scheduler.describe(deepspeed_engine.scheduler_name(), rates)
        plan = replace(plan, notes=[*plan.notes, note])
    run = Run(
        plan=plan,
        world=world,
        folder=folder,
        engine=engine,
        step=accelerate(step, engine, options.engine_level),
        train=train,
        val=val,
        model=plain,
        buffer=MetricBuffer(options.log_every_steps, world.device),
        metrics=open_sinks(plan, folder, state, last_step, train.steps_per_epoch) if world.is_main else Metrics(),
        chain=Chain(folder if world.is_main and not options.dry_run else None, state, config, options, images),
        stop=StopRequest(world, folder, options.max_minutes, options.stop_at),
        total_steps=num_steps,
        last_step=last_step,
    )
    return run, state


def train_and_finish(plan: Plan, world: World, folder: Path, model: nn.Module, resume_command: str) -> None:
    """Take the run in `folder` from where it stands to its end, to a stop, or to a failure that is written down."""
    with text.beginning(plan, world):
        run, state = start_run(plan, world, folder, model)
    images, steps = (len(run.train.labels), len(run.val)), (state.step, run.last_step, run.total_steps)
    run.metrics.say(text.opening_lines(run.plan, folder, world.description, run.model, images, steps))
    run.metrics.say(run.metrics.notes)
    run.write_summary(state, "running")
    try:
        ended_by = train(run, state)
        if ended_by == "stopped":
            saved = run.save(state, "stopped")
            why = f" ({run.stop.reason})" if run.stop.reason else ""
            run.metrics.event(f"stopped at step {state.step}{why}{'; all is saved' if saved else ''}")
            run.metrics.event(f"to continue: {resume_command}")
        else:
            finish(run, state, ended_by)
    except Exception as error:
        reason = text.failure(error, world.rank, state.step, plan.batch.micro_images)
        run.write_summary(state, "failed", reason=reason)
        if not state.step:
            raise text.not_begun(error, plan, world) from error
        if not isinstance(error, (UsageError, RunFailed)):  # which main() reports, once
            print(f"error: {reason}", file=sys.stderr)
        raise
    finally:
        run.metrics.close()


def run(argv: list[str]) -> None:
    """Train as the command line says, in a program or a notebook, as often as wanted; nothing of a run stays behind in it.

    Raises UsageError for a command line that cannot be carried out.
    """
    with handlers_given_back():
        try:
            carry_out(argv)
        finally:
            run_folder.let_go()
            if launchers.world_size() == 1:  # other ranks may be waiting for this one
                leave()


def carry_out(argv: list[str]) -> None:
    """Train as the command line says, and leave it to the caller to clean up. Raises UsageError."""
    plan = make_plan(argv, launchers.world_size(), "cifar10_deepspeed.py", __doc__)
    options = plan.options
    world = distributed.join(options.threads, options.timeout_minutes, deterministic=options.deterministic)
    model, notes = initial_model(plan)
    plan = replace(plan, notes=[*launchers.notes(options.output_dir), *plan.notes, *notes])
    if options.dry_run:
        folder = options.output_dir or run_folder.unnamed(options.recipe, "<time>")
        with text.beginning(plan, world):
            run, _ = start_run(plan, world, folder, model)
        return dry_run.describe(run)
    folder = world.from_main(lambda: run_folder.choose(options.output_dir, options.recipe))
    if world.from_main(lambda: has_finished(folder, options.max_steps)):
        return
    program = sys.argv[0] if Path(sys.argv[0]).name == Path(__file__).name else __file__  # which a notebook has not started
    settings, command = as_json(plan.recipe, options.recipe, asdict(plan.dataset)), [program, *argv]
    facts = {**world.facts, "data_dir": str(options.data_dir.absolute()), "engine_level": options.engine_level}
    world.from_main(lambda: run_folder.open_run(folder, settings, plan.ds_config, options.resume, command, **facts))
    start = f"{world.start_command} {shlex.quote(program)}"
    resume_command = run_folder.command_to_continue(start, without_launcher_flags(argv), folder)
    train_and_finish(plan, world, folder, model, resume_command)
    world.barrier()  # what rank 0 writes last is there before another machine's launcher looks for it


def main() -> int:
    """Train as sys.argv says; returns the exit code: 0, 1 for a run that failed, 2 for a command that cannot be carried out."""
    streams.prepare(lasting=True)
    code = 0
    try:
        carry_out(sys.argv[1:])
    except (UsageError, RunFailed) as error:  # on all ranks alike; after any other error the others may be waiting,
        code = 2 if isinstance(error, UsageError) else 1  # and only the end of this process tells them
        if distributed.is_local_main():
            print(f"error: {error}", file=sys.stderr)
    leave()
    return code


if __name__ == "__main__":
    sys.exit(main())
