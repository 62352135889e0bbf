#!/bin/bash
# Check that tests/slurm can start SLURM and munge: install Debian's packages if they are missing.
set -euo pipefail

packages=(munge slurmctld slurmd slurm-client)
export PATH=$PATH:/usr/sbin
missing=()
for program in munged slurmctld slurmd sbatch unshare; do
    command -v "$program" >/dev/null || missing+=("$program")
done
[[ ${#missing[@]} -eq 0 ]] && exit

if [[ $(id -u) -ne 0 ]] || ! command -v apt-get >/dev/null; then
    echo "${missing[*]} not found. As root on Debian or Ubuntu: apt-get install ${packages[*]}" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq --yes --no-install-recommends "${packages[@]}"
