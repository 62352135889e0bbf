#!/bin/bash
# Check that tests/links can use ip and tc: root is required; install Debian's iproute2 if missing.
set -euo pipefail

export PATH=$PATH:/usr/sbin
if [[ $(id -u) -ne 0 ]]; then
    echo "only root can create network namespaces: run this as root" >&2
    exit 1
fi
command -v ip >/dev/null && command -v tc >/dev/null && exit

if ! command -v apt-get >/dev/null; then
    echo "ip and tc not found: install iproute2" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq --yes --no-install-recommends iproute2
