#!/bin/bash
# See that ip and tc are here for tests/links, and the right to use them: install Debian's, as root, or say how.
set -euo pipefail

export PATH=$PATH:/usr/sbin
if [[ $(id -u) -ne 0 ]]; then
    echo "network namespaces can be made by root alone: run this as root" >&2
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
