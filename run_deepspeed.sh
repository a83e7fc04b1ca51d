#!/bin/bash
# SLURM job script for training; submit it from the project's folder:
#
#     sbatch run_deepspeed.sh --epochs 10                         main.py's flags come last
#     sbatch --gres=gpu:4 --nodes=2 run_deepspeed.sh              sbatch's flags come first and override those below
#     sbatch --array=0-2 run_deepspeed.sh --seed %a               a job array; %a is the task's index
#     OUTPUT_DIR=runs/mine sbatch run_deepspeed.sh                resumes a run that was stopped
#
# One rank per GPU of each node. About two minutes before the time limit, or when the job is preempted, the run saves a
# checkpoint and the job is requeued; it resumes in the same folder. The exit code is main.py's: 0 finished, 75 stopped and
# resumable, anything else failed. Output goes to <job name>-<job id>.log.
#
# Environment variables and their defaults:
# OUTPUT_DIR   run folder                 runs/<job name>-<job id>
# VENV         virtual environment        .venv, else ~/myenv, else the python on PATH
# MODULES      modules to load            none
# CIFAR10_DIR  CIFAR-10's folder          data; compute nodes often have no network, so download it first
#
#SBATCH --job-name=cifar10
#SBATCH --partition=gpu
#SBATCH --nodes=1
#SBATCH --gres=gpu:2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=02:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120

STOPPED=75 # main.py was stopped and can be resumed
KILLED=" 138 143 " # by SIGUSR1, SIGTERM, before main.py had installed its handlers

step='' stop_at='' warned='' preempted='' timeout='' interrupted=''
# srun forwards the warning to all processes. On scancel, SLURM itself sends them SIGTERM; here that only interrupts `wait`.
trap 'warned=yes interrupted=yes; [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null' USR1
trap 'interrupted=yes' TERM CONT

die() {
    echo "error: $*" >&2
    exit 2
}

# --- environment ----------------------------------------------------------------------------------------------------

[ -n "${SLURM_JOB_ID:-}" ] || die "this is a SLURM batch script; run: sbatch run_deepspeed.sh"
cd "$SLURM_SUBMIT_DIR" || die "cannot enter $SLURM_SUBMIT_DIR on $(hostname)" # SLURM runs a copy of this file
[ -f main.py ] || die "no main.py in $SLURM_SUBMIT_DIR; submit from the project's folder"

if [ -n "${MODULES:-}" ]; then
    command -v module >/dev/null || die "MODULES is set, but \`module\` was not found on $(hostname)"
    # shellcheck disable=SC2086 # one word per module
    module load $MODULES
fi
[ -z "${VENV:-}" ] || [ -f "$VENV/bin/activate" ] || die "VENV=$VENV is not a virtual environment"
for venv in "${VENV:-}" .venv ~/myenv; do
    if [ -n "$venv" ] && [ -f "$venv/bin/activate" ]; then
        # shellcheck disable=SC1091 # not ours
        . "$venv/bin/activate"
        break
    fi
done
python=$(command -v python || command -v python3) || die "no python on $(hostname); set VENV to a virtual environment"

# --- command for each node ------------------------------------------------------------------------------------------

job=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then # one task's job ID is that of the whole array
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    set -- "${@//%a/$SLURM_ARRAY_TASK_ID}"
    OUTPUT_DIR=${OUTPUT_DIR//%a/$SLURM_ARRAY_TASK_ID}
fi
OUTPUT_DIR=${OUTPUT_DIR:-runs/$SLURM_JOB_NAME-$SLURM_JOB_ID} # stays the same when requeued
for ((i = 1; i <= $#; i++)); do
    next=$((i + 1))
    case ${!i} in
    --output[-_]dir) OUTPUT_DIR=${!next:-} ;;
    --output[-_]dir=*) OUTPUT_DIR=${!i#*=} ;;
    esac
done
OUTPUT_DIR=${OUTPUT_DIR/#\~\//$HOME/} # a quoted ~

# The resume command that a stopped run prints, with the requests that determine its number of ranks.
requests="--partition=$SLURM_JOB_PARTITION --nodes=$SLURM_JOB_NUM_NODES --gres=gpu:${SLURM_GPUS_ON_NODE:-0}"
export CIFAR10_STARTED_BY="sbatch $requests run_deepspeed.sh"
run=("$python" main.py --num-gpus "${SLURM_GPUS_ON_NODE:-1}" --output-dir "$OUTPUT_DIR")
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    if ! getent hosts "$master" >/dev/null; then # node names may not be in DNS
        master=$(scontrol show node "$master" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    fi
    port=$((10000 + SLURM_JOB_ID % 50000)) # differs between jobs on a node
    # shellcheck disable=SC2016 # expanded on each node
    run=(bash -c 'exec "$@" --node-rank "$SLURM_NODEID"' node "${run[@]}"
        --num-nodes "$SLURM_JOB_NUM_NODES" --master-addr "$master" --master-port "$port")
fi

# --- run ------------------------------------------------------------------------------------------------------------

newest_checkpoint() { cat "$OUTPUT_DIR/checkpoints/latest" 2>/dev/null; }

# SLURM's warning may come half a minute early, and is not repeated for a requeued job, so the run also gets a stop time:
# two minutes before the limit, or after two thirds of a short one.
end=$(date -d "$(scontrol show job "$job" | sed -n 's/.*EndTime=\([^ ]*\).*/\1/p' | head -n 1)" +%s 2>/dev/null)
if [ -n "$end" ]; then
    third=$(((end - $(date +%s)) / 3))
    stop_at=$((end - (third < 120 ? third : 120)))
fi

before=$(newest_checkpoint)
# Since SLURM 22.05 a step does not inherit the job's --cpus-per-task.
srun --export=ALL --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=1 "${run[@]}" "$@" ${stop_at:+--stop-at "$stop_at"} &
step=$!
[ -z "$warned" ] || kill -USR1 "$step" # it arrived before srun started
while # a trap interrupts `wait`, so wait again
    interrupted=''
    wait "$step"
    code=$?
    [ -n "$interrupted" ]
do :; done

# --- requeue? -------------------------------------------------------------------------------------------------------

known=$(scontrol show job "$job")
# A preempted job may have a grace period: srun's processes get SIGTERM, and this script no warning. SLURM does not requeue a
# job that ends by itself during the grace period, nor after the time limit.
[[ $known == *PreemptTime=[0-9]* ]] && preempted=yes warned=yes
[[ $known == *Reason=TimeLimit* ]] && timeout=yes warned=yes
[ -n "$stop_at" ] && [ "$(date +%s)" -ge "$stop_at" ] && warned=yes
[[ $KILLED == *" $code "* ]] && [ -n "$warned" ] && code=$STOPPED
after=$(newest_checkpoint)
if [[ $known =~ JobState=(COMPLETING|CANCELLED) ]] && [ -z "$timeout" ]; then
    : # by scancel or scontrol: do not requeue, which would restart a canceled job
elif [ "$code" -eq "$STOPPED" ] && [ -n "$warned" ]; then
    if [ -z "$preempted" ] && [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ "$after" = "$before" ]; then
        echo "not requeued: stopped again without a new checkpoint; try a longer time limit, for example sbatch --time=04:00:00" >&2
    elif scontrol requeue "$job"; then # kills this job's processes: do nothing after it
        echo "requeued: job $job resumes in $OUTPUT_DIR from ${after:-the start}"
        exit "$code"
    fi
fi
exit "$code"
