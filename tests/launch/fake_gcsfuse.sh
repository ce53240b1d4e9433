#!/usr/bin/env bash
# Stands in for gcsfuse: all workers see the same folder as bucket.
set -eu

folder=${*: -1}
bucket=${*: -2:1}
if [ "$bucket" = missing ]; then
  echo "Error: bucket $bucket does not exist" >&2
  exit 1
fi
mkdir -p "$FAKE/buckets/$bucket"
rmdir "$folder" 2>/dev/null || rm "$folder"
ln -s "$FAKE/buckets/$bucket" "$folder"
