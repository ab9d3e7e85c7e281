"""What a run would take, reckoned before anything runs: memory, tokens, hours, money."""
