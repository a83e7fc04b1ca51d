"""DeepSpeed's JSON: what is refused, how the batch is resolved, and that DeepSpeed accepts, and reads, what comes out."""

import copy
import importlib
import inspect
import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from cifar10 import UsageError
from cifar10.config import ds_check, signatures
from cifar10.config.ds_check import BATCH_KEYS, TOP_LEVEL_KEYS, check, parameters_of
from cifar10.config.ds_config import batch, override, read, resolve, with_precision
from cifar10.config.recipe import load

ROOT = Path(__file__).resolve().parents[2]
WORLD_SIZES = (1, 2, 3, 4, 8)


def config(**sections: Any) -> dict[str, Any]:
    """A sound JSON, with these sections added or replaced."""
    sgd = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}
    return {"train_batch_size": 32, "optimizer": sgd, "gradient_clipping": 1.0, **copy.deepcopy(sections)}


def sgd(**params: Any) -> dict[str, Any]:
    return {"type": "SGD", "params": {"lr": 0.1, **params}}


def refusal(path: Path, content: str | bytes | dict[str, Any]) -> str:
    """The one line with which a file of this content is refused."""
    if isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as caught:
        resolve(read(path), world_size=1)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "ds_config.json"


@pytest.fixture(scope="module")
def deepspeed():
    """DeepSpeed itself, imported as the program imports it."""
    from cifar10.engine.engine import prepare

    return prepare()


# --- reading ----------------------------------------------------------------------------------------------------------


def test_comments_are_allowed_as_deepspeed_allows_them(path):
    path.write_text(
        """{ // the batch
        "train_batch_size": 32, /* images */
        # and the optimizer
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}}
        }""",
        encoding="utf-8",
    )
    assert read(path) == {"train_batch_size": 32, "optimizer": sgd()}


def test_every_truncation_of_a_file_is_refused(path):
    whole = (ROOT / "ds_config.json").read_text(encoding="utf-8").rstrip()
    path.write_text(whole, encoding="utf-8")
    read(path)
    for length in range(len(whole)):
        assert str(path) in refusal(path, whole[:length])


@pytest.mark.parametrize(
    "content",
    [b"", b"  \n", *b'[] null 5 "text" {"a":1}} {}{}'.split(), b"# a comment", b"\xff\xfe\x00binary\x80", b'{"a":' * 3_000],
)
def test_a_file_that_is_not_one_json_object_is_refused(path, content):
    assert str(path) in refusal(path, content)


def test_a_file_that_cannot_be_opened_is_refused(tmp_path):
    for path in (tmp_path / "absent.json", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(UsageError, match="cannot be read") as caught:
            read(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        '{"train_batch_size": 32, "train_batch_size": 64, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}',
        '{"train_batch_size": 32, "optimizer": {"type": "SGD", "params": {"lr": 0.1, "lr": 0.2}}}',
    ],
)
def test_a_key_given_twice_is_refused_at_any_depth(path, text):
    assert "twice" in refusal(path, text)


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"gradient_cliping": 1.0}, "gradient_clipping"),
        ({"zero_optimisation": {"stage": 1}}, "zero_optimization"),
        ({"FP16": {"enabled": True}}, "fp16"),
        ({"fp16": {"enable": True}}, "enabled"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_sise": 5}}, "reduce_bucket_size"),
        ({"optimizer": {"type": "SGD", "parms": {"lr": 0.1}}}, "params"),
        ({"optimizer": sgd(momentun=0.9)}, "momentum"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 0.1, "beta": [0.9, 0.99]}}}, "betas"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest_right_one(path, given, meant):
    assert refusal(path, config(**given)).endswith(f"did you mean {meant!r}?")


@pytest.mark.parametrize(("type_name", "meant"), [("SGDD", "SGD"), ("sgd", "SGD"), ("Adm", "Adam"), ("adamww", "adamw")])
def test_a_misspelt_optimizer_is_refused_with_the_nearest_right_one(path, type_name, meant):
    message = refusal(path, config(optimizer={"type": type_name, "params": {"lr": 0.1}}))
    assert meant.lower() in message.lower().split("did you mean")[1]


def test_a_key_like_no_other_is_answered_with_all_there_are(path):
    message = refusal(path, config(fp16={"zzz": 1}))
    assert all(key in message for key in ("enabled", "loss_scale", "hysteresis"))


# --- values -----------------------------------------------------------------------------------------------------------

NOT_NUMBERS = ["32", True, None, [32], {}]
NOT_POSITIVE = [0, -1]


@pytest.mark.parametrize("key", BATCH_KEYS)
@pytest.mark.parametrize("value", [*NOT_NUMBERS, *NOT_POSITIVE, 1.5])
def test_a_batch_size_that_is_no_positive_whole_number_is_refused(path, key, value):
    assert key in refusal(path, config(**{key: value}))


@pytest.mark.parametrize("key", ["lr", "momentum", "weight_decay", "dampening"])
@pytest.mark.parametrize("value", [*NOT_NUMBERS, -0.1])
def test_an_optimizer_value_that_is_no_number_or_negative_is_refused(path, key, value):
    assert f"optimizer.params.{key}" in refusal(path, config(optimizer=sgd(**{key: value})))


def test_a_learning_rate_of_zero_is_refused_and_a_momentum_of_zero_is_not(path):
    assert "optimizer.params.lr" in refusal(path, config(optimizer=sgd(lr=0)))
    check(config(optimizer=sgd(momentum=0, weight_decay=0)))


@pytest.mark.parametrize("value", [*NOT_NUMBERS, -1])
def test_a_gradient_clipping_that_is_no_number_or_negative_is_refused(path, value):
    assert "gradient_clipping" in refusal(path, config(gradient_clipping=value))


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("place", ["train_batch_size", "gradient_clipping", "lr"])
def test_what_is_not_finite_is_refused_however_it_is_written(path, word, place):
    values = {"train_batch_size": "32", "gradient_clipping": "1.0", "lr": "0.1", place: word}
    text = """{
        "train_batch_size": %(train_batch_size)s,
        "gradient_clipping": %(gradient_clipping)s,
        "optimizer": {"type": "SGD", "params": {
            "lr": %(lr)s
        }}
    }"""
    path.write_text(text % {**values, place: "1"}, encoding="utf-8")
    read(path)
    assert str(path) in refusal(path, text % values)


def test_what_is_not_finite_is_refused_in_a_dict_too():
    for value in (math.nan, math.inf):
        for bad in (config(gradient_clipping=value), config(optimizer=sgd(lr=value)), config(train_batch_size=value)):
            with pytest.raises(UsageError):
                check(bad)


@pytest.mark.parametrize(
    "bad",
    [
        *[{"optimizer": value} for value in (None, [], {}, {"type": 5, "params": {"lr": 0.1}}, {"type": "SGD"})],
        *[{"optimizer": {"type": "SGD", "params": params}} for params in ({}, [0.1])],
        *[{"fp16": value} for value in (None, True, {"enabled": "yes"})],
        *[{name: {"enabled": True}, "fp16": {"enabled": True}} for name in ("bf16", "torch_autocast")],
        {"bf16": {"enabled": 1}},
        *[{"zero_optimization": value} for value in (True, *({"stage": stage} for stage in (4, -1, True, "2", [1])))],
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(path, bad):
    refusal(path, config(**bad))


def test_no_optimizer_is_refused_with_one_to_copy(path):
    message = refusal(path, {"train_batch_size": 32})
    check({"train_batch_size": 32, **json.loads(message.split("add ", 1)[1])})


@pytest.mark.parametrize("junk", [5, -1, 0.5, "text", True, None, [], {}, {"enabled": {}}, [[]]])
def test_junk_under_any_known_key_is_refused_or_passed_on_but_never_a_traceback(path, junk):
    for key in sorted(TOP_LEVEL_KEYS):
        path.write_text(json.dumps(config(**{key: junk})), encoding="utf-8")
        try:
            resolve(read(path), world_size=1)
        except UsageError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017


# --- what DeepSpeed itself knows --------------------------------------------------------------------------------------


class Watched(dict):
    """A config that remembers which keys it was asked for. `copy.copy` makes another that remembers in the same place."""

    asked: set[str] = set()  # noqa: RUF012

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self):
        return self  # `key in config.keys()`


def test_the_known_keys_are_those_that_deepspeed_reads_and_does_not_refuse(deepspeed):
    Watched.asked = set()
    deepspeed.DeepSpeedConfig(Watched(config()))
    removed = set(deepspeed.runtime.config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    # an old spelling of bf16; read for a warning only; read for sequences once a process group is there
    left_out = {"bfloat16", "vocabulary_size", "sequence_parallel_size"}
    assert len(Watched.asked) > 40  # it was watched at all
    assert Watched.asked - removed - left_out == TOP_LEVEL_KEYS


@pytest.mark.parametrize("section", [key for key, kind in ds_check._TYPES.items() if ".py " in str(kind)])
def test_the_keys_of_the_sections_are_those_of_deepspeeds_models(deepspeed, section):
    kind = ds_check._TYPES[section]
    file, name = (kind if isinstance(kind, str) else next(iter(kind.values()))).split()
    module = importlib.import_module(f"deepspeed.{file.removesuffix('.py').replace('/', '.')}")

    def same(read: dict[str, signatures.Parameter], model: Any) -> int:
        """Compare the names, and those of the models inside; returns how many there are."""
        theirs = model.model_fields
        assert read.keys() == {*theirs, *(field.alias for field in theirs.values() if field.alias)}
        required = {name for name, field in theirs.items() if field.is_required()}
        assert {name for name, parameter in read.items() if parameter.required} == required
        kinds = {name: get_args(field.annotation) or (field.annotation,) for name, field in theirs.items()}
        inner = {name: one for name, some in kinds.items() for one in some if hasattr(one, "model_fields")}
        assert {name for name in theirs if read[name].model} == inner.keys()
        return len(read) + sum(same(read[name].model, one) for name, one in inner.items())

    assert same(signatures.fields(signatures.source("deepspeed", file), name), getattr(module, name)) > 1


OTHER_CLASSES = {"Optimizer", "LRScheduler", "ChainedScheduler"}


@pytest.mark.parametrize("module", [torch.optim, torch.optim.lr_scheduler])
def test_the_parameters_are_those_of_pytorchs_constructors(module):
    where = signatures.source("torch", str(Path(module.__file__).relative_to(Path(torch.__file__).parent)))
    kinds = {name for name in module.__all__ if inspect.isclass(getattr(module, name))} - OTHER_CLASSES
    assert kinds == {name for name in signatures.names(where) if name in module.__all__} - OTHER_CLASSES
    for kind in kinds:
        _, *theirs = inspect.signature(getattr(module, kind)).parameters.values()
        ours = signatures.arguments(where, kind)
        assert [*ours] == [parameter.name for parameter in theirs], kind
        assert [one.required for one in ours.values()] == [parameter.default is parameter.empty for parameter in theirs], kind


# --- the command line's overrides -------------------------------------------------------------------------------------


def test_overrides_go_into_a_copy():
    given = config()
    before = copy.deepcopy(given)
    changed = override(given, lr=0.5, global_batch_size=64)
    assert changed["optimizer"]["params"] == {"lr": 0.5, "momentum": 0.9}
    assert changed["train_batch_size"] == 64
    assert given == before
    assert override(given, lr=None, global_batch_size=None) == before


def test_a_global_batch_from_the_command_line_wins_over_micro_times_accumulation():
    given = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 3, "optimizer": sgd()}
    sizes = batch(override(given, lr=None, global_batch_size=64), world_size=2)
    assert (sizes.global_images, sizes.micro_images, sizes.accumulation) == (64, 8, 4)


# --- the batch triple -------------------------------------------------------------------------------------------------


def triples() -> list[dict[str, int]]:
    """Every kind of batch in a JSON: train, micro and accumulation, in any combination that names a size."""
    sizes = {"train_batch_size": [1, 6, 24, 32, 50, 96, 128], "train_micro_batch_size_per_gpu": [1, 4, 5, 16, 32]}
    sizes["gradient_accumulation_steps"] = [1, 2, 3]
    found = []
    for kind in itertools.product((True, False), repeat=3):
        keys = [key for key, named in zip(BATCH_KEYS, kind, strict=True) if named]
        if kind[0] or kind[1]:
            found += [dict(zip(keys, values, strict=True)) for values in itertools.product(*(sizes[key] for key in keys))]
    return found


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_batch_triple_of_every_kind_of_json_at_every_world_size(world_size):
    resolved = refused = 0
    for triple in triples():
        train, micro, accumulation = (triple.get(key) for key in BATCH_KEYS)
        if train is not None and train % world_size:
            refused += 1
            with pytest.raises(UsageError) as caught:
                batch(triple, world_size)
            advice = int(re.search(r"--global-batch-size (\d+)$", str(caught.value))[1])
            assert batch(override(triple, lr=None, global_batch_size=advice), world_size).global_images == advice
            assert abs(advice - train) < world_size
            fitting = [int(ranks) for ranks in re.search(r"but by (.+);", str(caught.value))[1].split(" or ")]
            assert [ranks for ranks in fitting if train % ranks] == []
            continue
        resolved += 1
        sizes = batch(triple, world_size)
        assert sizes.global_images == sizes.micro_images * sizes.accumulation * sizes.world_size
        assert sizes.world_size == world_size
        assert min(sizes.micro_images, sizes.accumulation) >= 1
        assert sizes.rank_images * world_size == sizes.global_images
        if train is None:
            assert (sizes.micro_images, sizes.accumulation) == (micro, accumulation or 1)
        else:
            assert sizes.global_images == train
            if micro is not None:
                rank_images = train // world_size
                assert sizes.micro_images == max(n for n in range(1, micro + 1) if rank_images % n == 0)
            elif accumulation is not None and train // world_size % accumulation == 0:
                assert sizes.accumulation == accumulation
            else:
                assert sizes.accumulation == 1
    assert resolved
    assert bool(refused) == (world_size > 1)


def test_a_json_without_any_batch_size_is_refused_with_one_to_type():
    with pytest.raises(UsageError, match="--global-batch-size 128"):
        batch({"gradient_accumulation_steps": 2}, world_size=1)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_deepspeed_agrees_with_every_resolved_triple(deepspeed, world_size):
    for triple in triples():
        if triple.get("train_batch_size", world_size) % world_size == 0:
            resolved, sizes, _ = resolve({**triple, "optimizer": sgd()}, world_size)
            theirs = SimpleNamespace(world_size=world_size, **{key: resolved[key] for key in BATCH_KEYS})
            deepspeed.DeepSpeedConfig._batch_assertion(theirs)
            assert resolved["train_batch_size"] == sizes.global_images


# --- resolving --------------------------------------------------------------------------------------------------------

ADAM = {"type": "Adam", "params": {"lr": 0.001}}
PRECISIONS = [{}, {"fp16": {"enabled": False}}, *({name: {"enabled": True}} for name in ("fp16", "bf16", "torch_autocast"))]
ZEROS = [{}, *({"zero_optimization": {"stage": stage}} for stage in (0, 1, 2, 3))]
OTHERS = [{}, {"zero_allow_untested_optimizer": True}, {"timers": {"throughput": {"enabled": True}}}, {"optimizer": ADAM}]
OTHERS += [{"train_micro_batch_size_per_gpu": 32, "gradient_accumulation_steps": 1}, {"optimizer": sgd(foreach=True)}]


def configs() -> list[dict[str, Any]]:
    """Precisions x ZeRO stages x other settings, with and without gradient clipping."""
    made = [config(**p, **z, **o) for p, z, o in itertools.product(PRECISIONS, ZEROS, OTHERS)]
    return made + [{key: value for key, value in c.items() if key != "gradient_clipping"} for c in made]


@pytest.mark.parametrize("world_size", [1, 2])
def test_resolving_leaves_its_input_alone_and_twice_is_once(world_size):
    for given in configs():
        before = copy.deepcopy(given)
        once, sizes, _ = resolve(given, world_size)
        assert given == before
        kept = copy.deepcopy(once)
        twice, sizes_again, notes_again = resolve(once, world_size)
        assert twice == once == kept
        assert (sizes_again, notes_again) == (sizes, [])
        check(once)


@pytest.mark.parametrize("world_size", [1, 2])
def test_there_is_a_note_for_each_change_of_meaning_and_for_nothing_else(world_size):
    seen = set()
    for given in configs():
        after, _, notes = resolve(given, world_size)
        due = set()
        if any(key in given and given[key] != after[key] for key in BATCH_KEYS):
            due.add("batch")
        if "gradient_clipping" not in given:
            due.add("gradient_clipping")
        if given.get("zero_allow_untested_optimizer", False) != after.get("zero_allow_untested_optimizer", False):
            due.add("zero_allow_untested_optimizer")
        due |= {name for name in ("fp16", "bf16") if given.get(name) != after.get(name)}
        ours, theirs = (one["optimizer"].get("params", {}) for one in (after, given))
        due |= {"optimizer"} if ours.get("adam_w_mode") != theirs.get("adam_w_mode") else set()
        assert sorted(re.match(r"\w+", note)[0] for note in notes) == sorted(due)
        seen |= due
    assert seen == {"gradient_clipping", "zero_allow_untested_optimizer", "fp16", "bf16", "optimizer"} | (
        {"batch"} if world_size > 1 else set()
    )


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize(("section", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_bf16_and_fp16_become_torch_autocast_at_every_zero_stage(zero, section, dtype):
    given = config(**{section: {"enabled": True}}, **zero)
    check(given)
    after, _, notes = resolve(given, world_size=1)
    assert after[section] == {"enabled": False}
    assert after["torch_autocast"] == {"enabled": True, "dtype": dtype}
    assert after.get("zero_optimization", {}).get("stage", 0) == zero.get("zero_optimization", {}).get("stage", 0)
    assert any(section in note and "torch_autocast" in note for note in notes)


@pytest.mark.parametrize("zero", ZEROS)
def test_what_fp16_says_of_its_loss_scale_is_kept(zero):
    said = {"initial_scale_power": 12, "loss_scale_window": 7, "loss_scale": 0, "hysteresis": 2}
    after, _, _ = resolve(config(fp16={"enabled": True, **said}, **zero), world_size=1)
    assert after["fp16"] == {"enabled": False, **said}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("loss_scale", value) for value in (-1, "128", True)],
        *[("initial_scale_power", value) for value in (-1, 1.5, "16", 128, 2_000)],
        *[("loss_scale_window", value) for value in (0, 2.5, None)],
    ],
)
def test_a_loss_scale_that_cannot_be_meant_is_refused(path, key, value):
    assert f"fp16.{key}" in refusal(path, config(fp16={"enabled": True, key: value}))


@pytest.mark.parametrize("asked", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_precision_replaces_the_jsons_and_keeps_the_rest_of_it(precision, asked):
    given = config(**precision, **ZEROS[2])
    given["fp16"] = {"enabled": False, **given.get("fp16", {}), "initial_scale_power": 9}
    before = copy.deepcopy(given)
    changed = with_precision(given, asked)
    assert given == before
    check(changed)
    sections = ("fp16", "bf16", "torch_autocast")
    assert [name for name in sections if changed.get(name, {}).get("enabled")] == ([] if asked == "fp32" else [asked])
    assert changed["fp16"]["initial_scale_power"] == 9
    assert {**changed, **dict.fromkeys(sections)} == {**before, **dict.fromkeys(sections)}


def test_what_is_asked_for_is_kept():
    asked = {"timers": {"throughput": {"enabled": True}}, "gradient_clipping": 0.0, "optimizer": sgd(fused=False)}
    zero = {"stage": 2, "reduce_bucket_size": 123, "allgather_bucket_size": 456}
    after, _, notes = resolve(config(**asked, zero_optimization=zero, zero_allow_untested_optimizer=True), world_size=1)
    assert {key: after[key] for key in asked} == asked
    assert after["zero_optimization"] == zero
    assert notes == []


def test_deepspeed_accepts_and_reads_what_was_resolved(deepspeed):
    for given in configs():
        after, sizes, _ = resolve(given, world_size=1)
        theirs = deepspeed.DeepSpeedConfig(copy.deepcopy(after))
        assert (theirs.train_batch_size, theirs.train_micro_batch_size_per_gpu) == (sizes.global_images, sizes.micro_images)
        assert theirs.gradient_clipping == after["gradient_clipping"]
        assert theirs.zero_optimization_stage == given.get("zero_optimization", {}).get("stage", 0)
        assert theirs.torch_autocast_enabled == after.get("torch_autocast", {}).get("enabled", False)
        assert theirs.optimizer_params == after["optimizer"]["params"]


def build_optimizer(deepspeed: Any, given: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimizer that DeepSpeed makes of a resolved config, without the rest of its engine."""
    engine = object.__new__(deepspeed.DeepSpeedEngine)
    engine.__dict__.update(_config=deepspeed.DeepSpeedConfig(given), client_optimizer=None)
    return engine._configure_basic_optimizer([torch.nn.Parameter(torch.ones(2))])


EXAMPLES = {"betas": [0.8, 0.9], "dampening": 0.1, "torch_adam": True, "momentum": 0.9, "weight_decay": 0.1, "eps": 1e-6}


@pytest.mark.parametrize("name", ["SGD", "Adam", "adam", "AdamW", "adamw"])
def test_deepspeed_builds_a_plain_pytorch_optimizer_with_each_parameter_that_is_let_through(deepspeed, name):
    for key in (None, *sorted(parameters_of(name, {}).keys() - {"lr", "maximize", "capturable"})):
        params = {"lr": 0.1} if key is None else {"lr": 0.1, key: EXAMPLES.get(key, True)}
        if key == "nesterov":
            params["momentum"] = 0.9
        given = config(optimizer={"type": name, "params": params})
        check(given)
        optimizer = build_optimizer(deepspeed, resolve(given, world_size=1)[0])
        assert type(optimizer).__module__.startswith("torch.optim."), key
        if key in optimizer.defaults:
            assert list(optimizer.defaults[key]) == [0.8, 0.9] if key == "betas" else optimizer.defaults[key] == params[key]
        if key not in ("foreach", "differentiable", "fused"):
            assert optimizer.defaults["fused"] is True, key


def test_the_projects_own_files_are_resolved_without_a_warning():
    for source in (ROOT / "ds_config.json", load("bn_cnn_document").deepspeed):
        assert resolve(read(source), world_size=1)[2] == []


def test_deepspeeds_own_adam_where_asked_for_gets_no_parameter_of_pytorchs():
    for name in ("Adam", "AdamW"):
        given = {"type": name, "params": {"lr": 0.1, "torch_adam": False, "adam_w_mode": True}}
        assert resolve(config(optimizer=given), world_size=1)[0]["optimizer"] == given
