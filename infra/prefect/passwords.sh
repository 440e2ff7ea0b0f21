#!/bin/sh
# Prints the .env of compose.yaml, with passwords made now: (umask 077; infra/prefect/passwords.sh > infra/prefect/.env).
# Digests cannot be known beforehand: `docker buildx imagetools inspect IMAGE --format '{{.Manifest.Digest}}'` tells them.
set -eu
random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
echo "PREFECT_AUTH=cacheloom:$(random)"
echo "POSTGRES_PASSWORD=$(random)"
echo "REDIS_PASSWORD=$(random)"
echo "POSTGRES_DIGEST="  # of postgres:16.10-bookworm
echo "PREFECT_DIGEST="   # of prefecthq/prefect:3.8.8-python3.11
echo "REDIS_DIGEST="     # of redis:7.4.6-bookworm, where compose.scaled.yaml is used
echo "CACHELOOM_IMAGE="  # registry.example.com/cacheloom@sha256:...
