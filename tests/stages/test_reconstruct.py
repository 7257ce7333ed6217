"""Reconstruction as a stage."""

import pytest
from stage_contract import StageContract


class TestReconstruct(StageContract):
    stage = "reconstruct"
    options = ("--no-rebuild", "--reconstruct", 6, "--reconstruct-batch", 4, "--reconstruct-scope", "all")
    swaps = False


@pytest.mark.slow
class TestEverythingInRounds(StageContract):
    stage = "reconstruct"
    options = ("--alpha", 0.2, "--refine", 3, "--reconstruct", 4, "--reconstruct-batch", 4, "--rounds", 2)
    mesh_agreement = 0.99
