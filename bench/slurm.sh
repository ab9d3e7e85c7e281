#!/bin/bash
# A Slurm of two nodes on this one machine, and a command in it.
#
#     bench/slurm.sh                            runs python -m bench.slurm
#     bench/slurm.sh COMMAND ...                runs this in its place
#     bench/slurm.sh --install [COMMAND ...]    first installs Debian's packages (slurm-wlm, munge); as root
#
# Key, configuration, logs and state lie in a folder of their own, which goes when the command has ended
# ($SLURM_FOLDER names one to keep). Nothing of the machine's own Slurm is read. All listens on the loopback address.
set -euo pipefail

if [ "${1:-}" = --install ]; then
    shift
    apt-get update -qq && apt-get install -qq -y --no-install-recommends slurm-wlm munge
fi
PATH=$PATH:/usr/sbin
for program in munged slurmctld slurmd srun sbatch; do
    command -v "$program" >/dev/null || { echo "bench/slurm.sh: no $program; add --install, or: apt-get install slurm-wlm munge" >&2; exit 2; }
done
[ $# -gt 0 ] || set -- "${PYTHON:-python}" -m bench.slurm

folder=${SLURM_FOLDER:-$(mktemp -d /tmp/slurm.XXXXXX)}
mkdir -p "$folder"/{state,node1,node2}
chmod 0755 "$folder"
export SLURM_CONF=$folder/slurm.conf
daemons=()

stop() {
    trap - EXIT
    for daemon in "${daemons[@]}"; do kill "$daemon" 2>/dev/null || true; done
    wait "${daemons[@]}" 2>/dev/null || true
    [ -n "${SLURM_FOLDER:-}" ] || rm -rf "$folder"
}
trap stop EXIT
trap 'exit 130' INT TERM

(umask 077; head -c 1024 /dev/urandom >"$folder/munge.key")
cat >"$SLURM_CONF" <<END
ClusterName=loopback
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
SlurmctldPort=16817
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CryptoType=crypto/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldTimeout=30
NodeName=node1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=16818 CPUs=2
NodeName=node2 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=16819 CPUs=2
PartitionName=loopback Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
END

start() { "$@" >>"$folder/daemons.log" 2>&1 & daemons+=($!); }
start munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
    --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
for _ in $(seq 100); do [ -S "$folder/munge.socket" ] && break; sleep 0.1; done
start slurmctld -D -i
start slurmd -D -N node1
start slurmd -D -N node2

for _ in $(seq 60); do
    [ "$(sinfo --noheader --states=idle --Format=nodes 2>/dev/null | tr -d ' ')" = 2 ] && break
    sleep 0.5
done
if [ "$(sinfo --noheader --states=idle --Format=nodes 2>/dev/null | tr -d ' ')" != 2 ]; then
    echo "bench/slurm.sh: its nodes did not come up; the ends of their logs:" >&2
    tail -n 5 "$folder"/*.log >&2
    exit 1
fi
"$@"
