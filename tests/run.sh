#!/usr/bin/env bash
# Run the tests, also on a new machine. One file: bash tests/run.sh tests/test_configurator.py
set -euo pipefail
cd "$(dirname "$0")/.."
bash speedrun.sh setup
if ! .venv/bin/python -c 'import pytest' 2> /dev/null; then
    .venv/bin/python -m pip install -q --disable-pip-version-check 'pytest>=8'
fi

paths=tests # unless an argument is a file, or one test in a file
for word in "$@"; do
    if [ -e "${word%%::*}" ]; then paths=''; fi
done
exec .venv/bin/python -m pytest -q $paths "$@"
