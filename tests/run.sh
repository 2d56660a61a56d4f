#!/usr/bin/env bash
# Run the tests, also on a new machine. One file: bash tests/run.sh tests/test_configurator.py
set -euo pipefail
cd "$(dirname "$0")/.."
bash speedrun.sh setup
if ! .venv/bin/python -c 'import pytest, xdist' 2> /dev/null; then
    .venv/bin/python -m pip install -q --disable-pip-version-check 'pytest>=8' 'pytest-xdist>=3'
fi

paths=tests # unless an argument is a file, or one test in a file
for word in "$@"; do
    if [ -e "${word%%::*}" ]; then paths=''; fi
done
# two workers; the tests of a file stay together, since they share what is slow to make
exec .venv/bin/python -m pytest -q -n 2 --dist loadfile $paths "$@"
