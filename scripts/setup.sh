# Sourced by demo.sh, test.sh and .ci/run, not run directly. After
#
#     setup_environment requirements.txt [more requirement files, relative to $ROOT]
#
# $ROOT/.venv exists, has these requirements installed and comes first on PATH. An existing .venv is
# used; pip runs only for requirement files that are new or have changed.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# A few threads suffice for the small models of demo and tests. A short spin time costs nothing on an
# idle machine and makes runs many times faster when other programs use the cores.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-6000}"
CORES="$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((CORES < 4 ? CORES : 4))}"

say() { printf '== %s\n' "$*"; }

stop() {
    printf 'Stopped: %s\n' "$*" >&2
    exit 1
}

# Is $1 a Python that runs here and is 3.11 or newer?
is_new_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' </dev/null >/dev/null 2>&1
}

make_venv() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if is_new_python "$candidate"; then
            say "Creating .venv with $("$candidate" --version) ($(command -v "$candidate"))"
            "$candidate" -m venv "$ROOT/.venv" && return
            rm -rf "$ROOT/.venv"
            stop "'$candidate -m venv' failed, see its message above (on Debian and Ubuntu the" \
                "package python3-venv may be missing)."
        fi
    done
    stop "no Python 3.11 or newer was found (tried python3, then python3.14 to python3.11)."
}

# Run a command that may be silent for minutes and print progress every 20 seconds.
with_progress() {
    local start=$SECONDS ticker status=0
    while sleep 20 >/dev/null && kill -0 $$; do
        printf '   ... %d s, %s in .venv\n' $((SECONDS - start)) "$(du -sh "$ROOT/.venv/" | cut -f1)"
    done 2>/dev/null &
    ticker=$!
    "$@" || status=$?
    kill "$ticker" 2>/dev/null || true
    wait "$ticker" 2>/dev/null || true
    return "$status"
}

setup_environment() {
    local file line stamp="$ROOT/.venv/.requirements-installed"
    local missing=()

    [ -e "$ROOT/.venv" ] || make_venv
    is_new_python "$ROOT/.venv/bin/python" ||
        stop "$ROOT/.venv exists, but $ROOT/.venv/bin/python does not run or is older than" \
            "Python 3.11. Delete that folder and run this again."

    for file in "$@"; do
        [ -f "$ROOT/$file" ] || stop "$ROOT/$file is missing; is this a complete copy of the repository?"
        line="$(cd "$ROOT" && cksum "$file")"
        grep -qsxF "$line" "$stamp" || missing+=("$file")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        say "Installing into .venv: ${missing[*]} (once; PyTorch is a download of 2-3 GB)"
        with_progress "$ROOT/.venv/bin/python" -m pip install --disable-pip-version-check \
            "${missing[@]/#/-r$ROOT/}" </dev/null ||
            stop "pip could not install ${missing[*]}; see its message above."
        (cd "$ROOT" && .venv/bin/python -c 'import torch, torchvision, timm, tensorboard') </dev/null ||
            stop "the packages are installed but cannot be imported together (message above);" \
                "torch and torchvision must come from the same index, see docs/install.md."
        for file in "${missing[@]}"; do
            line="$(cd "$ROOT" && cksum "$file")"
            { grep -sv " $file\$" "$stamp" || true; echo "$line"; } >"$stamp.new"
            mv "$stamp.new" "$stamp"
        done
    fi
    export PATH="$ROOT/.venv/bin:$PATH"
}
