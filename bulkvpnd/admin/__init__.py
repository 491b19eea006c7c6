"""The commands of bulkvpnctl(8)."""
