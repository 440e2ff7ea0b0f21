#!/bin/sh
# Writes requirements.txt and torch-cuda.txt: every library of the image by version and sha256. Needs `uv`, and PyPI.
set -eu
cd "$(dirname "$0")/../.."
head="# Made by infra/docker/lock.sh from pyproject.toml and constraints.txt, for Python 3.11 on x86-64 Linux; do not edit."
all=$(uv pip compile --quiet pyproject.toml --extra 8bit --constraint constraints.txt --generate-hashes --no-annotate \
    --no-header --python-version 3.11 --python-platform x86_64-manylinux_2_28)
# An entry is a line that begins in the first column, and the indented ones below it.
pick() {
    printf '%s\n' "$head"
    printf '%s\n' "$all" | awk -v of_cuda="$1" '/^[^ ]/ { ours = ($0 ~ /^(torch|triton|nvidia-|cuda-)/) } ours == of_cuda'
}
pick 0 > infra/docker/requirements.txt
pick 1 > infra/docker/torch-cuda.txt
