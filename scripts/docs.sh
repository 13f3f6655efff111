#!/usr/bin/env bash
# Builds the documentation site into site/: zensical.toml, docs/, and the API from the docstrings. Every warning is an error,
# broken links and anchors included. Look at it with: python -m http.server --directory site
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "[docs]"
python scripts/stair_picture.py
log="$(mktemp)"
trap 'rm -f "$log"' EXIT
PYTHONPATH=scripts zensical build --strict --clean 2>&1 | tee "$log"
if grep -q "griffe:" "$log"; then # docstrings that cannot be read; zensical does not count them
    echo "error: the docstrings above need repair" >&2
    exit 1
fi
if grep -rlE '<(script|link|img|iframe)[^>]+(src|href)="?https?://' site --include='*.html'; then
    echo "error: the pages above load something from the network" >&2
    exit 1
fi
