#!/bin/sh
# Runs as the first process of a PID and mount namespace of its own: munge, a Slurm controller and one slurmd a node, each
# node with a host name of its own (PMIx keys what it knows of a node by that). When this process ends, the kernel ends
# all of them, and every job. Arguments: the directory (with slurm.conf and munge.key), then the nodes.
set -eu
directory=$1
shift
munged --force --key-file="$directory/munge.key" --socket="$directory/munge.socket" --pid-file="$directory/munged.pid" \
    --log-file="$directory/munged.log" --seed-file="$directory/munge.seed"
export SLURM_CONF="$directory/slurm.conf"
slurmctld -f "$SLURM_CONF" -i -c -D >/dev/null 2>&1 &
# The server side of PMIx 4 in a container: no shared-memory store, no munge of the machine's.
export PMIX_MCA_gds=hash PMIX_MCA_psec=native
for node in "$@"; do
    unshare --uts sh -c "hostname $node; exec slurmd -f '$SLURM_CONF' -N $node -D" >/dev/null 2>&1 &
done
wait
