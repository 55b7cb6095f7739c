#!/bin/bash
# Run by hosts.py as the first process of network, mount, PID and IPC namespaces of their own, which end with it:
#   network.sh DIRECTORY COUNT bridge|switch
# It makes COUNT hosts, says "up", and then obeys the lines on its input, answering "ok" to each:
#   rate RATE|off   cut N|heal N   run N COMMAND...
# The input's end, also when whoever holds it is killed, is the end of all that lives in here.
set -u
directory=$1 count=$2 kind=$3
pids=()

fail() { echo "failed: $*"; exit 1; }

# In a host's own namespaces: its name, its addresses of all, /dev/shm, and a /sys that shows its network.
become_host() {
    hostname "$1" && mount --bind "$directory/hosts" /etc/hosts && mount -t tmpfs tmpfs /dev/shm || exit 1
    if [ -d /sys/fs/cgroup ] && mkdir -p "$directory/cgroup" && mount --rbind /sys/fs/cgroup "$directory/cgroup"; then
        mount -t sysfs "$1" /sys && mount --move "$directory/cgroup" /sys/fs/cgroup
    fi 2>/dev/null
    sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1 2>/dev/null
    ip link set lo up
    echo $$ >"$directory/host$2.new" && mv "$directory/host$2.new" "$directory/host$2.pid"
    exec sleep infinity
}
export -f become_host
export directory

echo "127.0.0.1 localhost" >"$directory/hosts"
for i in $(seq "$count"); do echo "10.77.0.$i host$i" >>"$directory/hosts"; done
ip link set lo up || fail "no network of its own"
[ "$kind" = switch ] || { ip link add bridge0 type bridge && ip link set bridge0 up; } || fail "no bridge"
for i in $(seq "$count"); do
    unshare --net --uts --mount --ipc --propagation private bash -c "become_host host$i $i" </dev/null >/dev/null 2>"$directory/host$i.log" &
    pids[i]=$!
done
for i in $(seq "$count"); do
    until [ -s "$directory/host$i.pid" ]; do
        kill -0 "${pids[i]}" 2>/dev/null || fail "host$i: $(cat "$directory/host$i.log")"
        sleep 0.005
    done
done
if [ "$kind" = switch ]; then
    coproc SWITCH { exec "$directory/switch" "${pids[@]}" 2>&1; }
    read -r answer <&"${SWITCH[0]}" && [ "$answer" = up ] || fail "switch: ${answer:-ended}"
fi
for i in $(seq "$count"); do
    if [ "$kind" = bridge ]; then
        ip link add "port$i" type veth peer name eth0 netns "${pids[i]}" && ip link set "port$i" master bridge0 up
    fi || fail "no link for host$i"
    nsenter -t "${pids[i]}" -n bash -c "ip link set eth0 address 02:00:00:00:00:$(printf %02x "$i") up &&
        ip addr add 10.77.0.$i/24 dev eth0" || fail "no address for host$i"
done
echo up

# shape RATE: both directions of every link.
shape() {
    local burst=${2:-256kb} i
    for i in $(seq "$count"); do
        tc qdisc del dev "port$i" root 2>/dev/null
        nsenter -t "${pids[i]}" -n tc qdisc del dev eth0 root 2>/dev/null
        [ "$1" = off ] && continue
        tc qdisc add dev "port$i" root tbf rate "$1" burst "$burst" latency 20ms &&
            nsenter -t "${pids[i]}" -n tc qdisc add dev eth0 root tbf rate "$1" burst "$burst" latency 20ms || return 1
    done
    return 0
}

while read -r command argument rest; do
    if [ "$command" = run ]; then
        nsenter -t "${pids[argument]}" -n -u -m -i bash -c "$rest"
    elif [ "$kind" = switch ]; then
        echo "$command $argument" >&"${SWITCH[1]}" && read -r _ <&"${SWITCH[0]}"
    else
        case $command in
        rate) shape "$argument" $rest ;;
        cut) ip link set "port$argument" down ;;
        heal) ip link set "port$argument" up ;;
        *) false ;;
        esac
    fi </dev/null >"$directory/command.log" 2>&1 && echo ok || echo "failed: $command $argument: $(tr '\n' ' ' <"$directory/command.log")"
done

# Whoever made the directory may have been killed.
rm -rf --one-file-system "$directory"
