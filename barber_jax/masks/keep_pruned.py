"""Training with pruned weights held at zero: a wrapper for any optax optimizer, and `zero_pruned`, which it uses."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from barber_jax.console.errors import BarberError

Path = tuple[str, ...]
"""Where a leaf is in a tree: the keys from the root, as text, so that a dict and an `nnx.State` have the same."""


class KeepPrunedState(NamedTuple):
    """State of `keep_pruned`.

    Attributes:
        masks: a tree like the parameters; None where each update is given them.
        inner: state of the wrapped optimizer.
    """

    masks: Any
    inner: Any


def zero_pruned(masks: Any, tree: Any) -> Any:
    """Set the pruned entries of a tree to exactly 0, whatever they are: infinities and NaN too.

    Args:
        masks: bool arrays, True = kept, of the shapes of the tree's arrays: a Flax kernel [in, out] has a mask
            [in, out], stacked ones [N, in, out]. A tree like `tree`, or a prefix of it. A 0-d True prunes nothing; as
            part of a prefix it stands for everything below it.
        tree: parameters or gradients, as nested dicts, lists, an `nnx.State`, or any other tree.

    Raises:
        BarberError: an array has no mask, or one of another shape or not of bool.
    """
    _check(masks)
    return _zero(masks, tree)


def keep_pruned(optimizer: optax.GradientTransformation, masks: Any = None) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that pruned weights are exactly 0 after every step, and so is what it remembers of them.

    The optimizer sees gradients and parameters whose pruned entries are 0. In its state, every array that belongs to a
    parameter and has its shape (a moment, an accumulated gradient, an average) is 0 there too, even where the optimizer
    adds noise or a constant. The update of a pruned weight is minus the weight, so that a parameter that is not 0 there
    yet becomes 0 with the first step. Sums over a matrix, as in clipping, adafactor or LAMB, count kept weights alone,
    except where they divide by the number of weights.

    Wrap the whole optimizer, `keep_pruned(optax.chain(...), masks)`: what comes after it in a chain may move weights.

    The masks become part of the optimizer's state, one byte per weight. So under `jax.jit` they are arguments and not
    constants of the program, which for a model of 7 billion weights would hold 7 GB of them; they stay on the devices,
    in the sharding in which they were given, are donated along with the moments, and are in the optimizer's checkpoint.
    A training loop that holds the masks itself leaves them out here and gives them to each update:

        optimizer = keep_pruned(optax.adamw(1e-4))
        state = optimizer.init(zero_pruned(masks, parameters))
        updates, state = optimizer.update(gradients, state, parameters, masks=masks)

    Args:
        optimizer: any optax optimizer, with or without extra arguments.
        masks: as for `zero_pruned`, a tree like the parameters or a prefix of it. None to give them to each update.

    Returns:
        An optimizer whose state is a `KeepPrunedState`. `masks` given to an update take the place of its own.

    Raises:
        BarberError: in `init` or `update`, if a parameter has no mask, a mask has another shape than its parameter, or
            no parameter; or there are no masks at all.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> KeepPrunedState:
        if masks is None:
            return KeepPrunedState(None, optimizer.init(params))
        full = jax.tree.map(jnp.asarray, masks_like(params, masks))
        return KeepPrunedState(full, optimizer.init(_zero(full, params)))

    def update(
        updates: Any, state: KeepPrunedState, params: Any = None, *, masks: Any = None, **extra: Any
    ) -> tuple[Any, KeepPrunedState]:
        if masks is not None:
            _check(masks)
        given = state.masks if masks is None else masks
        if given is None:
            raise BarberError("keep_pruned has no masks: give them to keep_pruned, or to each update as masks=...")
        seen = None if params is None else _zero(given, params)
        updates, inner = optimizer.update(_zero(given, updates), state.inner, seen, **extra)
        updates = _zero(given, updates) if params is None else _to_zero(given, updates, params)
        return updates, KeepPrunedState(state.masks, _zero_moments(given, inner, updates))

    return optax.GradientTransformationExtraArgs(init, update)


def masks_like(tree: Any, masks: Any) -> Any:
    """Masks in the structure of a tree, one for each of its arrays, whatever dicts or states they are nested in.

    Args:
        tree: parameters.
        masks: as for `zero_pruned`.

    Raises:
        BarberError: a parameter has no mask, a mask another shape than its parameter, or no parameter.
    """
    _check(masks)
    _check_used(masks, tree)
    found = _by_path(masks)
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return structure.unflatten(_mask_of(found, _path(keys), leaf) for keys, leaf in leaves)


def _path(keys: tuple) -> Path:
    """The keys of a leaf as text; the array of a Flax variable has the variable's path."""
    if keys and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    return tuple(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in keys)


def _by_path(tree: Any) -> dict[Path, Any]:
    return {_path(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _check(masks: Any) -> None:
    """Raise BarberError unless every mask is bool, and True if it is one number."""
    for path, mask in _by_path(masks).items():
        if jnp.result_type(mask) != np.bool_:
            raise BarberError(f"mask {_name(path)} has dtype {jnp.result_type(mask)}, not bool (True = kept)")
        if np.ndim(mask) == 0 and not isinstance(mask, jax.core.Tracer) and not mask:
            raise BarberError(f"mask {_name(path)} is one False; give an array of its parameter's shape")


def _check_used(masks: Any, params: Any) -> None:
    """Raise BarberError for a mask without a parameter: its name is wrong, and the parameter meant has another mask."""
    # Places that optax.masked and multi_transform leave to another optimizer count as parameters.
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    starts = {path[:end] for path in (_path(keys) for keys, _ in flat) for end in range(len(path) + 1)}
    for path in _by_path(masks):
        if path not in starts:
            raise BarberError(f"mask {_name(path)} has no parameter of this name")


def _mask_of(found: dict[Path, Any], path: Path, leaf: Any) -> Any:
    """The mask of the leaf at a path: its own, or that of the nearest node above it."""
    for end in range(len(path), -1, -1):
        if path[:end] in found:
            mask = found[path[:end]]
            if np.ndim(mask) and np.shape(mask) != np.shape(leaf):
                raise BarberError(
                    f"mask {_name(path[:end])} has shape {list(np.shape(mask))}, its parameter {list(np.shape(leaf))}; "
                    "a mask has its parameter's layout, [in, out] for a Flax kernel"
                )
            return mask
    raise BarberError(f"parameter {_name(path)} has no mask; give one of its shape, or True to prune nothing in it")


def _name(path: Path) -> str:
    return ".".join(path) or "of the whole tree"


def _zero(masks: Any, tree: Any) -> Any:
    found = _by_path(masks)
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return structure.unflatten(_zeroed(_mask_of(found, _path(keys), leaf), leaf) for keys, leaf in leaves)


def _zeroed(mask: Any, leaf: Any) -> Any:
    """The leaf with 0 where it is pruned; jnp.where, as a product would keep NaN and infinities."""
    return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype)) if np.ndim(mask) else leaf


def _to_zero(masks: Any, updates: Any, params: Any) -> Any:
    """The updates, with minus the parameter where it is pruned: their sum is exactly 0."""
    found, values = _by_path(masks), _by_path(params)

    def one(path: Path, update: jax.Array) -> jax.Array:
        mask = _mask_of(found, path, update)
        if not np.ndim(mask):
            return update
        # In the wider of both dtypes, or minus the parameter would be rounded. From 0, so that there is no -0.
        dtype = jnp.result_type(update, values[path])
        return jnp.where(mask, update.astype(dtype), 0 - values[path].astype(dtype))

    leaves, structure = jax.tree_util.tree_flatten_with_path(updates)
    return structure.unflatten(one(_path(keys), leaf) for keys, leaf in leaves)


def _zero_moments(masks: Any, state: Any, updates: Any) -> Any:
    """The optimizer's state with 0 where a weight is pruned, in every array that belongs to a parameter.

    Optimizers keep moments in trees like the parameters' somewhere in their state, so an array belongs to the parameter
    whose path ends its own, the longest if there are several, if its shape is the parameter's too.
    """
    found = _by_path(masks)
    shapes = {path: np.shape(leaf) for path, leaf in _by_path(updates).items()}

    def one(path: Path, leaf: Any) -> Any:
        ends = (path[begin:] for begin in range(len(path) + 1))
        owner = next((end for end in ends if end in shapes), None)
        if owner is None or shapes[owner] != np.shape(leaf) or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            return leaf
        return _zeroed(_mask_of(found, owner, leaf), leaf)

    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    return structure.unflatten(one(_path(keys), leaf) for keys, leaf in leaves)
