"""Train on all GPUs of this machine, or on its CPU, with DeepSpeed's launcher.

    uv run python main.py                                  the default recipe
    uv run python main.py --num-gpus 2 --epochs 10         two ranks, and a flag of cifar10_deepspeed.py
    uv run python main.py --num-nodes 2 --node-rank 0 --master-addr 10.0.0.1 --output-dir SHARED/run
                                                           the first of two machines; on the other, --node-rank 1
    uv run python main.py --seeds 3                        three runs, one after another, compared at the end
    uv run python main.py --budget 3m                      the best that this machine can do in three minutes

Exit codes: 0 finished; 75 stopped, and the same command with its --output-dir continues; 2 invalid command, nothing was
started; any other: the run failed.
"""

import sys

from cifar10 import UsageError, streams
from cifar10.distributed import device
from cifar10.launch import budget
from cifar10.launch.command import LaunchOptions, count_ranks, idle_gpus, split_launch_options
from cifar10.launch.seeds import train_seeds
from cifar10.launch.supervise import REFUSED, launched, train
from cifar10.plan import make_plan
from cifar10.run import folder as run_folder


def main(argv: list[str]) -> int:
    """Parse, check, launch; returns the exit code."""
    streams.prepare(lasting=True)
    try:
        launch, flags = split_launch_options(argv)
        machines, asked = launch.num_nodes, launch.num_gpus

        def world_size(global_images: int | None) -> int:
            return machines * count_ranks(asked, device.count_gpus(), global_images, machines)

        chosen = budget.flags_to_check(launch.budget, flags) if launch.budget else []
        plan = make_plan([*flags, *chosen], world_size, "main.py", __doc__, LaunchOptions)
        ranks = plan.batch.world_size // machines
        if machines > 1 and plan.options.output_dir is None:
            raise UsageError("--num-nodes needs --output-dir, a folder that all machines share, as in --output-dir SHARED/run")
        if plan.options.dry_run:
            return launched(launch, ranks, flags)[0]
        folder = run_folder.choose(plan.options.output_dir, f"budget-{launch.budget}" if launch.budget else plan.options.recipe)
        for note in (*plan.notes, idle_gpus(asked, device.count_gpus(), plan.batch, machines)):
            if note and note.startswith("device:"):  # the others are printed by the run
                print(note, flush=True)
        if launch.seeds:
            return train_seeds(launch, ranks, flags, plan, folder)
        return train(launch, ranks, flags, plan.options.max_steps, folder)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
