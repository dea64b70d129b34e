#!/usr/bin/env bash
# Makes or updates a virtual environment at the root of the repository and prints its path. Does nothing when the
# environment already holds what the requirement files say, and redoes a set-up that was interrupted.
#
#   tools/setup_env.sh                  Paddle 3.3.1 in .venv
#   tools/setup_env.sh --paddle 2.6.2   Paddle 2.6.2 in .venv-paddle-2.6.2
#
# PYTHON=/path/to/python in the environment chooses the Python, 3.9 to 3.11.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
say() { printf '%s\n' "$*" >&2; }
fail() { say "$1"; exit "${2:-1}"; }

overrides=
venv=$root/.venv
case "$*" in
    '' | '--paddle 3.3.1') ;;
    '--paddle 2.6.2') overrides=$root/requirements-paddle-2.6.2.txt venv=$root/.venv-paddle-2.6.2 ;;
    *) fail "setup_env.sh: cannot use '$*': give nothing, '--paddle 3.3.1' or '--paddle 2.6.2'" 2 ;;
esac
python=$venv/bin/python
stamp=$venv/unimo2-installed
unfinished=$venv/unimo2-unfinished

suitable() { "$1" -c 'import sys; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 11))' 2>/dev/null; }
version_of() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null; }
# A half-deleted environment's Python is the system's in disguise: installing with it would change the system.
is_environment() { "$1" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null; }

find_python() {
    local candidate found=() candidates=(python3.11 python3 python3.10 python3.9)
    [ -z "${PYTHON-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if ! version_of "$candidate" >/dev/null; then
            found+=("$candidate does not run")
        elif ! suitable "$candidate"; then
            found+=("$candidate is $(version_of "$candidate")")
        elif ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            found+=("$candidate has no venv module (Debian, Ubuntu: apt-get install python3-venv)")
        else
            # The one behind an activated environment, which may be the very one to be replaced.
            "$candidate" -c 'import sys; print(sys._base_executable)'
            return
        fi
    done
    say "No usable Python: Python 3.9, 3.10 or 3.11 with its venv module is needed."
    printf '  %s\n' "${found[@]}" >&2
    fail "Install one, or name it: PYTHON=/path/to/python3.11 bash tools/demo.sh" 2
}

# The first line that names a package wins, so overrides come first.
requirements() {
    awk -F'==' 'NF > 1 && !seen[$1]++' ${overrides:+"$overrides"} "$root/requirements.txt" "$root/requirements-test.txt"
}
place() { echo "Python $(version_of "$python") in $venv"; }
wanted() { place; requirements; cat "$root/setup.py"; }

# Two commands started together must not install over each other; the lock ends with this process.
exec 9<"$root"
if command -v flock >/dev/null && ! flock -n 9; then
    say "Waiting for another set-up in $root ..."
    flock 9
fi

remake=
if ! is_environment "$python" || [ -e "$unfinished" ]; then
    remake=yes
elif ! suitable "$python"; then
    fail "$venv holds Python $(version_of "$python"), but 3.9 to 3.11 is needed: move it away and run this again." 2
elif [ -n "${PYTHON-}" ] && [ "$(version_of "$PYTHON")" != "$(version_of "$python")" ]; then
    remake=yes
elif [ -f "$stamp" ] && wanted | cmp -s - "$stamp"; then
    echo "$venv"
    exit
elif [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" != "$(place)" ]; then
    remake=yes  # the checkout was moved or the system's Python replaced: paths in it are wrong
elif ! "$python" -m pip --version >/dev/null 2>&1; then
    remake=yes
fi

if [ -n "$remake" ]; then
    base=$(find_python)
    say "Making $venv with Python $(version_of "$base")"
    rm -rf "$venv.old"
    [ ! -e "$venv" ] || mv "$venv" "$venv.old"
    "$base" -m venv "$venv" || fail "Cannot make $venv."
    rm -rf "$venv.old"
fi

rm -f "$stamp"
touch "$unfinished"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_REQUIRE_VIRTUALENV=1 PIP_USER=0
list=$venv/requirements.txt
requirements >"$list"
pip_install() {
    "$python" -m pip install --quiet "$@" \
        || fail "The installation in $venv failed (see above). Run the command again to continue; what was downloaded is kept."
}
say "Installing $(grep -c == "$list") pinned packages (about 2 GB on disk; 1 to 10 minutes, depending on the network) ..."
# The few packages without wheels are built with the pinned tools instead of whatever is newest on that day.
pip_install --constraint "$list" pip setuptools setuptools-scm
pip_install --no-build-isolation -r "$list"

# paddleclas declares opencv-python, whose wheel needs the system's libGL. Where it cannot be loaded, the headless wheel of
# the same version has all we use; `pip check` then reports opencv-python as missing, which is harmless.
if ! "$python" -c 'import cv2' 2>/dev/null; then
    say "OpenCV cannot be loaded here (usually libGL is missing): taking its headless wheel instead."
    "$python" -m pip uninstall --quiet --yes opencv-python
    pip_install --no-deps --force-reinstall "$(sed -n 's/^opencv-python==\([^ ]*\).*/opencv-python-headless==\1/p' "$list")"
    "$python" -c 'import cv2' || fail "The headless OpenCV cannot be loaded either (see above)."
fi

pip_install --no-deps --no-build-isolation --editable "$root"
wanted >"$stamp.new"
mv "$stamp.new" "$stamp"
rm "$unfinished"
echo "$venv"
