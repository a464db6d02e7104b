#!/bin/sh
# Makes .venv, once. Called by the Makefile when .venv/ready is missing or older than the list of dependencies.
#
#   sh tools/setup.sh           make or update .venv
#   sh tools/setup.sh --given   only check that $PYTHON exists and is new enough; installs nothing
#
# The stamp .venv/ready is written last and holds a checksum of the inputs: an interrupted set-up leaves no stamp, and
# the next one starts afresh. A .venv without .venv/setup.log was made by somebody else and is left alone.
# pip's own settings (indexes, proxies, certificates) are used as they are.
set -u

inputs="pyproject.toml constraints/common.txt constraints/cpu.txt constraints/cuda.txt"
new_enough='import sys; sys.exit(sys.version_info < (3, 11))'
version_of='import platform; print(platform.python_version())'
py=.venv/bin/python
log=.venv/setup.log
stamp=.venv/ready

die() {
    echo "$*" >&2
    exit 1
}

if [ "${1:-}" = "--given" ]; then
    command -v "$PYTHON" >/dev/null 2>&1 || die "PYTHON=$PYTHON: no such program. Leave PYTHON out and the course makes an environment of its own."
    "$PYTHON" -c "$new_enough" 2>/dev/null ||
        die "PYTHON=$PYTHON is Python $("$PYTHON" -c "$version_of" 2>/dev/null || echo '(does not run)'); this course needs Python 3.11 or newer."
    exit 0
fi

# One set-up at a time: a second `make` waits for the first, then finds everything ready.
exec 9<pyproject.toml
if command -v flock >/dev/null 2>&1 && ! flock -n 9; then
    echo "Another make is setting the course up: waiting for it."
    flock 9
fi

# shellcheck disable=SC2086  # a list of words
checksum=$(cat $inputs | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$checksum" ] && "$py" -c "$new_enough" 2>/dev/null; then
    touch "$stamp"
    exit 0
fi

[ "$(uname -s)" = "Linux" ] || die "This course needs Linux, or WSL2 on Windows; this is $(uname -s)."
[ ! -e .venv ] || [ -f "$log" ] || die "There is a .venv that this course did not make. Move it away, or use it as it is: make ... PYTHON=.venv/bin/python"

# The newest Python need not be called python3, and a name on PATH need not run.
base=
for candidate in python3 python3.13 python3.12 python3.11 python3.14 python; do
    if command -v "$candidate" >/dev/null 2>&1 && "$candidate" -c "$new_enough" 2>/dev/null; then
        base=$candidate
        break
    fi
done
if [ -z "$base" ]; then
    found=$(python3 -c "$version_of" 2>/dev/null) || found="no Python"
    die "This course needs Python 3.11 or newer; found $found. Install one (Debian, Ubuntu: sudo apt install python3.11 python3.11-venv), then run the same command again."
fi
version=$("$base" -c "$version_of")
short=${version%.*}
"$base" -c 'import venv, ensurepip' 2>/dev/null ||
    die "Python $version ($base) lacks the venv module. Install it (Debian, Ubuntu: sudo apt install python$short-venv), then run the same command again."

started=$(date +%s)
step=0
title="the start"

say() {
    step=$((step + 1))
    title=$1
    echo "  [$step/4] $1"
    echo "==== $1" >>"$log"
}

interrupted() {
    echo >&2
    echo "Set-up interrupted at: $title. Nothing is marked ready; run the same command again." >&2
    exit 130
}

failed() {
    {
        echo
        echo "Set-up failed at: $title. The last lines of $log:"
        echo
        tail -n 15 "$log" | sed 's/^/    /'
        echo
        echo "What to do: see that the network works and that there is room (free here: $(df -Ph . | awk 'NR == 2 { print $4 }')),"
        echo "then run the same command again. pip uses your own pip settings. If you have an environment with"
        echo "torch and triton already, name its interpreter and nothing is installed: make ... PYTHON=/path/to/python"
    } >&2
    exit 1
}

logged() {
    echo "\$ $*" >>"$log"
    "$@" >>"$log" 2>&1 9<&-
}

# Python compiles what is imported, when it is; compiling all of these packages would take a third of the whole set-up.
install() {
    logged "$py" -m pip install --disable-pip-version-check --progress-bar off --no-compile "$@"
}

# Is this one version nowhere to be had (as against: the network is down)? Looks at the last pip call only.
nowhere() {
    tail -n 4 "$log" | grep -q -e 'No matching distribution' -e 'Could not find a version'
}

trap interrupted INT TERM HUP

if [ -f "$stamp" ] && [ -x "$py" ] && "$py" -c "$new_enough" 2>/dev/null; then
    rm -f "$stamp"
    echo "The list of dependencies changed: updating .venv (log: $log)"
else
    rm -rf .venv
    mkdir .venv || die "Cannot write here: $(pwd)"
    echo "Setting the course up, once (log: $log)"
fi
: >"$log"

say "Python $version: making .venv"
[ -x "$py" ] || logged "$base" -m venv .venv || failed

torch=$(sed -n 's/^torch==//p' constraints/common.txt)
if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    # === leaves out builds with a label such as +cpu, which pip would prefer where an index has both.
    say "PyTorch $torch, CUDA build: this machine has an NVIDIA GPU (a few GB, this takes minutes)"
    install "torch===$torch" -c constraints/common.txt ||
        { nowhere && install "torch==$torch" -c constraints/common.txt; } || failed
else
    say "PyTorch $torch: no NVIDIA GPU here, so a CPU build if your package index has one"
    install "torch==$torch+cpu" -c constraints/common.txt ||
        { nowhere && echo "        it has none: taking the standard build (a few GB, this takes minutes)" &&
            install "torch==$torch" -c constraints/common.txt; } || failed
fi

say "Triton, Jupyter, pytest and the rest"
# A CUDA build of torch asks for a triton of its own; a CPU build for none.
constraints=constraints/cpu.txt
"$py" -c 'from importlib.metadata import requires; exit(not any(r.startswith("triton") for r in requires("torch")))' &&
    constraints=constraints/cuda.txt
install -e . -c "$constraints" || failed

say "trying it"
logged "$py" -c 'import torch, numpy, matplotlib, typer, rich, pytest; print(torch.__version__, torch.cuda.is_available())' || failed
if nvidia-smi -L 2>/dev/null | grep -q '^GPU' && ! "$py" -c 'import torch; exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "        WARNING: this machine has an NVIDIA GPU but torch cannot use it: \`make doctor\` says why."
fi

echo "$checksum" >"$stamp"
echo "Ready after $(($(date +%s) - started)) s."
