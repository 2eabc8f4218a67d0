#!/bin/sh
# Runs a command of the image's build with the optional build secrets: a bundle of certificate authorities, where the
# network has its own. Nothing of it stays in the image. pip's secret, /etc/pip.conf, needs no help from here.
set -eu
if [ -s /run/secrets/ca_bundle ]; then
  export PIP_CERT=/run/secrets/ca_bundle SSL_CERT_FILE=/run/secrets/ca_bundle
fi
exec "$@"
