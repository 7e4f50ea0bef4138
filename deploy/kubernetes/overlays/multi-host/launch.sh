#!/bin/sh
# In the leader of a group: waits for the other pods and starts RANKS_PER_HOST ranks on each, rank 0 here. From the controller:
# LWS_LEADER_ADDRESS (NAME-GROUP.NAME.NAMESPACE) and LWS_GROUP_SIZE; pod I of the group is NAME-GROUP-I.NAME.NAMESPACE.
set -eu
name=${LWS_LEADER_ADDRESS%%.*} domain=${LWS_LEADER_ADDRESS#*.}
hosts=$LWS_LEADER_ADDRESS:$RANKS_PER_HOST
index=1
while [ "$index" -lt "$LWS_GROUP_SIZE" ]; do
  host=$name-$index.$domain
  # The startup probe bounds the wait.
  until ssh -F /launch/ssh_config "$host" true; do sleep 2; done
  hosts=$hosts,$host:$RANKS_PER_HOST
  index=$((index + 1))
done

# The settings of this pod are those of all ranks.
set -- /usr/local/bin/dejavud "$@"
for variable in $(env | sed -n 's/^\(\(DEJAVUD\|NCCL\)_[A-Z0-9_]*\)=.*/\1/p'); do set -- -x "$variable" "$@"; done
# Fully qualified names, or Open MPI cuts them at the first dot. SIGTERM reaches all ranks: rank 0 drains, the others wait.
exec mpirun --host "$hosts" -n $((LWS_GROUP_SIZE * RANKS_PER_HOST)) --map-by slot --bind-to none \
  --mca orte_keep_fqdn_hostnames 1 --mca plm_rsh_agent "ssh -F /launch/ssh_config" --mca plm_rsh_no_tree_spawn 1 \
  --mca odls_base_sigkill_timeout "$((DRAIN_S + 5))" "$@"
