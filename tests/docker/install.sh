#!/bin/bash
# Check that tests/docker can build images without a container engine: root is required; install
# Debian's packages if they are missing.
set -euo pipefail

packages=(buildah debootstrap)
export PATH=$PATH:/usr/sbin
missing=()
for program in "${packages[@]}"; do
    command -v "$program" >/dev/null || missing+=("$program")
done
if [[ $(id -u) -ne 0 ]]; then
    echo "Building images in a chroot requires root: sudo make test-docker" >&2
    exit 1
fi
[[ ${#missing[@]} -eq 0 ]] && exit

if ! command -v apt-get >/dev/null; then
    echo "${missing[*]} not found. On Debian or Ubuntu: apt-get install ${packages[*]}" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq --yes --no-install-recommends "${packages[@]}"
