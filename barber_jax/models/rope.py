"""Rotary position embedding: reads its parameters from a configuration and rotates queries and keys.

Sources: RoFormer (arXiv 2104.09864) for the rotation; linear scaling (arXiv 2306.15595); llama3 scaling as released
with Llama 3.1. Feature order is Hugging Face's: feature i of a head is rotated with feature i + head size / 2.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.models.numbers import SMALLEST, positive

FASTEST = 1e6
"""Radians per position from which float32 no longer resolves the angles of consecutive positions."""


@dataclass(frozen=True)
class Rope:
    """Rotary parameters. `factor` is used by the kinds `linear` and `llama3`, the fields after it by `llama3` only."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192

    @classmethod
    def from_hf(cls, config: dict) -> "Rope":
        """Read the entries of config.json, in the old layout (rope_theta, rope_scaling) or the new (rope_parameters).

        Raises:
            BarberError: a rope type that is not default, linear or llama3, or a missing or invalid parameter.
        """
        # Transformers 5 moved theta into rope_parameters; files of both layouts, and mixtures, are in use.
        given = {"rope_theta": 10000.0}
        outer = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor")}
        for entries in (outer, config.get("rope_scaling") or {}, config.get("rope_parameters") or {}):
            if not isinstance(entries, dict):
                raise BarberError(f"config.json: rope parameters must be an object, not {entries!r}")
            given |= {key: value for key, value in entries.items() if value is not None}
        theta = _positive(given, "rope_theta")
        kind = given.get("rope_type") or given.get("type") or "default"
        partial = given.get("partial_rotary_factor", 1.0)
        if partial != 1.0:
            raise BarberError(f"config.json: partial_rotary_factor {partial} is not supported, only 1.0")
        try:
            if kind == "default":
                return cls(theta)
            if kind == "linear":
                return cls(theta, kind, _positive(given, "factor"))
            if kind == "llama3":
                low, high = _positive(given, "low_freq_factor"), _positive(given, "high_freq_factor")
                if low >= high:
                    raise BarberError(f"config.json: low_freq_factor {low:g} must be below high_freq_factor {high:g}")
                original = int(_positive(given, "original_max_position_embeddings"))
                return cls(theta, kind, _positive(given, "factor"), low, high, original)
        except KeyError as missing:
            raise BarberError(f"config.json: rope type {kind!r} needs {missing}") from None
        raise BarberError(f"config.json: rope type {kind!r} is not supported (known: default, linear, llama3)")

    def check(self, head_size: int) -> None:
        """Check that these parameters give every pair of a head's features a rotation that float32 can represent.

        Raises:
            BarberError: the head size is odd, or a frequency is zero, too high or not finite.
        """
        if head_size % 2:
            raise BarberError(
                f"config.json: the head size (head_dim, or hidden_size / num_attention_heads) is {head_size}, "
                "but rotary positions need an even one; correct config.json or fetch it again"
            )
        with np.errstate(all="ignore"):
            # A larger head has others between these; an absurd size must fail at the shapes of the tensors.
            frequencies = self.inverse_frequencies(min(head_size, 4096))
        # Also false for NaN.
        if not ((frequencies >= SMALLEST) & (frequencies <= FASTEST)).all():
            raise BarberError(
                f"config.json: the {self.kind} rope parameters (rope_theta {self.theta:g}, factor {self.factor:g}) "
                f"rotate by {frequencies.min():g} to {frequencies.max():g} radians per position, beyond float32; "
                "correct config.json or fetch it again"
            )

    def inverse_frequencies(self, head_size: int) -> np.ndarray:
        """Rotation of each feature pair in radians per position, float32 [head_size / 2]."""
        # The power is in float64 and everything else in float32, to match PyTorch's table to the last bit. The position
        # multiplies an error here, up to the sequence length, which is enough to change masks where scores nearly tie.
        exponent = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
        frequency = np.float32(1) / (self.theta ** exponent.astype(np.float64)).astype(np.float32)
        if self.kind == "linear":
            return frequency / np.float32(self.factor)
        if self.kind == "llama3":
            return self._llama3(frequency)
        return frequency

    def _llama3(self, frequency: np.ndarray) -> np.ndarray:
        # Short wavelengths are kept, long ones stretched by `factor`, and those in between interpolated.
        wavelength = 2 * math.pi / frequency
        low, high = self.low_frequency_factor, self.high_frequency_factor
        blend = (self.original_positions / wavelength - low) / (high - low)
        between = (1 - blend) * frequency / self.factor + blend * frequency
        out = np.where(wavelength > self.original_positions / low, frequency / self.factor, between)
        return np.where(wavelength < self.original_positions / high, frequency, out).astype(np.float32)

    def rotate(self, x: jax.Array, position: jax.Array | None = None) -> jax.Array:
        """Rotate heads [S, L, H, E] by position: 0..L-1, or int32 [S] for one token per sequence (L = 1)."""
        length, size = x.shape[1], x.shape[-1]
        if position is None:
            angle = np.arange(length, dtype=np.float32)[None, :, None] * self.inverse_frequencies(size)
        else:
            angle = position.astype(jnp.float32)[:, None, None] * self.inverse_frequencies(size)
        angle = jnp.concatenate([angle, angle], axis=-1)[:, :, None, :]
        cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
        first, second = jnp.split(x, 2, axis=-1)
        return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


def _positive(given: dict, key: str) -> float:
    return positive(f"rope parameter {key}", given[key])
