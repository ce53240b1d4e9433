# Part of worker.sh: buckets as folders (Cloud Storage FUSE), for data that is
# not to be read from gs:// itself: tpu_pod.sh --mount-data.
# shellcheck shell=bash

# buckets_of WORDS...: the names after mount:// in any of them.
buckets_of() {
  printf '%s\n' "$@" | grep -o 'mount://[-a-z0-9_.]*' | sed 's|mount://||' |
    sort -u || true
}

# mount_bucket NAME FOLDER
mount_bucket() {
  mountpoint -q "$2" && return 0
  command -v gcsfuse >/dev/null || _install_gcsfuse || return 1
  mkdir -p "$2" || return 1
  # Prepared data does not change: what is known of a file stays so.
  gcsfuse -o ro --implicit-dirs --metadata-cache-ttl-secs=-1 "$1" "$2"
}

# As https://cloud.google.com/storage/docs/cloud-storage-fuse/install has it.
_install_gcsfuse() {
  local packages=https://packages.cloud.google.com/apt
  local key=/usr/share/keyrings/cloud.google.asc
  curl -fsS "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null &&
    printf 'deb [signed-by=%s] %s gcsfuse-%s main\n' "$key" "$packages" \
      "$(lsb_release -cs)" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null &&
    # A fresh machine updates itself, and holds the lock for some minutes.
    sudo apt-get -qq -o DPkg::Lock::Timeout=600 update &&
    sudo apt-get -qq -y -o DPkg::Lock::Timeout=600 install gcsfuse
}
