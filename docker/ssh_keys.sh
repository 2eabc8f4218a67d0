#!/usr/bin/env bash
# Makes the key pair with which the containers of one job connect, in ~/.ssh, and authorizes it. An existing key pair is
# kept. ~/.ssh must be a volume that all containers mount; the image contains no key.
set -euo pipefail

folder=~/.ssh
if [[ ! -s $folder/authorized_keys ]]; then
  rm -f "$folder/id_ed25519" "$folder/id_ed25519.pub"
  ssh-keygen -q -t ed25519 -N '' -C hvd_adam -f "$folder/id_ed25519"
  cp "$folder/id_ed25519.pub" "$folder/authorized_keys"
fi
echo "the key pair is in $folder"
