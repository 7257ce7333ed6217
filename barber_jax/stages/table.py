"""The table of stages, in the order in which they run, and what follows from the options of all of them."""

from collections.abc import Mapping

from barber_jax.stages import least_squares, rebuild, reconstruct, refine
from barber_jax.stages.base import SharedOptions, Stage

STAGES: Mapping[str, Stage] = {
    "rebuild": rebuild.STAGE,
    "refine": refine.STAGE,
    "least squares": least_squares.STAGE,
    "reconstruct": reconstruct.STAGE,
}


def enabled_stages(options: SharedOptions) -> list[Stage]:
    """The stages that the options ask for, in order."""
    return [stage for stage in STAGES.values() if stage.enabled(options)]


def validates(options: SharedOptions) -> bool:
    """Whether some stage chooses by the loss on held-out samples."""
    return any(stage.validates(options) for stage in enabled_stages(options))


def needs_dense_stream(options: SharedOptions) -> bool:
    """Whether the dense model's activations are needed beside the pruned model's."""
    return validates(options) and options.target == "dense"


def needs_token_weights(options: SharedOptions) -> bool:
    """Whether a stage weights tokens by the dense model's end loss."""
    return STAGES["refine"].enabled(options) and options.refine_weighting == "gradient"


def unused_options(options: SharedOptions) -> dict[str, str]:
    """Options that no enabled stage looks at, each with what would."""
    unused = {
        option: stage.switch for stage in STAGES.values() if not stage.enabled(options) for option in stage.options
    }
    if not validates(options):
        unused["target"] = "--alpha auto, --refine, --least-squares or --reconstruct"
    if not enabled_stages(options):
        unused["rounds"] = "a rebuild, --refine, --least-squares or --reconstruct"
    return unused
