# Part of tpu_pod.sh: from nothing to a TPU that is ready, and back.
# shellcheck shell=bash disable=SC2034,SC2153  # parts share variables

# bring_up: returns when the TPU is ready. Fails with OUTCOME capacity or
# preempted where trying again later may help; ends the script where not.
bring_up() {
  local state
  state=$(_certain queue_state ABSENT) || exit 1
  state=${state%%$'\t'*}
  say "TPU $QWENVL_POD_TPU in $QWENVL_POD_ZONE: its queued resource is $state"
  case $state in
    ABSENT) _use_existing || _request || return 1 ;;
    SUSPENDED | SUSPENDING | FAILED | DELETING)
      say 'that request is over: it is removed and made anew'
      remove_request
      _request || return 1
      ;;
  esac
  remember_settings
  _wait_until_ready
}

# What no waiting mends.
REFUSED='PERMISSION_DENIED|SERVICE_DISABLED|INVALID_ARGUMENT|has not been used'
readonly REFUSED+='|gcloud auth|credentials|required property'

# _certain COMMAND: a state as it tells, but not UNKNOWN; tries for half an hour.
_certain() {
  local answer try
  for try in {1..120}; do
    answer=$("$@")
    if [ "$answer" != UNKNOWN ]; then
      printf '%s\n' "$answer"
      return
    fi
    ! grep -qiE "$REFUSED" "$SCRATCH/describe" || break
    [ "$try" -gt 1 ] ||
      say "no answer, trying again: $(tail -n 1 "$SCRATCH/describe")"
    pause 15
  done
  explain "$SCRATCH/describe" >/dev/null
  die "the state of TPU $QWENVL_POD_TPU cannot be found out"
}

# Whether there is a TPU of that name that was not requested through a queue.
_use_existing() {
  local state
  state=$(_certain tpu_state ABSENT) || exit 1
  case $state in
    ABSENT) return 1 ;;
    READY | CREATING | STARTING | RESTARTING | REPAIRING)
      say "it was not requested through a queue; its state: $state"
      ;;
    *)
      die "TPU $QWENVL_POD_TPU is $state, and was not requested through a \
queue: it is not made anew by itself" \
        'launch/tpu_pod.sh down deletes it; then up requests a new one'
      ;;
  esac
}

_request() {
  local capacity=() kind
  [ -n "${QWENVL_POD_TYPE:-}" ] || usage_error \
    '--type is missing: v5litepod-256, v5p-128, v6e-256, v4-512, ...'
  [ "$QWENVL_POD_CAPACITY" = on-demand ] ||
    capacity=("--$QWENVL_POD_CAPACITY")
  say "requesting $QWENVL_POD_TYPE ($QWENVL_POD_CAPACITY)," \
    "software $QWENVL_POD_RUNTIME_VERSION"
  if ! cloud compute tpus queued-resources create "$QWENVL_POD_TPU" \
    "--node-id=$QWENVL_POD_TPU" "--accelerator-type=$QWENVL_POD_TYPE" \
    "--runtime-version=$QWENVL_POD_RUNTIME_VERSION" "${capacity[@]}" \
    "${CREATE_FLAGS[@]}" 2>"$SCRATCH/create"; then
    kind=$(explain "$SCRATCH/create")
    [ "$kind" = capacity ] ||
      die "the request for TPU $QWENVL_POD_TPU was refused ($kind)"
    OUTCOME=capacity
    return 1
  fi
}

_wait_until_ready() {
  local answer state tpu before='' since told kind
  since=$(now) told=$since
  while :; do
    answer=$(_certain queue_state) || exit 1
    state=${answer%%$'\t'*} tpu=''
    case $state in
      # ABSENT: a TPU that was not requested through a queue.
      ACTIVE | ABSENT)
        tpu=$(_certain tpu_state) || exit 1
        if [ "$tpu" = READY ]; then
          say "TPU $QWENVL_POD_TPU is ready"
          return 0
        elif is_lost "$tpu"; then
          say "TPU $QWENVL_POD_TPU is $tpu"
          OUTCOME=preempted
          return 1
        fi
        ;;
      FAILED)
        printf '%s\n' "${answer#*$'\t'}" >"$SCRATCH/failed"
        say 'the request failed:'
        kind=$(explain "$SCRATCH/failed")
        [ "$kind" = capacity ] ||
          die "TPU $QWENVL_POD_TPU was not granted ($kind)"
        OUTCOME=capacity
        return 1
        ;;
      SUSPENDING | SUSPENDED)
        say 'it was preempted before it was ready'
        OUTCOME=preempted
        return 1
        ;;
    esac
    state="$state${tpu:+, TPU $tpu}"
    if [ "$state" != "$before" ] || [ $(($(now) - told)) -ge 300 ]; then
      told=$(now)
      say "$state after $(duration $((told - since)))$(_meaning "$state")"
      before=$state
    fi
    pause 15
  done
}

_meaning() {
  case $1 in
    WAITING_FOR_RESOURCES*) printf ': in the queue until chips are free' ;;
    PROVISIONING*) printf ': the chips are there, machines are started' ;;
  esac
}

# Deletes the queued resource with what it holds; it may still be changing.
remove_request() {
  local try
  for try in 1 2 3 4 5 6 7 8 9 10; do
    if cloud compute tpus queued-resources delete "$QWENVL_POD_TPU" \
      --force 2>"$SCRATCH/delete"; then
      return 0
    fi
    case $(queue_state ABSENT) in ABSENT*) return 0 ;; esac
    [ "$try" -lt 10 ] || break
    pause 30
  done
  explain "$SCRATCH/delete" >/dev/null
  die "queued resource $QWENVL_POD_TPU cannot be deleted"
}

take_down() {
  local state tpu
  state=$(_certain queue_state) || exit 1
  state=${state%%$'\t'*}
  if [ "$state" = ABSENT ]; then
    tpu=$(_certain tpu_state) || exit 1
    if [ "$tpu" = ABSENT ]; then
      say "there is no TPU $QWENVL_POD_TPU in $QWENVL_POD_ZONE"
      return 0
    fi
    _confirm "delete TPU $QWENVL_POD_TPU ($tpu) and its disks?"
    cloud compute tpus tpu-vm delete "$QWENVL_POD_TPU"
  else
    _confirm "delete TPU $QWENVL_POD_TPU ($state) and its disks?"
    remove_request
  fi
  say "TPU $QWENVL_POD_TPU is deleted"
}

_confirm() {
  local answer=''
  { [ -n "${YES:-}" ] || dry; } && return 0
  [ -t 0 ] || die "$1 Nobody to ask: pass --yes"
  read -r -p "pod: $1 [y/N] " answer
  case $answer in
    y | Y | yes) ;;
    *) die 'nothing was deleted' ;;
  esac
}
