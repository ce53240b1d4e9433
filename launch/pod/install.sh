# Part of tpu_pod.sh: the same code and environment on all workers.
# shellcheck shell=bash disable=SC2034  # OUTCOME is read by supervise.sh

# What TPU VMs install of the project.
readonly EXTRAS=tpu,gcs

# _git_aside ARGUMENTS...: git with an index and new objects outside the
# repository, which stays as it is.
_git_aside() {
  local objects
  objects=$(git -C "$ROOT" rev-parse --path-format=absolute \
    --git-path objects) || die "$ROOT is not a git checkout" \
    'git says which files belong to the project: clone it, or git init and add'
  mkdir -p "$SCRATCH/objects"
  GIT_INDEX_FILE=$SCRATCH/index GIT_OBJECT_DIRECTORY=$SCRATCH/objects \
    GIT_ALTERNATE_OBJECT_DIRECTORIES=$objects git -C "$ROOT" "$@"
}

# Prints the id of the tree of files as they are now, changed or not yet
# committed ones included.
_tree() {
  _git_aside read-tree HEAD && _git_aside add --all && _git_aside write-tree
}

# _archive TREE FILE: without the tests, which are most of the bytes.
_archive() {
  mkdir -p "${2%/*}"
  _git_aside archive --format=tar.gz "--output=$2" "$1" -- . \
    ':(exclude)tests' || die "no archive of $ROOT could be made"
}

# install_everywhere: fails with OUTCOME preempted if the TPU went away.
install_everywhere() {
  local tree changed have archive install
  tree=$(_tree) || exit 1
  changed=$(git -C "$ROOT" status --short | head -n 12)
  say "code: commit $(git -C "$ROOT" rev-parse --short HEAD)," \
    "tree ${tree:0:12}"
  if [ -n "$changed" ]; then
    say 'WITH CHANGES THAT ARE NOT COMMITTED:'
    printf '%s\n' "$changed" | sed 's/^/     /' >&2
  fi
  if ! have=$(on_workers all 'cat qwenvl_jax/installed || echo nothing' \
    2>"$SCRATCH/ssh"); then
    _not_reached 'the workers cannot be reached'
    return 1
  fi
  if [ "$(sort -u <<<"$have")" = "$tree $EXTRAS" ]; then
    say 'installed already on all workers'
    return 0
  fi
  archive=$(state_dir)/qwenvl_jax-$tree.tar.gz
  dry || _archive "$tree" "$archive"
  say "copying it to all workers$(dry || printf ' (%s)' \
    "$(du -h "$archive" | cut -f1)")"
  if ! copy_to_workers "$archive" >&2 2>"$SCRATCH/ssh"; then
    _not_reached 'copying to the workers failed'
    return 1
  fi
  dry || rm -f "$archive"
  say 'installing on all workers (some minutes)'
  install="rm -rf qwenvl_jax/new && mkdir -p qwenvl_jax/new && tar -xzf \
${archive##*/} -C qwenvl_jax/new && rm ${archive##*/} && bash \
qwenvl_jax/new/launch/pod/worker.sh install $tree $EXTRAS"
  if ! on_workers all "$install" >"$SCRATCH/install" 2>"$SCRATCH/ssh"; then
    cat "$SCRATCH/install" >&2
    _not_reached "the installation failed on worker(s)$(
      sed -n 's/^worker \([0-9?]*\): FAILED.*/ \1/p' "$SCRATCH/install" |
        sort -nu | tr -d '\n'
    ), see above"
    return 1
  fi
  dry ||
    say "installed on $(grep -c ': ready$' "$SCRATCH/install" || true) worker(s)"
}

# _not_reached MESSAGE: the TPU's fault, or ours?
_not_reached() {
  local state
  state=$(tpu_state)
  if is_lost "$state"; then
    say "TPU $QWENVL_POD_TPU is $state"
    OUTCOME=preempted
    return 0
  fi
  explain "$SCRATCH/ssh" >/dev/null
  die "$1"
}
