"""The multi-queue TUN device.

It is not persistent: the kernel removes it when its last queue is closed, which is the undo, after a crash too.
The main process keeps every queue open, because the kernel renumbers the rest when one closes, and flows would move.
"""

import errno
import fcntl
import os
import struct
import sys

CONTROL_DEVICE = "/dev/net/tun"

# linux/if_tun.h
TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNGETIFF = 0x800454D2
TUNSETVNETLE = 0x400454DC
IFF_TUN = 0x0001
IFF_MULTI_QUEUE = 0x0100
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
IFF_TUN_EXCL = 0x8000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 = 0x01, 0x02, 0x04
TUN_F_USO4, TUN_F_USO6 = 0x20, 0x40

_TSO = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6
# What to ask the kernel for, best first. An unknown flag makes the whole call fail (tun.c, set_offload): UDP
# segmentation offload needs Linux 6.2.
_OFFLOADS = (
    (_TSO | TUN_F_USO4 | TUN_F_USO6, ("csum", "tso", "uso")),
    (_TSO, ("csum", "tso")),
)


class TunError(Exception):
    """The device cannot be had. exit_status: what the daemon ends with."""

    def __init__(self, message, exit_status=1):
        super().__init__(message)
        self.exit_status = exit_status


class Tun:
    """An open device. name: as the kernel gave it. descriptors: one per queue. offloads: names that it can do now."""

    def __init__(self, name, descriptors):
        self.name = name
        self.descriptors = descriptors
        self.offloads = ()

    @classmethod
    def open(cls, name, queues):
        """Makes the device `name` (%d: first free number) with `queues` queues, without offload. Raises TunError."""
        descriptors = []
        try:
            for _ in range(queues):
                # Only the first may create it: a device of somebody else's is never shared by accident.
                exclusive = 0 if descriptors else IFF_TUN_EXCL
                descriptor = os.open(CONTROL_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
                descriptors.append(descriptor)
                flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE | exclusive
                request = struct.pack("16sH22x", name.encode("ascii"), flags)
                name = fcntl.ioctl(descriptor, TUNSETIFF, request)[:16].rstrip(b"\0").decode("ascii")
                if sys.byteorder == "big":
                    fcntl.ioctl(descriptor, TUNSETVNETLE, struct.pack("i", 1))
        except OSError as error:
            for descriptor in descriptors:
                os.close(descriptor)
            raise _explain(error, name) from None
        return cls(name, descriptors)

    def enable_offload(self):
        """Turns on what the kernel has and proves it by writing a super-packet; the link must be up.

        Returns None, or why there is no offload.
        """
        for flags, names in _OFFLOADS:
            try:
                fcntl.ioctl(self.descriptors[0], TUNSETOFFLOAD, flags)
            except OSError:
                continue
            try:
                os.write(self.descriptors[0], probe_packet())
            except OSError as error:
                # Kernels 6.6.44 and its like take the flags and refuse the writes.
                self.disable_offload()
                return f"the kernel refuses to take a super-packet: {error.strerror}"
            self.offloads = names
            return None
        return "the kernel's TUN has no segmentation offload"

    def disable_offload(self):
        fcntl.ioctl(self.descriptors[0], TUNSETOFFLOAD, 0)
        self.offloads = ()

    def is_up(self):
        """Whether the device still exists; it can be deleted from outside."""
        # Neither in /sys, which may be that of another network namespace (NetworkNamespacePath= of systemd), nor by
        # name, which takes a descriptor, and there may be none left. A queue whose device is gone answers EBADFD.
        try:
            fcntl.ioctl(self.descriptors[0], TUNGETIFF, bytes(40))
        except OSError:
            return False
        return True

    def close(self):
        """Closes every queue, and with the last one the device is gone."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = []


def probe_packet():
    """A TCP super-packet of one and a half segments that the kernel must segment, and then drops.

    Its last segment is shorter than gso_size, which is what the broken kernels refuse. Source and destination are
    255.255.255.255 and 0.0.0.0, both never valid there (RFC 1122 section 3.2.1.3), so no host ever sees it.
    """
    payload = bytes(150)
    tcp = struct.pack(">HHIIBBHHH", 9, 9, 0, 0, 0x50, 0x10, 0, 0, 0)
    total = 20 + len(tcp) + len(payload)
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, total, 0, 0, 0, 6, 0, b"\xff" * 4, bytes(4))
    vnet = struct.pack("<BBHHHH", 1, 1, 40, 100, 20, 16)
    return vnet + ip + tcp + payload


def _explain(error, name):
    if error.errno == errno.ENOENT:
        return TunError(f"{CONTROL_DEVICE} is missing; run: modprobe tun")
    if error.errno in (errno.EPERM, errno.EACCES):
        return TunError(
            f"cannot make the TUN device {name}: {error.strerror}; it needs root or CAP_NET_ADMIN", os.EX_NOPERM
        )
    if error.errno == errno.EBUSY:
        return TunError(f"the TUN device {name} exists already; choose another device = NAME, or remove it with: "
                        f"ip link delete {name}")
    return TunError(f"cannot make the TUN device {name}: {error.strerror}")
