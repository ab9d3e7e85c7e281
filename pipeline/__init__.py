"""How the stages are run: the graph of `dvc.yaml`, a Prefect flow over it, the choice of
params.yaml.

Nothing here imports torch or dualign: to this package a stage is a command.
"""
