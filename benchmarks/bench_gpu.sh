#!/usr/bin/env bash
# Times iterations of three families, full and LoRA, eager and compiled, at their full size on one GPU; nothing is
# downloaded. Tables go to OUTPUT/iteration-gpu.md, all samples to OUTPUT/iteration-gpu.jsonl:
#
#     bash benchmarks/bench_gpu.sh [OUTPUT [OPTIONS...]]
#
# OPTIONS are those of bench_iteration.py and of the training scripts, such as `--num_steps 8` or `--attention_backend
# cudnn`. PYTHON chooses the interpreter. What does not fit into the card's memory, or cannot be compiled, is said in
# the tables' place; where compiling fails, the eager column is made alone.
set -uo pipefail
cd "$(dirname "$0")/.."
output=${1:-benchmarks/output}
shift || true
python=${PYTHON:-.venv/bin/python}
mkdir -p "$output"
rm -f "$output/iteration-gpu.md" "$output/iteration-gpu.jsonl"
failed=0
for family in sd15 sdxl sd3; do
    for lora in "" "--use_lora --rank 32"; do
        for compile in "--compile" ""; do  # eager and compiled columns in one run, else eager ones
            options="--family $family $lora $compile"
            # shellcheck disable=SC2086  # several words, or none
            if "$python" benchmarks/bench_iteration.py --full_size --mixed_precision bf16 --gradient_checkpointing \
                --rounds 3 --json "$output/iteration-gpu.jsonl" $options "$@" \
                >> "$output/iteration-gpu.md" 2> "$output/error.txt"; then
                break
            fi
            printf 'No result for `%s`: %s\n\n' "$options" "$(tail -n 1 "$output/error.txt")" \
                >> "$output/iteration-gpu.md"
            failed=1
        done
    done
done
cat "$output/iteration-gpu.md"
exit "$failed"
