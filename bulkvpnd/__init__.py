"""bulkvpnd: a VPN daemon that moves packets in bulk over parallel TCP connections."""

__version__ = "0.1.0"
