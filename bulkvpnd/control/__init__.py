"""The main process: privilege, private key and decisions."""
