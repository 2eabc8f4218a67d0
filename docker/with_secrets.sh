#!/bin/sh
# Runs a command of the image's build with the optional build secret ca_bundle, a file of certificate authorities. It is
# not stored in the image. pip itself reads the other secret, /etc/pip.conf.
set -eu
if [ -s /run/secrets/ca_bundle ]; then
  export PIP_CERT=/run/secrets/ca_bundle SSL_CERT_FILE=/run/secrets/ca_bundle
fi
exec "$@"
