#!/usr/bin/env bash
# The tests, on a fresh machine too:  bash tests/run.sh     one file:  bash tests/run.sh tests/test_configurator.py
set -euo pipefail
cd "$(dirname "$0")/.."
bash speedrun.sh setup
.venv/bin/python -c 'import pytest' 2>/dev/null ||
    .venv/bin/python -m pip install -q --disable-pip-version-check 'pytest>=8'
paths=tests # unless the arguments name files of their own
for arg in "$@"; do
    if [ -e "${arg%%::*}" ]; then paths=; fi
done
exec .venv/bin/python -m pytest -q $paths "$@"
