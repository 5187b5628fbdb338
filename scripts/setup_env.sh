# shellcheck shell=bash
# Sourced from the repository's root by the scripts beside it: a Python environment that open_po runs in. If it is
# ready already, this takes no time.
#
#   no environment is active        .venv is made if need be, activated, and gets the tested versions (constraints.txt)
#   an environment without torch    gets the tested versions too
#   an environment with torch       is someone's choice, a GPU image's for example: what is missing is added, but no
#                                   version of what is installed changes; pip stops if that is impossible
#   OPEN_PO_SKIP_INSTALL=1          nothing is made or installed; the active environment is used as it is, else .venv,
#                                   else the system's Python
#
# PYTHON names the interpreter that makes .venv (default python3). Where packages come from is for pip's own settings to
# say (PIP_INDEX_URL, pip.conf): on a machine without a GPU, an index of torch's CPU builds saves gigabytes.

open_po_fail() {
    echo "error: $*" >&2
    exit 1
}

# The tested versions, into the active environment. The stamp says which setup.py and constraints.txt it was made from.
open_po_install_tested() {
    echo "Installing the tested versions into $1: torch ..."
    python -m pip install -qq --disable-pip-version-check -c constraints.txt torch ||
        open_po_fail "torch cannot be installed, see above"
    echo "Installing the tested versions into $1: everything else ..."
    python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]' ||
        open_po_fail "the packages of constraints.txt cannot be installed, see above"
    echo "$2" >"$1/.open_po_installed"
}

# What is missing, into an environment whose installed versions stay as they are.
open_po_install_missing() {
    echo "Installing what is missing into $1, versions that are installed stay: $2 ..."
    local pins failed=
    pins=$(mktemp)
    python -m pip list --disable-pip-version-check --format=freeze --exclude-editable --exclude open_po >"$pins"
    python -m pip install -qq --disable-pip-version-check -c "$pins" -e '.[dev]' || failed=1
    rm "$pins"
    [ -z "$failed" ] ||
        open_po_fail "$1 cannot be completed without other versions; deactivate it to get a .venv of tested ones"
}

open_po_has() { # distribution
    python -I -c 'import sys, importlib.metadata as m; m.version(sys.argv[1])' "$1" 2>/dev/null
}

# What setup.py asks for and the active environment lacks, in one line; nothing if it is complete.
open_po_lacks() {
    python -I - <<'EOF'
import ast
from importlib.metadata import PackageNotFoundError, version

try:
    from packaging.requirements import Requirement
except ImportError:
    raise SystemExit(print("packaging")) from None

module = ast.parse(open("setup.py").read())
setup = next(node.value for node in module.body if isinstance(node, ast.Expr))
fields = {field.arg: field.value for field in setup.keywords}
wanted = ast.literal_eval(fields["install_requires"]) + ast.literal_eval(fields["extras_require"])["dev"]
lacks = []
for requirement in map(Requirement, ["open_po", *wanted]):
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        lacks.append(str(requirement))
    else:
        if not requirement.specifier.contains(found, prereleases=True):
            lacks.append(f"{requirement} (has {found})")
print(*lacks, sep=", ", end="")
EOF
}

open_po_setup_env() {
    local environment=${VIRTUAL_ENV:-${CONDA_PREFIX:-}} wanted lacks
    if [ -z "$environment" ]; then
        if [ ! -e .venv/bin/activate ] && [ -z "${OPEN_PO_SKIP_INSTALL:-}" ]; then
            local python=${PYTHON:-python3}
            "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
                open_po_fail "$python is $("$python" --version 2>&1 || true); open_po needs Python 3.11 or newer:" \
                    "name one, as in PYTHON=python3.12 bash $0"
            echo "Making .venv with $("$python" --version) ..."
            "$python" -m venv .venv || open_po_fail "$python cannot make .venv, see above"
        fi
        if [ -e .venv/bin/activate ]; then
            # shellcheck disable=SC1091
            source .venv/bin/activate
            environment=$VIRTUAL_ENV
        fi
    fi
    command -v python >/dev/null || python() { python3 "$@"; } # a system's Python may have the one name only
    python -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        open_po_fail "the active environment has $(python --version 2>&1); open_po needs Python 3.11 or newer"
    [ -z "${OPEN_PO_SKIP_INSTALL:-}" ] || return 0

    wanted=$(cat setup.py constraints.txt | cksum)
    if [ -e "$environment/.open_po_installed" ] || [ "$environment" = "$PWD/.venv" ]; then # made here
        [ "$wanted" = "$(cat "$environment/.open_po_installed" 2>/dev/null)" ] ||
            open_po_install_tested "$environment" "$wanted"
    elif ! open_po_has torch; then
        open_po_install_tested "$environment" "$wanted"
    else
        lacks=$(open_po_lacks)
        [ -z "$lacks" ] || open_po_install_missing "$environment" "$lacks"
    fi
}

open_po_setup_env
