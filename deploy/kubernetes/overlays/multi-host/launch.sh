#!/bin/sh
# In the leader of a group: waits for the other pods and starts RANKS_PER_HOST ranks on each, rank 0 here. From the controller:
# LWS_LEADER_ADDRESS (NAME-GROUP.NAME.NAMESPACE) and LWS_GROUP_SIZE; pod I of the group is NAME-GROUP-I.NAME.NAMESPACE.
set -eu
trap 'exit 0' TERM  # nothing runs yet
rank_0=${TMPDIR:-/tmp}/rank-0
rm -f "$rank_0"
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
set -- sh -c '[ "$OMPI_COMM_WORLD_RANK" != 0 ] || echo $$ >"$0"; exec dejavud "$@"' "$rank_0" "$@"
for variable in $(env | sed -n 's/^\(\(DEJAVUD\|NCCL\)_[A-Z0-9_]*\)=.*/\1/p'); do set -- -x "$variable" "$@"; done

# Names are fully qualified, or Open MPI would cut them at the first dot.
mpirun --host "$hosts" -n $((LWS_GROUP_SIZE * RANKS_PER_HOST)) --map-by slot --bind-to none \
  --mca orte_keep_fqdn_hostnames 1 --mca plm_rsh_agent "ssh -F /launch/ssh_config" --mca plm_rsh_no_tree_spawn 1 "$@" &
mpirun=$!
# To rank 0 alone, which drains while the others follow it. mpirun itself would pass the signal on, sleep, and kill.
trap 'kill -TERM "$(cat "$rank_0" 2>/dev/null || echo "$mpirun")"' TERM
while :; do
  code=0
  wait "$mpirun" || code=$?
  kill -0 "$mpirun" 2>/dev/null || break  # else it was the signal that ended the wait
done
exit "$code"
