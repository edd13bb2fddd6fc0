#!/usr/bin/env bash
# Run the test suite, setting up .venv on first use:
#     bash scripts/test.sh [pytest arguments, for example: -k masking -x]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

setup_environment requirements.txt scripts/requirements-demo.txt tests/requirements.txt
cd "$ROOT"
# One process more than cores, at most 4: some tests wait for time limits.
python -m pytest tests -n $((CORES < 4 ? CORES + 1 : 4)) --dist loadfile "$@"
