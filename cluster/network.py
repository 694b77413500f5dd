"""The network interface that a worker's collectives use: the one that Ray reaches its node by.

Gloo by itself takes the interface of the host's name, which on many systems is the loopback: two nodes never meet.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct

SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface


def interface_of(address: str) -> str | None:
    """The name of the interface that has this IPv4 address; None when there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # an interface without an IPv4 address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def use_node_interface() -> None:
    """In a worker, before its process group is made: name the interface, unless the environment names one."""
    import ray

    name = interface_of(ray.util.get_node_ip_address())
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
