#!/usr/bin/env bash
# Builds .venv from environments/main.txt and installs this project into it (editable). Instant when nothing changed.
#
#   PYTHON=python3.12 environments/setup.sh     choose the interpreter; default: the first of python3.11, 3.12, python3 that fits
#
# `torch==2.13.0` in the lock is the CUDA build; where PIP_FIND_LINKS (or UV_FIND_LINKS) points at a CPU wheel, that one wins.
set -euo pipefail
cd "$(dirname "$0")/.."

UV_VERSION=0.13.9
LOCK=environments/main.txt
UNPINNED=environments/unpinned.txt
MARKER=.venv/.installed

fits() { # interpreter: is it there, and one that pyproject.toml's requires-python allows?
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null
}

find_python() {
  for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
    if fits "$candidate"; then command -v "$candidate" && return; fi
  done
  echo "No Python 3.11 or 3.12 found (looked for: ${PYTHON:-python3.11 python3.12 python3})." >&2
  echo "Install one with its venv module (Debian: apt install python3.11-venv), or name it: make setup PYTHON=/path/to/python" >&2
  return 1
}

make_venv() {
  if fits .venv/bin/python; then return; fi
  local python
  python=$(find_python)
  echo "Making .venv with $("$python" --version)"
  "$python" -m venv --clear .venv || {
    echo "$python cannot make a virtual environment: install its venv module (Debian: apt install python3-venv)" >&2
    return 1
  }
}

digest() { # of everything that decides what .venv holds
  .venv/bin/python -c 'import hashlib, pathlib, sys
print(hashlib.sha256(b"\0".join(pathlib.Path(name).read_bytes() for name in sys.argv[1:])).hexdigest())' \
    "$LOCK" "$UNPINNED" pyproject.toml environments/setup.sh
}

make_venv
wanted=$(digest)
if [ "$(cat "$MARKER" 2>/dev/null || true)" = "$wanted" ]; then exit 0; fi

# uv reads none of pip's settings: pass on where packages come from, and trust the certificates this system trusts.
pip_setting() { .venv/bin/python -m pip config get "global.$1" 2>/dev/null || true; }
export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-true}"
export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$(pip_setting find-links)}}"
index="${PIP_INDEX_URL:-$(pip_setting index-url)}"
if [ -n "$index" ]; then export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"; fi

echo "Installing $(wc -l <"$LOCK") packages of $LOCK into .venv (1 to 3 minutes)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION"
.venv/bin/uv pip install --quiet --python .venv/bin/python --compile-bytecode --requirements "$LOCK"
.venv/bin/uv pip install --quiet --python .venv/bin/python --compile-bytecode --no-deps --requirements "$UNPINNED"
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --editable .
echo "$wanted" >"$MARKER"
echo "Ready: .venv"
