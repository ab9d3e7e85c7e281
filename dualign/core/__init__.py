"""What every stage stands on: typed params, errors, artefacts, progress, the skeleton of a
stage.
"""
