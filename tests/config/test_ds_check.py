"""DeepSpeed's JSON: each situation is refused in one line that names the key, or told in a note, before anything starts."""

import copy
from typing import Any

import pytest

from cifar10 import UsageError
from cifar10.config.ds_check import LEFT_OUT, check, is_on
from cifar10.config.ds_config import resolve

SGD = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}
SOUND = {"train_batch_size": 32, "optimizer": SGD, "gradient_clipping": 1.0}


def refusal(**sections: Any) -> str:
    with pytest.raises(UsageError) as caught:
        check({**SOUND, **copy.deepcopy(sections)})
    (line,) = str(caught.value).splitlines()
    return line


def notes(world_size: int = 1, **sections: Any) -> list[str]:
    """The notes on a sound JSON."""
    given = {**SOUND, **copy.deepcopy(sections)}
    check(given)
    config, _, notes = resolve(given, world_size)
    assert not [key for key in LEFT_OUT.keys() & config.keys() if is_on(config[key])]
    return notes


def of_type(name: str, **params: Any) -> dict[str, Any]:
    return {"type": name, "params": params}


REFUSED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    # misspelt, at every depth
    ({"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}}, ("offload_param", "'device'")),
    ({"zero_optimization": {"stage": 3, "leaf_module": {"clases": []}}}, ("leaf_module", "'classes'")),
    ({"timers": {"throughput": {"enable": True}}}, ("timers.throughput", "'enabled'")),
    ({"flops_profiler": {"enabled": True, "profile_steps": 3}}, ("flops_profiler", "'profile_step'")),
    ({"comms_logger": {"enabled": True, "verbos": True}}, ("comms_logger", "'verbose'")),
    ({"torch_autocast": {"enabled": True, "dytpe": "bfloat16"}}, ("torch_autocast", "'dtype'")),
    ({"scheduler": {"type": "WarmupLR", "parms": {}}}, ("scheduler", "'params'")),
    ({"optimizer": of_type("AdamW", lr=0.1, weight_decy=0.1)}, ("optimizer.params", "'weight_decay'")),
    ({"optimizer": of_type("RMSprop", lr=0.1, alhpa=0.9)}, ("optimizer.params", "'alpha'")),
    ({"optimizer": of_type("Lamb", lr=0.1, max_coef=3)}, ("optimizer.params", "'max_coeff'")),
    ({"scheduler": of_type("WarmupLR", warmup_steps=10)}, ("scheduler.params", "'warmup_num_steps'")),
    ({"scheduler": of_type("StepLR", step_size=10, gama=0.1)}, ("scheduler.params", "'gamma'")),
    ({"bfloat16": {"enabled": True}}, ("bfloat16", "'bf16'")),
    # of another type, at every depth
    ({"zero_optimization": True}, ("zero_optimization", "{...}")),
    ({"zero_optimization": {"stage": 1, "overlap_comm": "yes"}}, ("zero_optimization.overlap_comm", "true or false")),
    ({"zero_optimization": {"stage": 1, "reduce_bucket_size": 0.5}}, ("reduce_bucket_size", "0.5", "an integer")),
    ({"zero_optimization": {"stage": 1, "reduce_bucket_size": 0}}, ("reduce_bucket_size", "> 0")),
    ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, ("offload_param", "{...}")),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}}, ("offload_param.device", "cpu")),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, ("offload_optimizer.device", "NVMe")),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"super_offload": True}}}, ("super_offload", "superchips")),
    ({"activation_checkpointing": {"partitioned_activations": True}}, ("activation_checkpointing", "'partition_activations'")),
    ({"activation_checkpointing": {"number_checkpoints": "all"}}, ("number_checkpoints", "an integer")),
    ({"activation_checkpointing": None}, ("activation_checkpointing", "{...}")),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"ratio": 2}}}, ("offload_optimizer.ratio", "<= 1")),
    ({"optimizer": of_type("AdamW", lr=0.1, betas=0.9)}, ("optimizer.params.betas", "0.9")),
    ({"optimizer": of_type("AdamW", lr=0.1, betas=[0.9])}, ("optimizer.params.betas", "[0.9]")),
    ({"optimizer": of_type("SGD", lr=0.1, nesterov=1)}, ("optimizer.params.nesterov", "true or false")),
    ({"optimizer": {"type": "SGD", "params": 0.1}}, ("optimizer.params",)),
    ({"scheduler": of_type("WarmupLR", warmup_num_steps=0.5)}, ("warmup_num_steps", "0.5")),
    ({"scheduler": of_type("WarmupLR", warmup_num_steps=0)}, ("warmup_num_steps", ">= 1")),
    ({"scheduler": of_type("WarmupLR", warmup_type="cosine")}, ("warmup_type", "cosine", "linear")),
    ({"scheduler": of_type("OneCycle", cycle_min_lr=0.1, cycle_max_lr=1, cycle_momentum="no")}, ("cycle_momentum", "'no'")),
    ({"steps_per_print": 0}, ("steps_per_print", "0")),
    ({"wall_clock_breakdown": "false"}, ("wall_clock_breakdown", "true or false")),
    ({"communication_data_type": "int8"}, ("communication_data_type", "int8", "bf16")),
    ({"log_level": "loud"}, ("log_level", "warning")),
    ({"torch_autocast": {"enabled": True, "dtype": "int8"}}, ("torch_autocast.dtype", "int8", "bfloat16")),
    # schedulers
    ({"scheduler": of_type("WarmupLr")}, ("scheduler.type", "'WarmupLR'")),
    ({"scheduler": of_type("cosine")}, ("scheduler.type", "cosine", "WarmupCosineLR")),
    ({"scheduler": {"params": {"warmup_num_steps": 10}}}, ("scheduler.type", "WarmupLR")),
    ({"scheduler": None}, ("scheduler", "{...}")),
    ({"scheduler": of_type("WarmupDecayLR")}, ("scheduler.params", "'total_num_steps'")),
    ({"scheduler": of_type("OneCycle", cycle_min_lr=0.1)}, ("scheduler.params", "'cycle_max_lr'")),
    ({"scheduler": of_type("StepLR")}, ("scheduler.params", "'step_size'")),
    ({"scheduler": of_type("ReduceLROnPlateau", patience=3)}, ("ReduceLROnPlateau", "--plateau-lr-factor")),
    ({"scheduler": of_type("LambdaLR", lr_lambda="x")}, ("LambdaLR", "function")),
    ({"scheduler": of_type("SequentialLR", schedulers=[])}, ("SequentialLR", "other schedulers")),
    # what DeepSpeed has removed: its own reasons
    ({"amp": {"enabled": True, "opt_level": "O1"}}, ("amp", "Apex", "bf16")),
    ({"sparse_attention": {"mode": "fixed"}}, ("sparse_attention", "removed")),
    ({"compression_training": {}}, ("compression_training", "removed")),
    ({"elasticity": {"enabled": True}}, ("elasticity", "removed")),
    ({"curriculum_learning": {"enabled": True}}, ("curriculum_learning", "data_efficiency")),
    ({"sparse_gradients": True}, ("sparse_gradients", "removed")),
    ({"progressive_layer_drop": {"enabled": True}}, ("progressive_layer_drop", "removed")),
    ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, ("zero_optimization.mics_shard_size", "removed")),
    ({"optimizer": of_type("AdamW", lr=0.1, max_grad_norm=1.0)}, ("max_grad_norm", "gradient_clipping")),
    # what cannot work here, or would ruin the run
    ({"autotuning": {"enabled": True}}, ("autotuning", "bench")),
    ({"data_efficiency": {"enabled": True, "data_sampling": {}}}, ("data_efficiency", "loader")),
    ({"tensor_parallel": {"autotp_size": 2}}, ("tensor_parallel", "transformers")),
    ({"hybrid_engine": {"enabled": True}}, ("hybrid_engine",)),
    ({"expert_parallel": {"enabled": True}}, ("expert_parallel", "experts")),
    ({"compile": {"deepcompile": True}}, ("compile", "--engine-level compile")),
    ({"weight_quantization": {"quantized_initialization": {"num_bits": 8}}}, ("weight_quantization", "inference")),
    ({"managed_gradient_accumulation": False}, ("managed_gradient_accumulation", "true")),
    ({"gradient_allreduce_op": "sum"}, ("gradient_allreduce_op", "mean")),
    ({"optimizer": of_type("SGD", lr=0.1, maximize=True)}, ("optimizer.params.maximize", "loss")),
    ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, ("compute_grad_norm", "true")),
    ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, ("zenflow",)),
]


@pytest.mark.parametrize(("sections", "named"), REFUSED)
def test_what_is_refused_is_named_with_what_to_write_instead(sections, named):
    message = refusal(**sections)
    assert all(words in message for words in named), message


MONITOR = {"enabled": True, "job_name": "mine"}
LEFT: list[tuple[str, Any]] = [
    ("tensorboard", {"enabled": True, "output_path": "logs/"}),
    ("wandb", {"enabled": True, "project": "mine"}),
    ("csv_monitor", {"enabled": True, "output_path": "logs/"}),
    ("comet", {"enabled": True}),
    ("checkpoint", {"tag_validation": "Warn", "load_universal": True}),
    ("data_types", {"grad_accum_dtype": "bf16"}),
    ("prescale_gradients", True),
    ("gradient_predivide_factor", 8.0),
    ("dataloader_drop_last", True),
    ("disable_allgather", True),
    ("seq_parallel_communication_data_type", "bf16"),
    ("use_data_before_expert_parallelism", True),
    ("aio", {"block_size": 1048576, "queue_depth": 8}),
]


@pytest.mark.parametrize(("key", "value"), LEFT)
def test_what_would_have_no_effect_is_left_out_with_a_note(key, value):
    (note,) = notes(**{key: value})
    assert note.startswith(f"{key}: left out (")


def test_each_key_that_is_left_out_is_tried():
    assert {key for key, _ in LEFT} == LEFT_OUT.keys()


UNRESOLVED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, ("offload_optimizer to cpu", "stage 1 at least")),
    ({"stage": 2, "offload_param": {"device": "cpu"}}, ("offload_param to cpu", "stage 3 at least")),
    ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, ("offload_optimizer.ratio", "leave it out")),
]


@pytest.mark.parametrize(("zero", "named"), UNRESOLVED)
def test_offloading_that_deepspeed_lacks_at_a_stage_is_refused(zero, named):
    with pytest.raises(UsageError) as caught:
        notes(zero_optimization=zero)
    assert all(words in str(caught.value) for words in named)


def test_each_key_of_activation_checkpointing_is_honored_or_noted():
    assert len(notes(activation_checkpointing={"profile": False, "number_checkpoints": None})) == 1
    on_cpu = notes(activation_checkpointing={"cpu_checkpointing": True, "partition_activations": False})
    assert len(on_cpu) == 1
    assert "CPU memory" in on_cpu[0]
    others = ("partition_activations", "contiguous_memory_optimization", "synchronize_checkpoint_boundary", "profile")
    _, *told = notes(activation_checkpointing={**dict.fromkeys(others, True), "number_checkpoints": 4})
    assert {line.partition(":")[0] for line in told} == {
        f"activation_checkpointing.{key}" for key in (*others, "number_checkpoints")
    }


def test_round_robin_gradients_are_left_out():
    """DeepSpeed 0.19.8 gathers weights in the order that they have without them."""
    told = notes(zero_optimization={"stage": 2, "round_robin_gradients": True})
    assert any(note.startswith("zero_optimization.round_robin_gradients: left out") for note in told)


OFF = [
    *(
        {key: {"enabled": False}}
        for key in ("tensorboard", "wandb", "autotuning", "flops_profiler", "data_efficiency", "comet")
    ),
    {"compile": {"deepcompile": False}},
    {"prescale_gradients": False, "gradient_predivide_factor": 1.0, "gradient_allreduce_op": "mean"},
    {"communication_data_type": "fp32", "dump_state": False, "steps_per_print": None, "log_level": "warning"},
    {"zero_optimization": {"stage": 0, "reduce_bucket_size": 5e8, "overlap_comm": True, "offload_param": None}},
]


@pytest.mark.parametrize("sections", OFF)
def test_what_is_switched_off_is_passed_on_without_a_word(sections):
    assert notes(**sections) == []


@pytest.mark.parametrize(
    ("fp16", "lost"),
    [
        ({"hysteresis": 2, "min_loss_scale": 1}, "without hysteresis"),
        ({"loss_scale": 0, "initial_scale_power": 15}, "BatchNorm statistics"),
        ({"fp16_master_weights_and_grads": True, "auto_cast": True}, "without fp16_master_weights_and_grads"),
    ],
)
def test_what_torch_autocast_does_not_have_is_told(fp16, lost):
    (note,) = notes(fp16={"enabled": True, **fp16})
    assert note.startswith("fp16 -> torch_autocast")
    assert note.endswith(lost)


def test_gradients_averaged_in_a_low_precision_are_told_where_there_is_something_to_average():
    assert notes(communication_data_type="bf16") == []
    (note,) = notes(2, communication_data_type="bf16")
    assert note.startswith("communication_data_type: gradients are averaged in bf16")
