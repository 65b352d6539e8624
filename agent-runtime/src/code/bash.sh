# Ratoon's Bash: runs cells in this shell; see code/mod.rs for what is said on descriptor 3.
# Cells come as 8 digits (bytes) and the code; R and 7 digits is a seed. They are sourced, not eval'ed: an interrupt can leave
# a sourced cell from any depth (a DEBUG trap that gives 2 stands for `return`, with extdebug).
exec 61<&3 3<&-
__ratoon_leave() {
  # Only in a cell, and whatever it has called.
  if [[ " ${FUNCNAME[*]} " == *" source "* ]]; then return 2; fi
  return 0
}
__ratoon_interrupt() {
  __ratoon_hit=1
  shopt -s extdebug
  set -T
  trap __ratoon_leave DEBUG
}
__ratoon_calm() {
  __ratoon_hit=0
  shopt -u extdebug
  set +T
  trap - DEBUG
}
__ratoon_last() { return "$__ratoon_status"; }
__ratoon_hit=0
__ratoon_status=0
trap '__ratoon_interrupt' INT
printf 'H\n' >&61
while :; do
  if ! IFS= LC_ALL=C read -r -N 8 -u 61 __ratoon_code; then
    # An interrupt that came too late for its cell?
    if (( __ratoon_hit )); then __ratoon_calm; continue; fi
    break
  fi
  # The machine has become another one: new random numbers.
  if [[ $__ratoon_code == R* ]]; then RANDOM=$((10#${__ratoon_code:1})); continue; fi
  IFS= LC_ALL=C read -r -N "$((10#$__ratoon_code))" -u 61 __ratoon_code || break
  if (( __ratoon_hit )); then __ratoon_calm; fi
  __ratoon_last
  . /dev/fd/60 60<<<"$__ratoon_code" 61>&-
  __ratoon_status=$?
  if (( __ratoon_hit )); then
    __ratoon_calm
    __ratoon_status=130
  fi
  printf 'S%d\n' "$__ratoon_status" >&61
done
