#!/bin/bash
# Starts a SLURM of one node in a container, without systemd, for `python -m tools.rehearsal --slurm`.
#
#   apt-get install slurm-wlm munge && bash tools/rehearsal/slurm_node.sh
#
# Run it as root, and on no machine that has a SLURM: it writes /etc/slurm/slurm.conf. The state is in the folder that the
# first argument names, by default /tmp/slurm_node.
set -euo pipefail

folder=${1:-/tmp/slurm_node}
host=$(hostname -s)
if [ -e /etc/slurm/slurm.conf ] && ! grep -q 'ClusterName=msg-rehearsal' /etc/slurm/slurm.conf; then
    echo 'error: this machine has a SLURM: /etc/slurm/slurm.conf' >&2
    exit 1
fi
cpus=$(($(nproc) > 8 ? $(nproc) : 8))  # tasks of a rehearsal may outnumber the cores
mkdir -p "$folder/state" "$folder/spool" /run/munge /etc/slurm
[ -s /etc/munge/munge.key ] || head -c 1024 /dev/urandom > /etc/munge/munge.key
chown -R munge: /etc/munge /run/munge /var/log/munge /var/lib/munge
chmod 400 /etc/munge/munge.key
chmod 755 /run/munge

cat > /etc/slurm/slurm.conf << END
ClusterName=msg-rehearsal
SlurmctldHost=$host
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=10
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
END

pgrep -x munged > /dev/null || runuser -u munge -- munged
pgrep -x slurmctld > /dev/null || slurmctld
pgrep -x slurmd > /dev/null || slurmd
for _ in $(seq 30); do
    if sinfo --noheader --format=%t 2> /dev/null | grep -qE 'idle|mix|alloc'; then
        sinfo
        exit
    fi
    sleep 1
done
echo "error: the node has not come up: see $folder/slurmctld.log" >&2
exit 1
