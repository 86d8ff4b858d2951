#!/usr/bin/env bash
# The tests, as bash run_all.sh test runs them when the packages are there: layout, faults that ruff finds, behaviour.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pip install -q -r tests/requirements.txt
python -m ruff format --check --config tests/ruff.toml .
python -m ruff check --config tests/ruff.toml .
exec python -m pytest -q -n 2 tests
