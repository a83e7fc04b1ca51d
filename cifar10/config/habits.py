"""Flags of other programs, and what to type here instead: a line of `_TABLE` is the flag here, and names that it has elsewhere.

The names are those of PyTorch's and DeepSpeed's examples, timm, Lightning and Hugging Face's Trainer, with hyphens. `{}` stands
for the value that was given.
"""

import re

from cifar10 import nearest

_TABLE = """
--global-batch-size {}: batch-size b bs batch train-batch-size per-device-train-batch-size
--micro-batch-size {}: micro-batch train-micro-batch-size train-micro-batch-size-per-gpu per-gpu-batch-size
--set gradient_accumulation_steps={}: gradient-accumulation-steps grad-accum accum-steps accumulate-grad-batches accumulation
--precision {}: dtype mixed-precision amp-dtype
--precision fp16: fp16 half use-fp16
--precision bf16: bf16 amp use-amp use-bf16 autocast
--precision fp32: fp32 no-mixed-precision tf32
--lr {}: learning-rate base-lr max-lr initial-lr lr0
--set optimizer.params.weight_decay={}: weight-decay wd l2
--set optimizer.params.momentum={}: momentum sgd-momentum
--set optimizer.params.nesterov=true: nesterov
--set optimizer.params.betas=[{},0.999]: beta1 adam-beta1
--set optimizer.params.betas=[0.9,{}]: beta2 adam-beta2
--set optimizer.params.eps={}: eps epsilon adam-epsilon opt-eps
--set optimizer={{"type":"{}","params":{{"lr":0.001}}}}: optimizer optim opt
--set gradient_clipping={}: gradient-clipping grad-clip clip-grad clip-grad-norm max-grad-norm gradient-clip-val clip
--set zero_optimization.stage={}: zero-stage zero stage zero-optimization-stage
--set zero_optimization.offload_optimizer.device=cpu: cpu-offload offload offload-optimizer
--deepspeed-config {}: deepspeed ds-config ds-config-file config config-file ds
--num-gpus {}: gpus num-gpu ngpus n-gpu num-devices devices nproc nproc-per-node nprocs num-procs world-size ranks num-gpus
--num-nodes {}: nodes nnodes n-nodes num-nodes
--node-rank {}: node-rank machine-rank
--master-addr {}: master-addr main-process-ip
--master-port {}: master-port main-process-port
--max-restarts {}: max-restarts
--seeds {}: seeds num-seeds n-seeds
--device cpu: no-cuda cpu use-cpu no-gpu
--device cuda: cuda use-cuda gpu use-gpu accelerator
--data-dir {}: data dataroot data-root data-path data-folder dataset-dir root datadir
--output-dir {}: save-dir out output out-dir outdir log-dir logdir work-dir exp-dir results-dir checkpoint-dir ckpt-dir
--resume {}: resume-from resume-from-checkpoint resume-checkpoint checkpoint ckpt load load-checkpoint checkpoint-path ckpt-path
--weights imagenet: pretrained
--weights {}: init-weights load-weights finetune
--model {}: arch a net network architecture backbone model-name
--recipe {}: preset experiment recipe-name
--epochs {}: num-epochs n-epochs max-epochs num-train-epochs nb-epochs e ep
--max-steps {}: steps num-steps max-iters iters iterations max-iterations num-iterations max-train-steps total-steps
--warmup-epochs {}: warmup num-warmup-epochs warmup-epoch lr-warmup-epochs
--lr-schedule {}: lr-scheduler scheduler sched schedule lr-scheduler-type
--seed {}: random-seed manual-seed rng-seed
--log-every-steps {}: log-interval print-freq logging-steps log-freq log-every print-every p
--save-every-epochs {}: save-freq save-interval save-every checkpoint-freq save-epochs
--keep-checkpoints {}: save-total-limit keep-last max-checkpoints
--patience {}: early-stopping-patience early-stop early-stopping es-patience
--val-images 5000: val-split validation-split val-size val-ratio
--label-smoothing {}: smoothing ls
--image-size {}: img-size input-size crop-size imgsz
--augment {}: aug augmentation augmentations transforms
--augment "RandomCrop({}) RandomHorizontalFlip": crop-padding random-crop
--augment "RandomCrop(4, {}) RandomHorizontalFlip": padding-mode
--augment "RandomCrop(4) RandomHorizontalFlip": flip hflip random-flip
--augment "RandomCrop(4) AlternatingFlip": alternate-flip
--augment RandomCrop(4): no-flip
--augment "RandomCrop(4) RandomHorizontalFlip Cutout({})": cutout cutout-length cutout-size
--augment "RandomCrop(4) RandomHorizontalFlip BrightnessContrast({})": brightness
--augment "RandomCrop(4) RandomHorizontalFlip BrightnessContrast(0, {})": contrast
--sync-bn: sync-batchnorm syncbn sync-batch-norm
--engine-level compile: compile torch-compile torchcompile
--wandb online: use-wandb log-wandb track with-wandb
--wandb off: no-wandb disable-wandb
--wandb-name {}: run-name experiment-name exp-name name wandb-run-name
--wandb-project {}: project project-name
--tensorboard: use-tensorboard tb log-tensorboard
--timeout-minutes 10: timeout ddp-timeout dist-timeout
python -m cifar10 evaluate: evaluate eval test test-only evaluate-only do-eval
"""
_NOTHING = "workers j num-workers pin-memory no-pin-memory prefetch-factor persistent-workers dist-backend backend dist-url ddp"
_NOTHING += " distributed local-rank find-unused-parameters do-train train download shuffle channels-last"

ALIASES = {
    name: hint for hint, names in (line.rsplit(": ", 1) for line in _TABLE.split("\n") if line) for name in names.split()
}
ALIASES |= dict.fromkeys(_NOTHING.split(), "")


def instead(flag: str, value: str, known: list[str]) -> str:
    """What to type instead of a flag that is not among the `known` ones, with the value that was given to it."""
    name = flag.strip("-").replace("_", "-").lower()
    if name not in ALIASES:
        return f"unknown flag {flag}{nearest('--' + name, known)}"
    if not (hint := ALIASES[name]):
        return f"unknown flag {flag}; leave it out"
    if "{{" in hint:  # an optimizer's name as PyTorch writes it
        value = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop", "adagrad": "Adagrad"}.get(
            value.lower(), value
        )
    typed = hint.format(value or "...")
    if re.search(r"[\[{]", typed):  # for a shell
        typed = typed.replace("--set ", "--set '") + "'"
    elsewhere = typed.startswith("--") and typed.split()[0] not in known
    return f"unknown flag {flag}; use {'python main.py ' if elsewhere else ''}{typed}"


def refusal(words: list[str], known: list[str]) -> str:
    """One line about all words of a command line that are no flags or values here."""
    told, position = [], 0
    while position < len(words):
        flag, _, value = words[position].partition("=")
        position += 1
        if re.match("--?[a-zA-Z]", flag):
            if not value and position < len(words) and not re.match("--?[a-zA-Z]", words[position]):
                value, position = words[position], position + 1
            told.append(instead(flag, value, known))
        else:
            told.append(f"unknown argument {flag}")
    return "; ".join(told)
