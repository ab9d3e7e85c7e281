"""How the stages are run: dvc.yaml's graph, a Prefect flow over it, the choice of params.yaml.

Nothing here imports torch or dualign: to this package a stage is a command.
"""
