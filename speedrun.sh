#!/usr/bin/env bash
# The whole recipe, one command per stage: raw web pages go in, a small ChatGPT-style model comes out.
#
#   bash speedrun.sh                                   config/tiny.py: a laptop without a GPU, about ten minutes
#   bash speedrun.sh my_profile.py                     another profile; where there are several GPUs, training uses all
#   bash speedrun.sh config/tiny.py --max_iters=100    flags go to every stage that has such a setting
#   bash speedrun.sh scaling                           instead: loss against size and data (scaling.py), 17 minutes
#   bash speedrun.sh setup                             only make .venv and install requirements.txt
#
# Run it again whenever you like: finished stages are skipped, a killed one goes on, and where a setting, a script or an
# input has changed that stage and all later ones run again. What it knows about that lies in out_dir/.stamps.
# PYTHON=python3.12 bash speedrun.sh chooses the Python for .venv.
set -euo pipefail

die() {
    echo "speedrun.sh: $*" >&2
    exit 1
}
trap 'echo; echo "speedrun.sh: stopped; the same command goes on from here" >&2; exit 130' INT

# -----------------------------------------------------------------------------
# .venv with what requirements.txt names

fits() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null; }
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null || echo none; }

choose_python() { # the first Python that fits and can make a virtual environment
    local p old=''
    for p in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if fits "$p"; then
            if "$p" -c 'import venv, ensurepip' 2> /dev/null; then
                echo "$p"
                return
            fi
            old="$old $p (without the venv module: on Debian or Ubuntu \`apt install python3-venv\`)"
        elif [ "$(version "$p")" != none ] || [ -n "${PYTHON:-}" ]; then
            old="$old $p (version $(version "$p"))"
        fi
    done
    die "needs Python 3.10 to 3.13, found:${old:- none}. Name another one: PYTHON=/path/to/python3.12 bash speedrun.sh"
}

setup() {
    local p want
    if ! fits .venv/bin/python || ! .venv/bin/python -c 'import pip' 2> /dev/null ||
        { [ -n "${PYTHON:-}" ] && [ "$(version "$PYTHON")" != "$(version .venv/bin/python)" ]; }; then
        p=$(choose_python)
        echo "making .venv with $p $(version "$p")"
        "$p" -m venv --clear .venv
    fi
    want=$(cksum < requirements.txt)
    if [ "$(cat .venv/installed 2> /dev/null)" != "$want" ]; then
        echo 'installing requirements.txt into .venv (once; torch takes some minutes)'
        .venv/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt ||
            die 'the installation failed, see above; the same command tries again'
        echo "$want" > .venv/installed
    fi
}

scaling() { # on the tokens of Toytown, unless a --data_dir is named
    local python=$PWD/.venv/bin/python
    if [[ " $* " != *" --data_dir="* ]] && [ ! -f data/toytown/val_000000.bin ]; then
        "$python" prepare_data.py config/tiny.py
        "$python" tokenizer.py config/tiny.py
    fi
    PYTHONUNBUFFERED=1 "$python" scaling.py "$@"
}

# -----------------------------------------------------------------------------
# arguments: profiles are found from where you stand, everything else happens beside this script

profiles=() flags=() from=$PWD
cd "$(dirname "$0")"
for arg in "$@"; do
    case $arg in
        -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' speedrun.sh; exit ;;
        setup) setup; exit ;;
        scaling) setup; scaling "${@:2}"; exit ;;
        --*) flags+=("$arg") ;;
        *.py)
            if [ ! -f "$arg" ] && [ -f "$from/$arg" ]; then arg=$from/$arg; fi
            [ -f "$arg" ] || die "no profile '$arg'; there are: $(echo config/*.py)"
            profiles+=("$arg") ;;
        *) die "'$arg' is neither a profile (config/tiny.py) nor a flag (--key=value)" ;;
    esac
done
[ ${#profiles[@]} -gt 0 ] || profiles=(config/tiny.py)
setup
export PATH="$PWD/.venv/bin:$PATH" PYTHONUNBUFFERED=1

# -----------------------------------------------------------------------------
# the stages, what each one writes, and its settings; a wrong name or value ends it here, before any work

stages=(prepare_data tokenizer pretrain sft reward rlhf eval)
outputs=(data_dir/funnel.json data_dir/tokenizer.json out_dir/base.pt out_dir/sft.pt out_dir/reward.pt out_dir/rlhf.pt
    out_dir/report.md)
settings=() used=' '

flags_of() { # JSON of a stage's settings -> mine: the flags that it has (${a[@]+..}: bash 3 of macOS, empty lists)
    local flag name
    mine=()
    for flag in ${flags[@]+"${flags[@]}"}; do
        name=${flag%%=*}
        name=${name#--}
        if [[ $1 == *"\"${name//-/_}\":"* ]]; then
            mine+=("$flag")
            used+="$flag "
        fi
    done
}

for i in "${!stages[@]}"; do
    flags_of "$(python configurator.py "${stages[i]}.py")"
    settings[i]=$(python configurator.py "${stages[i]}.py" "${profiles[@]}" ${mine[@]+"${mine[@]}"})
done
for flag in ${flags[@]+"${flags[@]}"}; do
    if [[ $used != *" $flag "* ]]; then # no stage has it: the configurator says so, with the nearest name
        python configurator.py pretrain.py "${profiles[@]}" "$flag" > /dev/null
    fi
done

gpus=0
if command -v nvidia-smi > /dev/null || command -v rocm-smi > /dev/null; then
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
fi

# A stage is done when its stamp equals what this prints: a hash of its settings, its source, model.py, the stamp of the
# stage before, and for prepare_data.py of the files that its settings name: the world of Toytown, or your own.
fingerprint='
import glob, hashlib, json, os, sys
script, before, settings = sys.argv[1:]
digest = hashlib.sha256((before + settings).encode())
parts = {"prepare_data.py": "dedup extract forms language privacy sources toytown warc",
    "tokenizer.py": "bpe huggingface", "pretrain.py": "parallel"}
for path in [script, "model.py", *(part + ".py" for part in parts.get(script, "").split())]:
    digest.update(open(path, "rb").read())
if script == "prepare_data.py":
    words = [w for v in json.loads(settings).values() if isinstance(v, str) for w in v.split(",") if w]
    words += [w + "/**" for w in json.loads(settings).get("files", "").split(",") if w]
    for path in sorted({p for w in words for p in glob.glob(w, recursive=True) if os.path.isfile(p)}):
        small = os.path.getsize(path) < 2**24
        digest.update(open(path, "rb").read() if small else str(os.stat(path)[6:9:2]).encode())
print(digest.hexdigest())'

# Runs a command and writes its seconds and peak memory to a file. Ctrl-C is for the command, which saves and leaves.
measure='
import resource, signal, subprocess, sys, time
start, child = time.time(), subprocess.Popen(sys.argv[2:])
signal.signal(signal.SIGINT, signal.SIG_IGN)
code = child.wait()
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024) # macOS: bytes
open(sys.argv[1], "w").write("%d %d" % (time.time() - start + 0.5, peak / 2**20))
sys.exit(code if code >= 0 else 128 - code)'

# -----------------------------------------------------------------------------
# run

setting() { python -c 'import json, sys; print(json.loads(sys.argv[1]).get(sys.argv[2], ""))' "$@"; } # JSON, name
clock() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }

data_dir=$(setting "${settings[0]}" data_dir)
out_dir=$(setting "${settings[2]}" out_dir)
stamps=$out_dir/.stamps
mkdir -p "$stamps"
before='' stale='' total=0 table=''
echo '$ source .venv/bin/activate'

for i in "${!stages[@]}"; do
    stage=${stages[i]}
    file=${outputs[i]##*/}
    if [[ ${outputs[i]} == data_dir/* ]]; then output=$data_dir/$file; else output=$out_dir/$file; fi
    stamp=$(python -c "$fingerprint" "$stage.py" "$before" "${settings[i]}")
    flags_of "${settings[i]}"
    command=(python)
    if [ "$gpus" -gt 1 ] && [[ $file == *.pt ]]; then command=(torchrun --standalone "--nproc_per_node=$gpus"); fi
    command+=("$stage.py" "${profiles[@]}" ${mine[@]+"${mine[@]}"})
    shown=$(printf ' %q' "${command[@]}") # as you would type it
    # an output newer than its stamp was made by hand since: what the stages after it saw was another one
    if [ -z "$stale" ] && [ -f "$output" ] && [ ! "$output" -nt "$stamps/$stage" ] &&
        [ "$(sed -n 1p "$stamps/$stage" 2> /dev/null)" = "$stamp" ]; then
        echo " $shown: finished before, nothing has changed"
        note='  (before)'
    else
        stale=yes note=''
        rm -f "$stamps/$stage"
        if [ -f "$stamps/$stage.started" ] && [ "$(cat "$stamps/$stage.started")" != "$stamp" ]; then
            rm -f "${output%.*}.resume.pt" # half a run with other settings is of no use
        fi
        echo "$stamp" > "$stamps/$stage.started"
        printf '\n$%s\n' "$shown"
        code=0
        python -c "$measure" "$stamps/$stage.cost" "${command[@]}" || code=$?
        [ $code -eq 0 ] || die "$stage.py ended with code $code; the same command goes on from here"
        [ -f "$output" ] || die "$stage.py has not written $output"
        { echo "$stamp"; cat "$stamps/$stage.cost"; } > "$stamps/$stage.partial"
        mv "$stamps/$stage.partial" "$stamps/$stage"
        rm "$stamps/$stage.started" "$stamps/$stage.cost"
    fi
    read -r seconds peak <<< "$(sed -n 2p "$stamps/$stage")"
    [ -n "$note" ] || echo "[$stage: $(clock "$seconds"), peak memory $peak MB]"
    total=$((total + seconds))
    table+=$(printf '%-16s%8s%9s MB   %s' "$stage.py" "$(clock "$seconds")" "$peak" "$output$note")$'\n'
    before=$stamp
done

printf '\n%-16s%8s%12s   %s\n%s%-16s%8s\n' stage time 'peak memory' result "$table" 'all stages' "$(clock $total)"
printf '\nTalk to it:\n$ source .venv/bin/activate\n$ python chat.py %s/rlhf.pt\n' "$out_dir"
