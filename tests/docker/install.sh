#!/bin/bash
# See that what builds images without an engine is here for tests/docker: install Debian's, as root, or say how.
set -euo pipefail

packages=(buildah debootstrap)
export PATH=$PATH:/usr/sbin
missing=()
for program in "${packages[@]}"; do
    command -v "$program" >/dev/null || missing+=("$program")
done
if [[ $(id -u) -ne 0 ]]; then
    echo "The images are built in a chroot, which takes root: sudo make test-docker" >&2
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
