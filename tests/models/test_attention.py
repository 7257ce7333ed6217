"""Every form of attention against a plain statement of it, and its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from barber_jax.models import attention

FORMS = {"spans": attention.attend_in_spans, "loop": attention.attend_in_loop}
SAMPLES, SIZE = 2, 8


def inputs(length, heads, groups, dtype=jnp.float32, size=SIZE):
    keys = jax.random.split(jax.random.key(length), 3)
    shapes = [(SAMPLES, length, n, size) for n in (heads, groups, groups)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def plain(q, k, v, scale, window):
    """One query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for s, i, h in np.ndindex(*q.shape[:3]):
        first = 0 if window is None else max(0, i - window + 1)
        group = h // (q.shape[2] // k.shape[2])
        scores = k[s, first : i + 1, group] @ q[s, i, h] * scale
        weights = np.exp(scores - scores.max())
        out[s, i, h] = weights / weights.sum() @ v[s, first : i + 1, group]
    return out.reshape(*q.shape[:2], -1)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    # Lengths of several chunks, and of several chunks and a bit, are short enough for the plain statement.
    monkeypatch.setattr(attention, "MIN_CHUNK", 8)
    monkeypatch.setattr(attention, "LOOP_CHUNK", 8)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("length", "heads", "groups"), [(1, 2, 2), (5, 2, 1), (16, 4, 2), (27, 2, 2)])
@pytest.mark.parametrize("window", [None, 1, 3, 11, 100])
def test_forms_are_the_plain_statement(form, length, heads, groups, window):
    q, k, v = inputs(length, heads, groups)
    got = jax.jit(functools.partial(FORMS[form], scale=0.3, window=window))(q, k, v)
    np.testing.assert_allclose(got, plain(q, k, v, 0.3, window), atol=2e-6)


@pytest.mark.parametrize("window", [None, 3])
def test_gradients_are_the_same(window):
    q, k, v = inputs(27, 4, 2)
    weight = jax.random.normal(jax.random.key(0), (SAMPLES, 27, 4 * SIZE))

    def gradient(form):
        total = lambda *x: jnp.sum(weight * form(*x, 0.3, window))  # noqa: E731
        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v)

    for one, other in zip(*map(gradient, FORMS.values()), strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6)


@pytest.mark.parametrize(
    ("platform", "dtype", "size", "form"),
    [
        ("cpu", jnp.float32, 64, "attend_in_spans"),
        ("cpu", jnp.bfloat16, 64, "attend_in_spans"),
        ("gpu", jnp.bfloat16, 64, "attend_with_cudnn"),
        ("gpu", jnp.bfloat16, 128, "attend_with_cudnn"),
        ("gpu", jnp.bfloat16, 256, "attend_in_loop"),
        ("gpu", jnp.bfloat16, 12, "attend_in_loop"),
        ("gpu", jnp.float32, 64, "attend_in_loop"),
        ("tpu", jnp.bfloat16, 64, "attend_in_loop"),
    ],
)
def test_form_by_platform(platform, dtype, size, form, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(attention, form, lambda *_: form)
    assert attention.attend(*inputs(4, 2, 1, dtype, size), 0.3) == form


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 4, 128), (8, 2, 64)])
@pytest.mark.parametrize("window", [None, 100])
def test_cudnn_is_the_same_attention(heads, groups, size, window):
    q, k, v = inputs(512, heads, groups, jnp.bfloat16, size)

    def results(form, *x):
        total = lambda *x: jnp.sum(jnp.square(form(*x, 0.3 * size**-0.5, window).astype(jnp.float32)))  # noqa: E731
        return form(*x, 0.3 * size**-0.5, window), *jax.grad(total, argnums=(0, 1, 2))(*x)

    exact = results(attention.attend_in_loop, *(x.astype(jnp.float32) for x in (q, k, v)))
    for got, want in zip(results(attention.attend_with_cudnn, q, k, v), exact, strict=True):
        error = jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)
        assert error < 0.01
