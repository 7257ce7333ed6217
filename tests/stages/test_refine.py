"""Refinement as a stage."""

from stage_contract import StageContract


class TestRefine(StageContract):
    stage = "refine"
    options = ("--no-rebuild", "--refine", 5, "--token-weighting", "norm")
    # A near-tie is decided otherwise by rounding, and what is swapped after it follows.
    mesh_agreement = 0.99
