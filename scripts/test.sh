#!/usr/bin/env bash
# Run the test suite, setting up .venv on first use:
#     bash scripts/test.sh [pytest arguments, for example: -k masking -x]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

setup_environment requirements.txt scripts/requirements-demo.txt tests/requirements.txt
cd "$ROOT"
python -m pytest tests -n auto --maxprocesses 4 --dist loadfile "$@"
