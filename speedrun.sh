#!/usr/bin/env bash
# The whole recipe: raw pages go in, a small ChatGPT-style model and a report come out.
#   bash speedrun.sh                            config/tiny.py: 6 to 10 minutes on a CPU
#   bash speedrun.sh --quick                    the same with config/quick.py: 90 seconds, poor answers
#   bash speedrun.sh config/d20.py              another profile; all GPUs or $NPROC processes share it
#   bash speedrun.sh config/d20.py config/rehearse.py    a tiny model, in minutes (or --rehearse=true)
#   bash speedrun.sh config/d20.py --estimate=8xH100    only print what it needs
#   bash speedrun.sh config/tiny.py --seed=2    a flag is for all stages that have this setting
#   bash speedrun.sh setup                      only make .venv and install requirements.txt
#   bash speedrun.sh overoptimise               then: RLHF with four KL penalties, and a drawing
# A finished stage is skipped. If its script, a setting or its input has changed, it runs again, and so
# do all later stages. The same command continues a run that was stopped.
set -euo pipefail
started_in=$PWD
cd "$(dirname "$0")"

# -----------------------------------------------------------------------------
# .venv with the packages of requirements.txt, made by the first usable Python or by $PYTHON
usable='import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'
if ! .venv/bin/python -c "import pip; $usable" 2> /dev/null; then
    for python in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10} none; do
        if "$python" -c "$usable" 2> /dev/null; then break; fi
    done
    if [ "$python" = none ]; then
        echo 'error: no Python 3.10 to 3.13 with venv: set PYTHON=/path/to/python3.12' >&2
        exit 1
    fi
    "$python" -m venv --clear .venv
fi
if ! cmp -s requirements.txt .venv/installed.txt; then
    echo 'installing requirements.txt into .venv (this takes some minutes, once)'
    .venv/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed.txt
fi
if [ "${1:-}" = setup ]; then exit; fi
if [ "${1:-}" = overoptimise ]; then experiment=$1; shift; fi
export PATH="$PWD/.venv/bin:$PATH" PYTHONUNBUFFERED=1

# -----------------------------------------------------------------------------
# profiles and flags. configurator.py takes `seed=2` without dashes for all stages that have a seed
if ! printf '%s\n' "$@" | grep -q '^[^-].*\.py$'; then set -- config/tiny.py "$@"; fi
args=() last='' # a profile that changes those before it
for word in "$@"; do
    if [ "$word" = --rehearse=true ]; then last=config/rehearse.py; continue; fi
    if [ "$word" = --quick ]; then last=config/quick.py; continue; fi
    if [ ! -f "$word" ] && [ -f "$started_in/$word" ]; then word=$started_in/$word; fi
    args+=("${word#--}")
done
args+=($last)
if printf '%s\n' "${args[@]}" | grep -q '^estimate='; then exec python scaling.py "${args[@]}"; fi
# `setting pretrain.py out_dir` prints out/toytown; a mistake in the arguments ends the run here
setting() { python configurator.py "$1" "${args[@]}" | sed -n "s/^ \"$2\": \"\(.*\)\",*\$/\1/p"; }
town_dir=$(setting toytown.py town_dir)
files=$(setting prepare_data.py files)
prepare=python
if [ "$(setting prepare_data.py source)" != files ]; then files=''; fi # it downloads its input
if [ -z "$files" ]; then prepare='torchrun --standalone --nproc_per_node=cpu'; fi
data_dir=$(setting pretrain.py data_dir)
out_dir=$(setting pretrain.py out_dir)
base_from=$(setting pretrain.py init_from) # of another run: then no base model is trained here
train=python
if [ "${CUDA_VISIBLE_DEVICES-all}" ] && command -v nvidia-smi > /dev/null; then NPROC=${NPROC:-gpu}; fi
if [ -n "${NPROC:-}" ]; then train="torchrun --standalone --nproc_per_node=$NPROC"; fi

# after a whole run: the weaker the KL penalty, the further the policy goes, to its harm
if [ -n "${experiment:-}" ]; then
    for kl_coef in 0 0.02 0.05 0.2; do
        folder=$out_dir/overoptimise/$kl_coef
        if [ -e "$folder/rlhf.pt" ]; then continue; fi
        $train rlhf.py "${args[@]}" "out_dir=$folder" "init_from=$out_dir/sft.pt" \
            "reward_from=$out_dir/reward.pt" kl_coef=$kl_coef learning_rate=1e-3 max_iters=60 \
            eval_interval=5 eval_prompts=150
    done
    exec $train eval.py "${args[@]}" # draws out_dir/overoptimise.svg
fi

# -----------------------------------------------------------------------------
# the stages: `stage OUTPUT COMMAND ...` runs the command, unless OUTPUT is newer than its inputs
stage() {
    local output=$1 resume=${1%.*}.resume.pt script mark ignored='"mid_(epochs|lr_scale)"' seconds=$SECONDS
    shift
    script=$(printf '%s\n' "$@" | grep -m 1 '\.py$')
    mark=$out_dir/.speedrun/$script # written when the stage has ended
    if [ "${!#}" = stage=mid ]; then mark=$mark.mid ignored='^$'; fi # pretrain.py is two stages
    mkdir -p "$out_dir/.speedrun"
    python configurator.py "$script" "${args[@]}" | grep -Ev "$ignored" > "$mark.new"
    cmp -s "$mark.new" "$mark.json" || mv "$mark.new" "$mark.json" # newer if settings have changed
    inputs=("$script" model.py configurator.py config/*.json "$mark.json" "$previous")
    newer() { (IFS=,; find "${inputs[@]}" $files -newer "$1" 2>&1); } # also prints what is missing
    printf '\n$ %s\n' "$*"
    if [ -n "$(newer "$mark")" ] || [ ! -e "$output" ] || [ "$output" -nt "$mark" ]; then
        if [ -n "$(newer "$resume")" ]; then rm -f "$resume"; set -- "$@" resume=false; fi # anew
        "$@"
        seconds=$((SECONDS - seconds))
        printf '%-16s%4d:%02d\n' "${mark##*/}" $((seconds / 60)) $((seconds % 60)) > "$mark"
    else
        echo 'finished before'
    fi
    previous=$mark
    marks+=("$mark")
}
previous=model.py marks=()
trap 'exit 130' INT # Ctrl-C goes to the stage, which saves and exits
if [ "$files" = "$town_dir" ]; then stage "$town_dir/truth.jsonl" python toytown.py "${args[@]}"; fi
stage "$data_dir/funnel.json"     $prepare prepare_data.py "${args[@]}"
stage "$data_dir/tokenizer.json"  python tokenizer.py "${args[@]}"
if [ -z "$base_from" ]; then stage "$out_dir/base.pt" $train pretrain.py "${args[@]}"; fi
if [ -e "$data_dir/mid_train_000000.bin" ]; then # mid_chats > 0
    stage "$out_dir/mid.pt"       $train pretrain.py "${args[@]}" stage=mid
elif [ -e "$out_dir/mid.pt" ]; then mv "$out_dir/mid.pt" "$out_dir/mid.old.pt"; fi # sft.py would use it
stage "$out_dir/sft.pt"           $train sft.py "${args[@]}"
stage "$out_dir/reward.pt"        $train reward.py "${args[@]}"
stage "$out_dir/rlhf.pt"          $train rlhf.py "${args[@]}"
stage "$out_dir/report.md"        $train eval.py "${args[@]}"
echo && cat "${marks[@]}"
printf 'this run%12d:%02d minutes\n' $((SECONDS / 60)) $((SECONDS % 60))
echo "Talk to it: .venv/bin/python chat.py $out_dir/rlhf.pt"
