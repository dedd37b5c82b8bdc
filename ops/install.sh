#!/usr/bin/env bash
# Makes .venv hold exactly what the lock files say. Does nothing when it does already.
#   ops/install.sh cpu|gpu [test]
# PYTHON names another interpreter than python3.11 or python3.
set -euo pipefail
cd "$(dirname "$0")/.."

kind=${1:-cpu}
tests=${2:-}
venv=.venv
torch_cpu_index=https://download.pytorch.org/whl/cpu

fail() {
    printf 'switchyard: %s\n' "$1" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer was not found. Install it (on Debian and Ubuntu: apt install python3.11 python3.11-venv), or name it: make PYTHON=/path/to/python3.11"
}

check_machine() {
    [ "$(uname -s)" = Linux ] || fail "Switchyard runs on Linux; this is $(uname -s)."
    [ "$(uname -m)" = x86_64 ] ||
        fail "the lock files are for x86-64 and this machine is $(uname -m). Install by hand: pip install -e '.[$kind]' with the vLLM build for $(uname -m)."
    if [ "$kind" = cpu ] && ! command -v "${CXX:-g++}" >/dev/null; then
        fail "no C++ compiler: ${CXX:-g++} was not found, and vLLM compiles its CPU code when it starts. Install one (on Debian and Ubuntu: apt install g++), or set CXX to yours."
    fi
}

# Installed is what this prints: the same locks, project file, interpreter and place.
fingerprint() {
    {
        cat "requirements-$kind.lock" pyproject.toml ops/install.sh {cluster,model}/*.[ch]
        [ -z "$tests" ] || cat requirements-test.lock
        "$1" -V
        pwd
    } | sha256sum | cut -d' ' -f1
}

# The console is tested in a real browser. Without the rights to install one, its tests say what to install.
install_chromium() {
    if command -v chromium >/dev/null || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then return; fi
    echo "installing chromium, in which the console is tested"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } >/dev/null 2>&1 ||
        echo "chromium could not be installed; the console's tests will fail"
}

make_venv() {
    if ! "$1" -m venv --help >/dev/null 2>&1 || ! "$1" -c 'import ensurepip' 2>/dev/null; then
        fail "this Python cannot make virtual environments: its venv module is missing. Install it (on Debian and Ubuntu: apt install python3-venv)."
    fi
    "$1" -m venv "$venv"
}

# pip warns about configured file:// indexes that lack a package, once per package: noise, unless the installation fails.
quiet_pip() {
    local log
    log=$(mktemp)
    if "$venv/bin/python" -m pip install --disable-pip-version-check --no-deps --quiet "$@" >"$log" 2>&1; then
        rm -f "$log"
        return 0
    fi
    grep -v 'neither a file nor a directory' "$log" >&2 || true
    rm -f "$log"
    return 1
}

has_package() {
    "$venv/bin/python" -c 'import importlib.metadata as m, sys
name, version = sys.argv[1].split("==")
sys.exit(m.version(name) != version)' "$1" 2>/dev/null
}

install_torch_cpu() {
    local line
    line=$(grep '^torch==' requirements-cpu.lock)
    if has_package "$line"; then return; fi
    echo "installing $line"
    # An index that cannot be reached costs seconds for every package, so PyTorch's is named only if it is needed.
    quiet_pip "$line" 2>/dev/null || quiet_pip --index-url "$torch_cpu_index" "$line" ||
        fail "$line could not be installed, neither from pip's configured sources nor from $torch_cpu_index."
}

# promtool checks the alert rules in the tests.
install_promtool() {
    if command -v promtool >/dev/null; then return; fi
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing the Debian package prometheus, for promtool"
        { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends prometheus; } \
            >/dev/null 2>&1 || echo "switchyard: prometheus could not be installed; the test of the alert rules will fail." >&2
    fi
}

case $kind in cpu | gpu) ;; *) fail "usage: ops/install.sh cpu|gpu [test]" ;; esac
check_machine
[ -z "$tests" ] || install_chromium
python=$(find_python)
stamp=$venv/.installed-$kind${tests:+-test}
wanted=$(fingerprint "$python")
if [ -x "$venv/bin/switchyard" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi
for installed in "$venv"/.installed-*; do
    case $installed in
        *"*" | "$venv/.installed-$kind"*) ;;
        *)
            echo "making $venv anew: it holds the other build"
            rm -rf "$venv"
            ;;
    esac
done
[ -x "$venv/bin/python" ] || make_venv "$python"
rm -f "$venv"/.installed-*

started=$SECONDS
[ -z "$tests" ] || install_promtool
[ "$kind" = gpu ] || install_torch_cpu
locked=$(mktemp)
trap 'rm -f "$locked"' EXIT
if [ "$kind" = cpu ]; then grep -v '^torch==' requirements-cpu.lock; else cat requirements-gpu.lock; fi >"$locked"
[ -z "$tests" ] || cat requirements-test.lock >>"$locked"
echo "installing $(grep -c '==' "$locked") packages of requirements-$kind.lock${tests:+ and requirements-test.lock} (minutes, the first time)"
quiet_pip -r "$locked" || fail "the packages of requirements-$kind.lock could not be installed; pip's words are above."
quiet_pip --no-build-isolation -e . || fail "Switchyard itself could not be installed; pip's words are above."
echo "$wanted" >"$stamp"
# An environment with the tests' packages serves both purposes.
if [ -n "$tests" ]; then
    tests=
    fingerprint "$python" >"$venv/.installed-$kind"
fi
echo "installed in $((SECONDS - started)) s"
