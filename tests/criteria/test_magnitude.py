"""Magnitude as a starting criterion."""

from criterion_contract import CriterionContract


class TestMagnitude(CriterionContract):
    method = "magnitude"
    options = ("--method", "magnitude", "--no-rebuild")
    group = (0, 1)
