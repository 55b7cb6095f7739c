#!/bin/bash
# What mpirun starts its daemons on other hosts with, as it would start ssh: agent.sh DIRECTORY [options] HOST COMMAND.
# As under ssh, the command begins with a bare environment; what marks the job for the test that started it remains.
directory=$1
shift
while [ "${1#-}" != "$1" ]; do shift; done
host=$1
shift
exec env -i HOME="$HOME" TMPDIR="$directory/tmp" PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    ${RANKS_TEST_JOB:+RANKS_TEST_JOB="$RANKS_TEST_JOB"} \
    OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
    nsenter -t "$(cat "$directory/$host.pid")" -n -u -m -i bash -c "cd / && $*"
