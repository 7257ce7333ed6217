"""Rotary position embedding: reads its parameters from a configuration and rotates queries and keys.

Sources: RoFormer (arXiv 2104.09864) for the rotation; linear scaling (arXiv 2306.15595); llama3 scaling as released
with Llama 3.1; YaRN (arXiv 2309.00071), as transformers computes it. Feature order is Hugging Face's: feature i of a
head is rotated with feature i + head size / 2.
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

MOST_ATTENTION = 100.0
"""Largest factor by which YaRN may lengthen, or shorten, queries and keys; published models have up to 2."""


@dataclass(frozen=True)
class Rope:
    """Rotary parameters, of which `default` uses `theta` only, `linear` also `factor`, and the others what they need.

    Attributes:
        original_positions: number of positions before scaling, for `llama3` and `yarn`.
        attention_factor: what `yarn` multiplies cosines and sines by, and so queries and keys; 1 for the others.
        fast, slow: rotations within the original positions from which `yarn` keeps a frequency, and up to which it
            divides it by `factor`.
        truncate: whether `yarn` rounds the features between which it blends.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: float = 8192
    attention_factor: float = 1.0
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True

    @classmethod
    def from_hf(cls, config: dict) -> "Rope":
        """Read the entries of config.json, in the old spelling (rope_theta, rope_scaling) or the new (rope_parameters).

        Raises:
            BarberError: a rope type that is not default, linear, llama3 or yarn, settings that differ between kinds of
                layers, or a missing or invalid parameter.
        """
        given = _settings(config)
        theta, kind = _positive(given, "rope_theta"), given["rope_type"]
        partial = given.get("partial_rotary_factor", 1.0)
        if partial != 1.0 and not (partial is None and kind == "default"):
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
                original = _positive(given, "original_max_position_embeddings")
                return cls(theta, kind, _positive(given, "factor"), low, high, original)
            if kind == "yarn":
                return cls._yarn(theta, given, config.get("max_position_embeddings"))
        except KeyError as missing:
            raise BarberError(f"config.json: rope type {kind!r} needs {missing}") from None
        raise BarberError(
            f"config.json: rope type {kind!r} is not supported (known: default, linear, llama3, yarn); "
            "prune with the rotary settings that the model was trained with"
        )

    @classmethod
    def _yarn(cls, theta: float, given: dict, positions: int | None) -> "Rope":
        original = _positive(given, "original_max_position_embeddings")
        if given["factor"] is None and positions:
            given = given | {"factor": positions / original}
        factor = _positive(given, "factor")
        # As in transformers, null and 0 stand for the default.
        fast, slow, scale, scale_all = (
            _positive(given, key) if given.get(key) else default
            for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0), ("mscale", None), ("mscale_all_dim", None))
        )
        if given.get("attention_factor") is not None:
            attention = _positive(given, "attention_factor")
        elif scale and scale_all:
            attention = _attention_factor(factor, scale) / _attention_factor(factor, scale_all)
        else:
            attention = _attention_factor(factor)
        if theta <= 1 or not 1 / MOST_ATTENTION <= attention <= MOST_ATTENTION:
            raise BarberError(
                f"config.json: rope type 'yarn' with rope_theta {theta:g} and an attention factor of {attention:g}: "
                f"above 1 and within a factor of {MOST_ATTENTION:g} are supported; fetch it again"
            )
        truncate = given.get("truncate", True)
        if not isinstance(truncate, bool):
            raise BarberError(f"config.json: rope parameter truncate must be true or false, not {truncate!r}")
        return cls(
            theta,
            "yarn",
            factor,
            1.0,
            4.0,
            original,
            attention_factor=attention,
            fast=fast,
            slow=slow,
            truncate=truncate,
        )

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
        if self.kind == "yarn":
            return self._blend(frequency, exponent, head_size)
        return frequency

    def _llama3(self, frequency: np.ndarray) -> np.ndarray:
        # Short wavelengths are kept, long ones stretched by `factor`, and those in between interpolated.
        # A number over an array is the reciprocal times the number, as PyTorch rounds it.
        wavelength = np.float32(1) / frequency * np.float32(2 * math.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        blend = (np.float32(1) / wavelength * np.float32(self.original_positions) - low) / (high - low)
        between = (1 - blend) * frequency / self.factor + blend * frequency
        out = np.where(wavelength > self.original_positions / low, frequency / self.factor, between)
        return np.where(wavelength < self.original_positions / high, frequency, out).astype(np.float32)

    def _blend(self, frequency: np.ndarray, exponent: np.ndarray, head_size: int) -> np.ndarray:
        # Features that rotate often within the original positions keep their frequency, the slowest are divided by
        # `factor`, and those in between, counted in features, are blended.
        power = (self.theta ** exponent.astype(np.float64)).astype(np.float32)
        stretched = np.float32(1) / (np.float32(self.factor) * power)
        low, high = (
            head_size * math.log(self.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))
            for rotations in (self.fast, self.slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_size - 1)
        if low == high:
            high += 0.001
        feature = np.arange(head_size // 2, dtype=np.float32)
        kept = 1 - np.clip((feature - np.float32(low)) / np.float32(high - low), 0, 1)
        return stretched * (1 - kept) + frequency * kept

    def rotate(self, x: jax.Array, position: jax.Array | None = None) -> jax.Array:
        """Rotate heads [S, L, H, E] by position: 0..L-1, or int32 [S] for one token per sequence (L = 1)."""
        length, size = x.shape[1], x.shape[-1]
        if position is None:
            angle = np.arange(length, dtype=np.float32)[None, :, None] * self.inverse_frequencies(size)
        else:
            angle = position.astype(jnp.float32)[:, None, None] * self.inverse_frequencies(size)
        angle = jnp.concatenate([angle, angle], axis=-1)[:, :, None, :]
        # In float32, also where x is not.
        cos, sin = ((of(angle) * self.attention_factor).astype(x.dtype) for of in (jnp.cos, jnp.sin))
        first, second = jnp.split(x, 2, axis=-1)
        return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


def _settings(config: dict) -> dict:
    """The rotary settings that transformers 5 makes of a config.json: one flat dict with `rope_type` and `rope_theta`.

    Files of two spellings, and mixtures, are in use, and entries of the two are never merged: `rope_scaling`, if it is
    not empty, stands in place of `rope_parameters`. Entries beside them only fill in what that one dict does not have,
    with the exception of original_max_position_embeddings. An entry that is null is not absent.
    """
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    for entries in (scaling or None, parameters):
        if entries is not None and not isinstance(entries, dict):
            raise BarberError(f"config.json: rope parameters must be an object, not {entries!r}")
    given = dict(scaling or parameters or {})
    for key, value in given.items():
        if isinstance(value, dict) or key.endswith("_attention"):
            raise BarberError(
                f"config.json: rotary settings for {key} alone are not supported; "
                "write one set for all layers (rope_type, rope_theta, ...) directly into rope_parameters"
            )
    given.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    given.setdefault("rope_type", given.get("type", "default"))
    if config.get("partial_rotary_factor") is not None:
        given.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    original = "original_max_position_embeddings"
    given.setdefault(original, config.get("max_position_embeddings"))
    if given[original] is not None and original in config:
        given[original] = config[original]
    return given


def _positive(given: dict, key: str) -> float:
    return positive(f"rope parameter {key}", given[key])


def _attention_factor(factor: float, scale: float = 1.0) -> float:
    """YaRN's length of queries and keys for a stretch by `factor`."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
