#!/bin/bash
# The first process of a cluster in namespaces: namespaces.sh DIR. `cluster.py` starts it in a network, mounts and
# process ids of its own; it ends, and all below it with it, when its standard input does.
#
#     DIR/{hosts,slurm.conf,sshd_config,ssh_config,...}    written by cluster.py
#     DIR/log/                                             of every daemon
set -eu
export SLURM_CONF="$1/slurm.conf"

if [ "${2:-}" ]; then # a host
    hostname "$2"
    /usr/sbin/sshd -D -e -f "$1/sshd_config" &
    slurmd -D -N "$2" -f "$SLURM_CONF" &
    wait
    exit
fi

# All of /run is this cluster's own: names of networks, sockets of munge and sshd.
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd /run/munge
chmod 755 /run/munge
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/ssh_config" /etc/ssh/ssh_config
hostname controller
ip link set lo up
ip link add bridge0 type bridge
ip address add 10.88.0.1/24 dev bridge0
ip link set bridge0 up
munged --foreground --key-file "$1/munge.key" --log-file "$1/log/munge" --pid-file "$1/munge.pid" \
    --seed-file "$1/munge.seed" >"$1/log/munge.out" 2>&1 &
until [ -S /run/munge/munge.socket.2 ]; do sleep 0.05; done
slurmctld -D -f "$SLURM_CONF" >"$1/log/slurmctld.out" 2>&1 &
for number in 1 2; do
    host=host-$number
    ip netns add $host
    ip link add cable$number type veth peer name eth0 netns $host
    ip link set cable$number master bridge0 up
    ip -n $host address add 10.88.0.1$number/24 dev eth0
    ip -n $host link set lo up
    ip -n $host link set eth0 up
    ip netns exec $host unshare --uts --pid --ipc --fork --kill-child --mount-proc \
        bash "$0" "$1" $host >"$1/log/$host.out" 2>&1 &
done
read -r _ || true
