"""What Prefect runs and shows: the flow, its cards, servers, deployments and workers."""
