"""What DVC knows: the graph, its records, params.yaml and the code dependencies."""
