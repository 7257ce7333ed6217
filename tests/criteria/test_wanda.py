"""Wanda as a starting criterion."""

from criterion_contract import CriterionContract


class TestWanda(CriterionContract):
    method = "wanda"
    options = ("--method", "wanda", "--no-rebuild")
