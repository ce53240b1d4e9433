# Part of tpu_pod.sh: asking Cloud TPU, and running on its workers. With
# --dry-run, commands are printed and answered as if all went well.
# shellcheck shell=bash disable=SC2153  # parts share variables

# cloud ARGUMENTS...: gcloud, about this TPU's zone and project.
cloud() {
  local command=(
    gcloud "$@" "--zone=$QWENVL_POD_ZONE"
    ${QWENVL_POD_PROJECT:+"--project=$QWENVL_POD_PROJECT"} --quiet
  )
  if dry; then
    quote "${command[@]}" >&3
    return 0
  fi
  "${command[@]}"
}

check_gcloud() {
  dry || command -v gcloud >/dev/null || die 'gcloud is not installed' \
    'https://cloud.google.com/sdk/docs/install, then: gcloud auth login' \
    '(--dry-run and --local work without it)'
}

# _state KIND FIELDS IF_DRY: prints the fields of a description, ABSENT if
# there is no such thing, UNKNOWN if one cannot tell now.
_state() {
  local kind=$1 fields=$2 found
  if dry; then
    cloud compute tpus "$kind" describe "$QWENVL_POD_TPU" "--format=$fields"
    printf '%s\n' "$3"
    return
  fi
  if found=$(cloud compute tpus "$kind" describe "$QWENVL_POD_TPU" \
    "--format=$fields" 2>"$SCRATCH/describe"); then
    printf '%s\n' "${found:-UNKNOWN}"
  elif grep -qE 'NOT_FOUND|not found|notFound' "$SCRATCH/describe"; then
    printf 'ABSENT\n'
  else
    printf 'UNKNOWN\n'
  fi
}

# State and, if it failed, reason (tab-separated) of the queued resource.
queue_state() {
  _state queued-resources \
    'value(state.state,state.failedData.error.message)' "${1:-ACTIVE}"
}

# State of the TPU itself.
tpu_state() { _state tpu-vm 'value(state)' "${1:-READY}"; }

# Whether a TPU in this state is gone for good; UNKNOWN is not.
is_lost() {
  case $1 in
    ABSENT | PREEMPTED | TERMINATED | DELETING | STOPPED | STOPPING) return 0 ;;
    HIDING | HIDDEN | SUSPENDING | SUSPENDED | FAILED) return 0 ;;
  esac
  return 1
}

# _connect VERB ARGUMENTS...: gcloud's ssh and scp, as --ssh says. Only the
# alpha commands go through the Identity-Aware Proxy, and know groups of workers:
# more than a hundred connections at once are prone to fail.
_connect() {
  local verb=$1 alpha=() how=()
  shift
  case $QWENVL_POD_SSH in
    internal) how=(--internal-ip) ;;
    iap) alpha=(alpha) how=(--tunnel-through-iap) ;;
  esac
  if [ -n "${QWENVL_POD_TYPE:-}" ] &&
    [ "$(chips_of "$QWENVL_POD_TYPE")" -gt 400 ]; then
    alpha=(alpha) how+=(--batch-size=100)
  fi
  cloud "${alpha[@]}" compute tpus tpu-vm "$verb" "$@" "${how[@]}"
}

# on_workers WHICH COMMAND: runs a command line on worker(s) WHICH; a
# connection that went silent ends after two minutes.
on_workers() {
  _connect ssh "$QWENVL_POD_TPU" "--worker=$1" \
    --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4 \
    "--command=$2"
}

# worker_sh WORDS...: the command line of the worker's own script.
worker_sh() {
  quote bash qwenvl_jax/checkout/launch/pod/worker.sh "$@"
}

copy_to_workers() {
  _connect scp "$1" "$QWENVL_POD_TPU:${1##*/}" --worker=all
}

# explain FILE: says what an error of gcloud means and what helps. Prints
# (stdout) the kind: quota, capacity, permission, exists or other.
explain() {
  local file=$1
  if [ -s "$file" ]; then
    sed 's/^/     /' "$file" >&2
  fi
  if grep -qiE 'quota' "$file"; then
    say "quota: project ${QWENVL_POD_PROJECT:-(the default)} may not have" \
      "so many chips of ${QWENVL_POD_TYPE:-this type} in $QWENVL_POD_ZONE." \
      'Ask for more at https://console.cloud.google.com/iam-admin/quotas' \
      '(service tpu.googleapis.com; spot and on-demand count apart), or take' \
      'a smaller --type or another --zone.'
    printf 'quota\n'
  elif grep -qiE 'no more capacity|stockout|RESOURCE_EXHAUSTED|insufficient|not available within|valid.until' "$file"; then
    say "capacity: $QWENVL_POD_ZONE has no free ${QWENVL_POD_TYPE:-TPU} now." \
      'Wait (queued requests keep their place), or try another --zone, a' \
      'smaller --type, --spot, or a reservation (--reserved).'
    printf 'capacity\n'
  elif grep -qiE 'has not been used|SERVICE_DISABLED' "$file"; then
    say 'the Cloud TPU API is off: gcloud services enable tpu.googleapis.com'
    printf 'permission\n'
  elif grep -qiE 'PERMISSION_DENIED|auth login|credential|Reauthentication' "$file"; then
    say 'permission: log in with gcloud auth login, name the --project, and' \
      'have the roles TPU Admin (roles/tpu.admin) and Service Account User.'
    printf 'permission\n'
  elif grep -qiE 'ssh-add' "$file"; then
    say 'ssh: gcloud wants the key in an agent when it talks to several' \
      "workers: eval \"\$(ssh-agent)\"; ssh-add ~/.ssh/google_compute_engine"
    printf 'permission\n'
  elif grep -qiE 'INVALID_ARGUMENT|accelerator' "$file"; then
    say 'gcloud takes no such type or version here; these it has:' \
      'gcloud compute tpus accelerator-types list' \
      "--zone=$QWENVL_POD_ZONE, gcloud compute tpus tpu-vm versions list" \
      "--zone=$QWENVL_POD_ZONE"
    printf 'other\n'
  else
    printf 'other\n'
  fi
}
