#!/usr/bin/env bash
# From a verifier artifact to a drafter in the released layout: writes text and trains on it at the same time.
#
#   export/recipes/smollm2/train.sh VERIFIER OUT HOURS
#
# OUT: folder of the run. Started again, it goes on where it was; HOURS count from the very beginning. The learning rate
# falls over the last fifth of HOURS (DECAY): a run that is to be made longer is stopped with a signal before that.
# INIT_FROM: a drafter to train further, such as export/pretrained/smollm2-135m; with another SEED than it was trained
# with, so that it reads other text.
set -euo pipefail

verifier=$1 out=$2 hours=$3
here=$(dirname "$(readlink -f "$0")")
mkdir -p "$out"

text=(
    --openings "$here/openings.txt" --threads "${THREADS:-1}" --shard-size 384 --held-out 96
    --slots 128 --answers-per-prompt 3 --seed "${SEED:-0}" --answer-tokens 176 --prompt-tokens 120 --prompt-temperature 0.8
)
dspark-export corpus --verifier "$verifier" --out "$out/corpus" "${text[@]}" >> "$out/corpus.log" 2>&1 &
writer=$!
trap 'kill "$writer" 2> /dev/null || true; wait "$writer" || true' EXIT
# Until the writer holds the corpus, or has ended: train would write it instead.
while kill -0 "$writer" 2> /dev/null && [ "$(cat "$out/corpus/writer.lock" 2> /dev/null)" != "$writer" ]; do
    sleep 0.2
done

resume=()
if [ -e "$out/checkpoint.pt" ]; then resume=(--resume); fi
if [ -n "${INIT_FROM:-}" ]; then resume+=(--init-from "$INIT_FROM"); fi
dspark-export train --verifier "$verifier" --model "${MODEL:-smollm2-135m}" --out "$out" --corpus "$out/corpus" \
    "${text[@]}" --hours "$hours" --schedule wsd --decay-share "${DECAY:-0.2}" \
    --target-layer-ids 1,8,14,20,27 --block-size 5 --layers 2 --rank 64 --draft-vocab 16384 \
    --passes 4 --first-shards 3 --warmup-steps 100 --ema 0.998 --evaluate-minutes 15 "${resume[@]}" &
trainer=$!
trap 'kill "$trainer" 2> /dev/null || true' INT TERM
# A signal ends a wait; the trainer still finishes its step and writes a checkpoint.
while kill -0 "$trainer" 2> /dev/null; do wait "$trainer" || status=$?; done
exit "${status:-0}"
