#!/bin/sh
# Print how many GPUs a process that is started here would see; needs no Python packages.
#
# nvidia-smi lists all GPUs. CUDA_VISIBLE_DEVICES, if set, restricts them: it lists indices or UUIDs,
# of which CUDA ignores the first invalid one and all that follow it. Set but empty it hides all.
listed=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ')
if [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then
    echo "$listed"
    exit
fi
visible=$(
    printf '%s\n' "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | tr -d ' ' |
        sed -n -e '/^[0-9][0-9]*$/{p;d;}' -e '/^GPU-/{p;d;}' -e '/^MIG-/{p;d;}' -e q | grep -c .
)
[ "$visible" -lt "$listed" ] && listed=$visible
echo "$listed"
