"""Everything between the head's products as Triton kernels, for GPUs. `passes` is the same on a CPU, and the reference.

Open `launch` first. Nothing here is imported where no kernel runs, since Triton is not everywhere.

    launch      teacher rows as the kernels read them, and the launches    normalise    normalisers, terms on a support
    gradient    the gradient, terms over the whole vocabulary              divergences  one bucket of each kind
"""
