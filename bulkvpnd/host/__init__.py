"""What the daemon changes on the machine; the undo lies next to each change."""
