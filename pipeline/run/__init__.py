"""How one stage runs on this machine: the process, its slots, its progress."""
