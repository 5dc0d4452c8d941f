#!/usr/bin/env bash
# Installs the checkout around this file, in editable form, with its locked dependencies, into a
# virtual environment. `make install` and both images run this, so that they all install alike.
#
#   docker/install.sh [EXTRAS]     e.g. dev, or s3
#
#   PYTHON       the interpreter to make the environment with      python3.11
#   VENV         where, as seen from the checkout                  .venv
#   TORCH_INDEX  the package index with torch's build to install   pip's own
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=${1:-}
venv=${VENV:-.venv}

"${PYTHON:-python3.11}" -m venv "$venv"

# torch comes first and by exact version: a looser requirement may choose a build for other hardware.
# Alone, because such an index holds few versions of anything else.
"$venv/bin/pip" install --quiet --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
    "$(grep '^torch==' constraints.txt)"
"$venv/bin/pip" install --quiet --constraint constraints.txt --editable ".${extras:+[$extras]}"
