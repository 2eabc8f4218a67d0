"""Check that this host has one of the network interfaces that --network-interface names.

    python -I hvd_adam/launch/interfaces.py mpirun.sh eth0,eth1

Open MPI ignores an interface that does not exist, with a warning, and uses others. Only the standard library is
imported, because the launch scripts run this file by its path.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
from collections.abc import Collection

SIOCGIFADDR = 0x8915  # linux/sockios.h


def has_ipv4(interface: str) -> bool:
    """Returns whether this host has a network interface of this name with an IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as endpoint:
        try:
            fcntl.ioctl(endpoint, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return False
    return True


def usable_interfaces(names: Collection[str], script: str) -> set[str]:
    """Returns those of `names` that this host has with an IPv4 address; exits with one line if there is none."""
    found = sorted(name for _, name in socket.if_nameindex() if has_ipv4(name))
    if not (usable := {*names} & {*found}):
        print(
            f"{script}: error: this host has no network interface {','.join(sorted(names))} with an IPv4 address: "
            f"use {', '.join(found)}",
            file=sys.stderr,
        )
        sys.exit(2)
    return usable


if __name__ == "__main__":
    usable_interfaces(sys.argv[2].split(","), sys.argv[1])
