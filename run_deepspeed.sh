#!/bin/bash
# Trains on a SLURM cluster; submit it from the project's folder:
#
#     sbatch run_deepspeed.sh --epochs 10                         the program's flags come last
#     sbatch --gres=gpu:4 --nodes=2 run_deepspeed.sh              sbatch's flags come first, and beat the requests below
#     sbatch --array=0-2 run_deepspeed.sh --seed %a               several jobs; %a is the number of each in the array
#     OUTPUT_DIR=runs/mine sbatch run_deepspeed.sh                goes on with a run that was stopped
#
# One rank for each GPU of each node. About two minutes before the time limit, or when the job is to make room for another,
# the run is saved, and the job queued again; it goes on in the same folder. Its exit code is main.py's: 0 the run has
# finished, 75 it was stopped and can go on, anything else: it failed. What it prints goes to <job name>-<job id>.log.
#
# OUTPUT_DIR   the run's folder           runs/<job name>-<job id>
# VENV         the virtual environment    .venv here, else ~/myenv, else the python that is on PATH
# MODULES      what `module load` loads   nothing
# CIFAR10_DIR  where CIFAR-10 is          data here; compute nodes often have no network, so download it before
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

STOPPED=75 # main.py: stopped, and the same command goes on
KILLED=" 138 143 " # by SIGUSR1, SIGTERM: main.py had not come so far yet as to expect it

step='' stop_at='' warned='' preempted='' timeout='' interrupted=''
# srun hands the warning to every process of the run. On scancel, SLURM itself sends SIGTERM to all; here it only ends a wait.
trap 'warned=yes interrupted=yes; [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null' USR1
trap 'interrupted=yes' TERM CONT

die() {
    echo "error: $*" >&2
    exit 2
}

# --- where, and with which python -----------------------------------------------------------------------------------

[ -n "${SLURM_JOB_ID:-}" ] || die "this is a batch script; type: sbatch run_deepspeed.sh"
cd "$SLURM_SUBMIT_DIR" || die "cannot enter $SLURM_SUBMIT_DIR on $(hostname)" # this file runs as a copy, elsewhere
[ -f main.py ] || die "no main.py in $SLURM_SUBMIT_DIR; submit from the project's folder"

if [ -n "${MODULES:-}" ]; then
    command -v module >/dev/null || die "MODULES is set, but there is no command \`module\` on $(hostname)"
    # shellcheck disable=SC2086 # several names are several words
    module load $MODULES
fi
[ -z "${VENV:-}" ] || [ -f "$VENV/bin/activate" ] || die "VENV=$VENV holds no virtual environment"
for venv in "${VENV:-}" .venv ~/myenv; do
    if [ -n "$venv" ] && [ -f "$venv/bin/activate" ]; then
        # shellcheck disable=SC1091 # not ours
        . "$venv/bin/activate"
        break
    fi
done
python=$(command -v python || command -v python3) || die "no python on $(hostname); set VENV to a virtual environment"

# --- the command of each node ---------------------------------------------------------------------------------------

job=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then # one of its tasks has the number of the whole array
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    set -- "${@//%a/$SLURM_ARRAY_TASK_ID}"
    OUTPUT_DIR=${OUTPUT_DIR//%a/$SLURM_ARRAY_TASK_ID}
fi
OUTPUT_DIR=${OUTPUT_DIR:-runs/$SLURM_JOB_NAME-$SLURM_JOB_ID} # the same when the job is queued again
for ((i = 1; i <= $#; i++)); do
    next=$((i + 1))
    case ${!i} in
    --output[-_]dir) OUTPUT_DIR=${!next:-} ;;
    --output[-_]dir=*) OUTPUT_DIR=${!i#*=} ;;
    esac
done

# What a stopped run says to type, with the requests that its number of ranks follows from.
requests="--partition=$SLURM_JOB_PARTITION --nodes=$SLURM_JOB_NUM_NODES --gres=gpu:${SLURM_GPUS_ON_NODE:-0}"
export CIFAR10_STARTED_BY="sbatch $requests run_deepspeed.sh"
run=("$python" main.py --num-gpus "${SLURM_GPUS_ON_NODE:-1}" --output-dir "$OUTPUT_DIR")
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    if ! getent hosts "$master" >/dev/null; then # a node's name need not be known to the network
        master=$(scontrol show node "$master" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    fi
    port=$((10000 + SLURM_JOB_ID % 50000)) # another job on these nodes has another
    # shellcheck disable=SC2016 # each node has a number of its own
    run=(bash -c 'exec "$@" --node-rank "$SLURM_NODEID"' node "${run[@]}"
        --num-nodes "$SLURM_JOB_NUM_NODES" --master-addr "$master" --master-port "$port")
fi

# --- run it ---------------------------------------------------------------------------------------------------------

newest_checkpoint() { cat "$OUTPUT_DIR/checkpoints/latest" 2>/dev/null; }

# SLURM's warning may come half a minute early, and does not come again to a job that was queued again; so the run looks at
# the clock as well. Of a short limit a third is kept for saving, of others two minutes.
end=$(date -d "$(scontrol show job "$job" | sed -n 's/.*EndTime=\([^ ]*\).*/\1/p' | head -n 1)" +%s 2>/dev/null)
if [ -n "$end" ]; then
    third=$(((end - $(date +%s)) / 3))
    stop_at=$((end - (third < 120 ? third : 120)))
fi

before=$(newest_checkpoint)
# Of the job's cores, a step gets those that it asks for (since SLURM 22.05).
srun --export=ALL --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=1 "${run[@]}" "$@" ${stop_at:+--stop-at "$stop_at"} &
step=$!
[ -z "$warned" ] || kill -USR1 "$step" # it came before srun was started
while # traps run only between commands and in `wait`, and end it
    interrupted=''
    wait "$step"
    code=$?
    [ -n "$interrupted" ]
do :; done

# --- once more? -----------------------------------------------------------------------------------------------------

known=$(scontrol show job "$job")
# A job that is to make room for another may have some time of grace, with SIGTERM to srun's processes and no warning to this
# script; if it ends by itself in that time, SLURM does not queue it again. Nor does it after the time limit.
[[ $known == *PreemptTime=[0-9]* ]] && preempted=yes warned=yes
[[ $known == *Reason=TimeLimit* ]] && timeout=yes warned=yes
[ -n "$stop_at" ] && [ "$(date +%s)" -ge "$stop_at" ] && warned=yes
[[ $KILLED == *" $code "* ]] && [ -n "$warned" ] && code=$STOPPED
after=$(newest_checkpoint)
if [[ $known =~ JobState=(COMPLETING|CANCELLED) ]] && [ -z "$timeout" ]; then
    : # by scancel or scontrol, warned or not: SLURM does what it was told, and `requeue` would bring a cancelled job back
elif [ "$code" -eq "$STOPPED" ] && [ -n "$warned" ]; then
    if [ -z "$preempted" ] && [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ "$after" = "$before" ]; then
        echo "stopped again, and without a new checkpoint, so not queued again; try a longer sbatch --time" >&2
    elif scontrol requeue "$job"; then # ends the processes of this job, so that little can be done below
        echo "queued again: job $job goes on in $OUTPUT_DIR from ${after:-its start}"
        exit "$code"
    fi
fi
exit "$code"
