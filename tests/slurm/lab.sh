#!/usr/bin/env bash
# A SLURM cluster on this machine, for the tests and for trying things by hand, as root:
#
#   tests/slurm/lab.sh DIR up N          nodes n1 … nN, all files in DIR; runs until it is killed, and then nothing is left
#   tests/slurm/lab.sh DIR in COMMAND …  a command in the cluster: sbatch, squeue, scontrol, …
#   tests/slurm/lab.sh DIR off NODE      the node's power fails
#   tests/slurm/lab.sh DIR cut NODE      its cable is pulled out; heal: put in again
#
# A node is a host of its own: network, hostname, processes and mounts are namespaces within those of the cluster, and all
# of them end with the cluster's first process. Needs munge, slurmctld, slurmd, slurm-client and iproute2.
set -euo pipefail
dir=$(realpath -m "$1") verb=$2
shift 2
export SLURM_CONF=$dir/slurm.conf
namespaces=(unshare --net --uts --mount --pid --fork --kill-child --mount-proc)

configure() {
    mkdir -p "$dir/ctld"
    (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
    echo 'CgroupPlugin=cgroup/v1' >"$dir/cgroup.conf"
    printf '127.0.0.1 localhost\n10.0.0.100 head\n' >"$dir/hosts"
    for i in $(seq "$1"); do
        mkdir -p "$dir/n$i"
        echo "10.0.0.$i n$i" >>"$dir/hosts"
    done
    # Credentials of the last start must have expired before a job starts again, after 121 seconds unless told otherwise.
    cat >"$SLURM_CONF" <<EOF
ClusterName=lab
SlurmctldHost=head
SlurmUser=root
SlurmdUser=root
AuthInfo=socket=$dir/munge.sock,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SlurmdParameters=config_overrides
MpiDefault=none
SlurmdTimeout=10
KillWait=15
MinJobAge=3600
StateSaveLocation=$dir/ctld
SlurmdSpoolDir=$dir/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/%n/slurmd.log
NodeName=n[1-$1] CPUs=4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES
EOF
}

# Process 1 of the cluster.
cluster() {
    mount --bind "$dir/hosts" /etc/hosts
    hostname head
    ip link add bridge type bridge
    ip address add 10.0.0.100/24 dev bridge
    ip link set lo up
    ip link set bridge up
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.sock" --pid-file="$dir/munge.pid" \
        --log-file="$dir/munge.log" --seed-file="$dir/munge.seed"
    slurmctld
    for i in $(seq "$1"); do
        "${namespaces[@]}" bash "$0" "$dir" node "$i" >"$dir/n$i/node.log" 2>&1 &
        echo $! >"$dir/n$i/pid"
        until [ ! /proc/self/ns/net -ef "/proc/$!/ns/net" ]; do sleep 0.02; done
        ip link add "n$i" type veth peer name eth0 netns $!
        ip link set "n$i" master bridge up
    done
    sleep infinity & # bash reaps whatever becomes its child meanwhile
    wait $!
}

# Process 1 of a node.
node() {
    hostname "n$1"
    mount -t tmpfs tmpfs /dev/shm
    until ip address add "10.0.0.$1/24" dev eth0 2>/dev/null; do sleep 0.02; done
    ip link set lo up
    ip link set eth0 up
    slurmd -D &
    sleep infinity &
    wait $!
}

inside() {
    local pid first
    pid=$(<"$dir/pid")
    first=$(<"/proc/$pid/task/$pid/children")
    nsenter --target "${first% }" --net --uts --mount --pid --wd="$PWD" -- "$@"
}

case $verb in
up)
    configure "$1"
    echo $$ >"$dir/pid"
    exec setpriv --pdeathsig KILL "${namespaces[@]}" bash "$0" "$dir" cluster "$1"
    ;;
cluster | node) "$verb" "$1" ;;
in) inside "$@" ;;
off) inside kill -KILL "$(<"$dir/$1/pid")" ;;
cut) inside ip link set "$1" down ;;
heal) inside ip link set "$1" up ;;
esac
