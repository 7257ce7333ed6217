"""Other people's formats: checkpoints in, checkpoints and masks out. Importing this package imports nothing heavy."""
