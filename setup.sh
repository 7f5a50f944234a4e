#!/usr/bin/env bash
# Makes .venv with everything pinned in requirements.txt; called by `make setup`.
# With the argument dev it adds what is pinned in requirements-dev.txt; called by `make test` and `make check`.
#
#   TORCH_INDEX=URL   take torch from this package index
#   PYTHON=python3.12 use this interpreter
#
# Without an NVIDIA driver, torch comes from PyTorch's CPU index (a tenth of the size); where that index cannot be
# reached within a few seconds, from wherever pip finds it.
set -euo pipefail
cd "$(dirname "$0")"

cpu_index=https://download.pytorch.org/whl/cpu
log=.venv/setup.log

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "gpt2-lab needs Python 3.11 or newer; ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>&1 || true)." >&2
    echo "Install one, or name it: make setup PYTHON=/path/to/python3.12" >&2
    return 1
}

has_nvidia_driver() {
    [ -e /proc/driver/nvidia/version ] || nvidia-smi -L >/dev/null 2>&1
}

reachable() {
    .venv/bin/python -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "$1/torch/" 2>/dev/null
}

# Run pip with its chatter in the log and one changing line on the terminal.
quiet_pip() {
    local what=$1 line width started=$SECONDS
    shift
    width=$(tput cols 2>/dev/null || echo 80)
    echo "  $what ..."
    .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off "$@" 2>&1 | tee -a "$log" |
        while IFS= read -r line; do
            if [ -t 1 ]; then printf '\r\033[K  %.*s' $((width - 3)) "$line"; fi
        done || { fail "$what"; return 1; }
    if [ -t 1 ]; then printf '\r\033[K'; fi
    echo "  $what: done in $((SECONDS - started)) s"
}

fail() {
    echo >&2
    echo "$1 failed. The last lines of $log:" >&2
    tail -n 12 "$log" >&2
}

install_torch() {
    local pin index=${TORCH_INDEX:-}
    pin=$(grep '^torch==' requirements.txt)
    if [ -z "$index" ] && [ "$(uname -s)" = Linux ] && ! has_nvidia_driver; then
        if reachable "$cpu_index"; then
            index=$cpu_index
        else
            echo "  $cpu_index cannot be reached: taking torch from pip's own index"
        fi
    fi
    if [ -n "$index" ]; then
        # --no-deps: what torch needs comes from the lock, which this index does not hold.
        quiet_pip "$pin from $index" --no-deps --index-url "$index" "$pin"
    else
        quiet_pip "$pin" "$pin" -c requirements-lock.txt
    fi
}

if [ "${1:-}" = dev ]; then
    # requirements.txt as constraints: no package of it, torch above all, is replaced.
    quiet_pip "the packages for tests and checks" -r requirements-dev.txt -c requirements.txt -c requirements-lock.txt
    exit
fi

python=$(find_python)
echo "Setting up .venv with $("$python" --version) (once; about 2 GB)"
if ! "$python" -m venv .venv; then
    echo "Cannot create .venv. On Debian and Ubuntu: apt install python3-venv" >&2
    exit 1
fi
: >"$log"
install_torch
quiet_pip "the other pinned packages" -r requirements.txt -c requirements-lock.txt
echo "Ready. Next: make demo, or source .venv/bin/activate and python train.py --help"
