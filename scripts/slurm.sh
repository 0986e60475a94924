#!/usr/bin/env bash
# Trains on several machines, beside vLLM servers on others, as one SLURM job that goes on where it was stopped:
#   sbatch --nodes=2 scripts/slurm.sh experiment=alfworld_aem trainer=ddp
#   SERVER_NODES=1 SERVER_GPUS=4 MODEL=Qwen/Qwen3-32B sbatch --nodes=2 scripts/slurm.sh experiment=swe trainer=fsdp
# The folder that this is typed in, the data, the models and the environment have to be the same on every machine.
#SBATCH --job-name=aem
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -euo pipefail

GPUS=${GPUS:-8}                  # of a machine
SERVER_NODES=${SERVER_NODES:-0}  # machines that sample; the others train
SERVER_GPUS=${SERVER_GPUS:-1}    # of one server
PORT=${PORT:-29500}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
trainers=$((SLURM_JOB_NUM_NODES - SERVER_NODES))
options=("trainer.num_nodes=$trainers" "trainer.devices=$GPUS")

# Five minutes before the time limit: the job is queued again, SLURM ends its steps, rank 0 saves, and the same command
# goes on. A preemption with requeue, or a machine that is lost, needs no word from here.
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1

if ((SERVER_NODES)); then
    urls=()
    for ((node = trainers; node < SLURM_JOB_NUM_NODES; node++)); do
        for ((first = 0; first < GPUS; first += SERVER_GPUS)); do
            port=$((8000 + first))
            urls+=("http://${nodes[node]}:$port")
            devices=$(seq -s, "$first" $((first + SERVER_GPUS - 1)))
            # The last words are those that a run asks for, where its server has not got them.
            srun --nodes=1 --ntasks=1 --overlap --nodelist="${nodes[node]}" env CUDA_VISIBLE_DEVICES="$devices" \
                VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve "$MODEL" --port "$port" \
                --tensor-parallel-size "$SERVER_GPUS" --enable-lora --max-lora-rank "${LORA_RANK:-64}" --max-loras 2 \
                --max-model-len "${MAX_CONTEXT:-36864}" --logprobs-mode processed_logprobs --generation-config vllm \
                --enable-prompt-tokens-details &
        done
    done
    for url in "${urls[@]}"; do
        until curl --silent --fail --output /dev/null "$url/health"; do sleep 5; done
    done
    options+=("engine=vllm" "engine.urls=[$(IFS=,; echo "${urls[*]}")]" "engine.adapter_dir=$PWD/data/adapters")
    mkdir -p data/adapters
fi

# In the background, since a shell hears of a signal between two commands only.
srun --nodes="$trainers" --ntasks="$trainers" --overlap --kill-on-bad-exit=1 \
    --nodelist="$(IFS=,; echo "${nodes[*]:0:trainers}")" \
    python -m torch.distributed.run --nnodes="$trainers" --nproc-per-node="$GPUS" --rdzv-backend=c10d \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="${nodes[0]}:$PORT" train.py "$@" "${options[@]}" &
training=$!
wait "$training" && status=0 || status=$?
if ((status > 128)) && kill -0 "$training" 2>/dev/null; then  # that was the signal: its steps end by SLURM
    wait "$training" && status=0 || status=$?
fi
jobs -p | xargs -r kill 2>/dev/null || true
exit "$status"
