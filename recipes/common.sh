# What the recipes share. A recipe is called with DATA OUT [--dry_run]; more flags for all commands of one kind
# are taken from TRAIN_FLAGS, TEST_FLAGS and AUTOLORA_FLAGS, the authors' released files from CHECKPOINTS.
# Called again, a recipe goes on where it stopped, since each of its commands does.
# With --dry_run every command says what it would do and what is missing; nothing runs, the exit code is 0 or 2.

set -e
case "$#,$3" in
    2, | 3,--dry_run) ;;
    *) echo "usage: $0 DATA OUT [--dry_run]" >&2; exit 2 ;;
esac
data=$1 out=$2 dry=("${@:3}")
here=$out/$(basename "$0" .sh)
checkpoints=${CHECKPOINTS:-checkpoints}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -n "$PYTHON" ] || PYTHON=$root/.venv/bin/python
[ -x "$(command -v "$PYTHON")" ] || PYTHON=python
train=("$root/main.py") test=("$root/test_meta_dataset.py") autolora=("$root/main.py" autolora)
if [ -e "$root/main.py" ]; then
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
else  # installed, not a checkout
    train=(-m amt train) test=(-m amt test) autolora=(-m amt autolora)
fi
runs=() status=0
trap 'code=$?; exit $((status ? status : code))' EXIT

run() {  # run WORDS...: one command; with --dry_run go on after one that lacks something
    echo "+ python $*"
    "$PYTHON" "$@" || status=$?
    [ "$status" = 0 ] || [ -n "$dry" ] || exit "$status"
}

made() {  # made FILES...: what a command makes counts as there for the dry runs after it
    [ -z "$dry" ] || dry+=("$@")
}

train() {  # train NAME FLAGS...: main.py into OUT/train/NAME, which all recipes share
    run "${train[@]}" --data_path "$data" --output_dir "$out/train/$1" "${@:2}" $TRAIN_FLAGS "${dry[@]}"
    made "$out/train/$1/best.safetensors"
}

evaluate() {  # evaluate NAME FLAGS...: test_meta_dataset.py into a folder that the next page shows
    run "${test[@]}" --data_path "$data" --output_dir "$here/$1" "${@:2}" $TEST_FLAGS "${dry[@]}"
    runs+=("$here/$1")
    made "$here/$1"
}

fine_tune() {  # fine_tune NAME MODE FLAGS...: main.py autolora, whose tests the next page shows
    run "${autolora[@]}" --data "$data" --output "$here/$1" --mode "$2" "${@:3}" $AUTOLORA_FLAGS "${dry[@]}"
    local mode modes=$2
    [ "$modes" != ALL ] || modes="SLF ALF AFF"
    for mode in $modes; do
        runs+=("$here/$1/$mode/test")
        made "$here/$1/$mode/test"
    done
}

page() {  # page FILE: all runs since the last page
    run -m amt report "${runs[@]}" --out "$here/$1" "${dry[@]}"
    runs=()
}
