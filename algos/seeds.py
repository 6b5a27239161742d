"""One program for all seeds of a run, on all devices."""

import jax
from jax.sharding import AxisType, PartitionSpec


def vmap_seeds(function, in_axes=0, **options):
    """`function`, written for one seed, jitted over all of them at once (leading axis of its results and of arguments with axis 0).

    Seeds do not talk to each other, so each of several devices takes an equal share of them: as many devices as divide their
    number. `in_axes` as in `jax.vmap`, with 0 or None for each argument; `options` go to `jax.jit`.
    """
    mapped = jax.vmap(function, in_axes)

    def shared_out(*args):
        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
        seeds = next(leaf.shape[0] for arg, axis in zip(args, axes, strict=True) if axis == 0 for leaf in jax.tree.leaves(arg))
        devices = next(n for n in range(min(seeds, jax.device_count()), 0, -1) if seeds % n == 0)
        if devices == 1:
            return mapped(*args)
        mesh = jax.make_mesh((devices,), ("seeds",), (AxisType.Auto,), devices=jax.devices()[:devices])
        specs = tuple(PartitionSpec("seeds") if axis == 0 else PartitionSpec() for axis in axes)
        # Without shard_map the compiler gathers every host callback's rows on the first device.
        return jax.shard_map(mapped, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("seeds"), check_vma=False)(*args)

    return jax.jit(shared_out, **options)
